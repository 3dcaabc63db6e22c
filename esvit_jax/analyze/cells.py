"""Where on a picture the cells of a map lie: squares from the top-left corner on, a stride wide.

A map may end before the picture does (a ViT and a ViL leave out what does not fill a patch), or
after it (the others pad).
"""

import numpy as np
from jaxtyping import Float


def cell_at(pixel: float, stride: int, count: int) -> int:
    """Which of a side's cells, of `count`, lies at a pixel, or is nearest to it."""
    return min(int(pixel // stride), count - 1)


def middle(cell: int, stride: int, length: int) -> float:
    """Where the part of a cell that lies on a picture has its middle, pixels along a side.

    Args:
      cell: row or column of it.
      stride: pixels along a side of a cell.
      length: of the side, pixels.
    """
    return (cell * stride + min((cell + 1) * stride, length)) / 2


def over_picture(
    values: Float[np.ndarray, "h w"], stride: int, size: tuple[int, int]
) -> Float[np.ndarray, "_ _"]:
    """The value of the cell that each pixel of a picture lies in; NaN where there is none."""
    covered = np.kron(values, np.ones((stride, stride), values.dtype))[: size[0], : size[1]]
    missing = [(0, side - there) for side, there in zip(size, covered.shape, strict=True)]
    return np.pad(covered, missing, constant_values=np.nan)
