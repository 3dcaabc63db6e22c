"""Bicubic resizing of tables that a network has learned, as PyTorch does it."""

import numpy as np
from jaxtyping import Float


def bicubic_matrix(size: int, new_size: int) -> Float[np.ndarray, "new_size size"]:
    """float64 weights that resize an axis: new = matrix @ old.

    Keys' kernel with a = -0.75, half-pixel centres, borders repeated, no antialias: PyTorch's
    `interpolate(mode="bicubic")`.
    """
    position = (np.arange(new_size) + 0.5) * size / new_size - 0.5
    taps = np.floor(position)[:, None].astype(int) + np.arange(-1, 3)
    distance = np.abs(position[:, None] - taps)
    a = -0.75
    near = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    far = a * (distance**3 - 5 * distance**2 + 8 * distance - 4)
    weights = np.zeros((new_size, size))
    rows = np.arange(new_size)[:, None]
    np.add.at(weights, (rows, taps.clip(0, size - 1)), np.where(distance <= 1, near, far))
    return weights
