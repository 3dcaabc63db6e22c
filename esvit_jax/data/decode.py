"""Images as they are stored, decoded and fitted into a square canvas."""

import importlib.util
import io
import os

import numpy as np

# Of pixels in an image, as its header says before anything is decoded: a PNG of 100 kB may claim
# 900 million, which takes a decoder seconds and gigabytes. The largest photos of telephones have
# 200 million. OpenCV reads its limit once, when it is loaded: a program that imports cv2 before
# this module sets the variable itself, or has OpenCV's own limit, 2^30.
PIXEL_LIMIT = "OPENCV_IO_MAX_IMAGE_PIXELS"
MAX_PIXELS = int(os.environ.setdefault(PIXEL_LIMIT, "200000000"))
import cv2  # noqa: E402

# Images are decoded side by side, in worker processes too (which import this module);
# threads of OpenCV's own would only fight for the same cores.
cv2.setNumThreads(0)


# What a HEIC file says of itself, whatever its name; phones call some of them .jpg.
HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}


TOO_LARGE = f"it has more than {MAX_PIXELS:,} pixels ({PIXEL_LIMIT} in the environment sets that)"


class DecodeError(ValueError):
    """A record that holds no readable image; the message says why."""


def decode(image: bytes | np.ndarray, canvas_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Decodes an image and fits it into a canvas.

    Grey becomes RGB; alpha is dropped, as Pillow's `convert("RGB")` does; 16 bits become the upper
    8; the EXIF orientation is applied. An image whose longer side exceeds `canvas_size` is scaled
    down to it by averaging areas; none is scaled up.

    Args:
      image: the bytes of a JPEG, PNG, WebP, AVIF, … file, with pillow-heif also of a HEIC file; or
        uint8 or uint16 [h, w], [h, w, 1 | 3 | 4].
      canvas_size: pixels along the side of the canvas.

    Returns:
      The canvas uint8[canvas_size, canvas_size, 3], zero outside of the image in its top-left
      corner, and the image's (height, width) there, int32[2].

    Raises:
      DecodeError: no image, one that is cut off, or one of more than MAX_PIXELS.
    """
    rgb = _rgb_of_bytes(image) if isinstance(image, bytes) else _rgb_of_array(image)
    height, width = rgb.shape[:2]
    scale = canvas_size / max(height, width)
    if scale < 1:
        height, width = max(1, round(height * scale)), max(1, round(width * scale))
        rgb = cv2.resize(rgb, (width, height), interpolation=cv2.INTER_AREA)
    canvas = np.zeros((canvas_size, canvas_size, 3), np.uint8)
    canvas[:height, :width] = rgb
    return canvas, np.array([height, width], np.int32)


def _rgb_of_bytes(data: bytes) -> np.ndarray:
    if not data:
        raise DecodeError("it is empty or cannot be read")
    if data[4:8] == b"ftyp" and data[8:12] in HEIC_BRANDS:
        return _rgb_of_heic(data)
    try:
        rgb = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error as error:
        if "CV_IO_MAX_IMAGE_PIXELS" in str(error):
            raise DecodeError(TOO_LARGE) from error
        raise DecodeError(str(error).strip().splitlines()[-1]) from error
    if rgb is None:
        raise DecodeError(f"OpenCV reads no whole image from its {len(data)} bytes")
    return _turn_avif(rgb, data) if data[4:12] == b"ftypavif" else rgb


def _turn_avif(rgb: np.ndarray, data: bytes) -> np.ndarray:
    """Applies the orientation of an AVIF file, which is a property and no EXIF; OpenCV does not."""
    header = data[: data.find(b"mdat")]
    if (turn := header.find(b"irot")) >= 0:
        rgb = np.rot90(rgb, header[turn + 4] & 3)
    if (mirror := header.find(b"imir")) >= 0:
        rgb = np.flip(rgb, header[mirror + 4] & 1)
    return np.ascontiguousarray(rgb)


def _rgb_of_heic(data: bytes) -> np.ndarray:
    if importlib.util.find_spec("pillow_heif") is None:
        raise DecodeError("it is a HEIC image: pip install esvit_jax[heic] to read it")
    import pillow_heif

    try:  # 8 bits, and upright
        file = pillow_heif.open_heif(io.BytesIO(data))
        if file.size[0] * file.size[1] > MAX_PIXELS:
            raise DecodeError(TOO_LARGE)
        return _rgb_of_array(np.asarray(file))
    except DecodeError:
        raise
    except (ValueError, RuntimeError, EOFError, OSError) as error:
        raise DecodeError(f"pillow-heif reads no whole image from it: {error}") from error


def _rgb_of_array(image: np.ndarray) -> np.ndarray:
    channels = image.shape[2] if image.ndim == 3 else 1
    if image.dtype not in (np.uint8, np.uint16) or image.ndim not in (2, 3) or not image.size:
        raise DecodeError(f"an array {image.dtype}{list(image.shape)} is no image")
    if channels not in (1, 3, 4):
        raise DecodeError(f"it has {channels} channels; 1, 3 and 4 can be read")
    if image.dtype == np.uint16:
        image = (image >> 8).astype(np.uint8)
    image = image.reshape(*image.shape[:2], channels)[..., :3]
    return np.ascontiguousarray(np.broadcast_to(image, (*image.shape[:2], 3)))
