"""Pictures as text inside a page, small."""

import base64
from typing import NamedTuple

import numpy as np
from etils import epath
from jaxtyping import UInt8

from esvit_jax.data.decode import decode

# A side of up to so many pixels is kept exactly (PNG), a longer one is compressed (WebP).
TINY, QUALITY = 64, 84
# The longest side of a figure; a phone shows fewer pixels, a desktop hardly more.
FIGURE_SIDE = 1300


class Inlined(NamedTuple):
    """A picture in a page.

    Attributes:
      uri: `data:image/…;base64,…`.
      width, height: pixels.
    """

    uri: str
    width: int
    height: int

    @property
    def tiny(self) -> bool:
        """Whether its pixels are what there is to see."""
        return max(self.width, self.height) <= TINY


def inlined(picture: UInt8[np.ndarray, "h w 3"], longest: int = FIGURE_SIDE) -> Inlined:
    """A picture of red, green, blue, scaled down to a longest side if it is larger."""
    import cv2  # not before data.decode, which sets OpenCV's limit

    height, width = picture.shape[:2]
    if max(height, width) > longest:
        share = longest / max(height, width)
        width, height = max(1, round(width * share)), max(1, round(height * share))
        picture = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)
    bgr = np.ascontiguousarray(picture[..., ::-1])
    tiny = max(height, width) <= TINY
    options = [] if tiny else [cv2.IMWRITE_WEBP_QUALITY, QUALITY]
    _, data = cv2.imencode(".png" if tiny else ".webp", bgr, options)
    kind = "png" if tiny else "webp"
    text = base64.b64encode(data.tobytes()).decode()
    return Inlined(f"data:image/{kind};base64,{text}", width, height)


def inlined_file(path: epath.Path) -> Inlined:
    """A figure on disk, local or in a bucket.

    Raises:
      DecodeError: it is no picture.
    """
    canvas, (height, width) = decode(path.read_bytes(), FIGURE_SIDE)
    return inlined(canvas[:height, :width])
