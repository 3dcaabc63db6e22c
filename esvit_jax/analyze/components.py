"""Principal components, of features of images and of regions."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float


def principal_components(
    features: Float[np.ndarray, "n d"], count: int
) -> Float[np.ndarray, "n k"]:
    """Coordinates along the directions of largest variance, largest first.

    Args:
      features: n vectors.
      count: of coordinates; where there are fewer directions the rest is 0.

    Returns:
      f32[n, count]. Signs are chosen so that of every direction the entry of largest size is
      positive: a decomposition leaves them open.
    """
    centered = features.astype(np.float64) - features.mean(0, dtype=np.float64)
    _, _, directions = np.linalg.svd(centered, full_matrices=False)
    directions = directions[:count]
    largest = np.argmax(np.abs(directions), axis=1)
    signs = np.sign(np.take_along_axis(directions, largest[:, None], axis=1))
    found = centered @ (directions * signs).T
    return np.pad(found, ((0, 0), (0, count - found.shape[1]))).astype(np.float32)


def component_colors(
    maps: Sequence[Float[np.ndarray, "_ _ d"]],
) -> list[Float[np.ndarray, "_ _ 3"]]:
    """The first three components of the regions of some maps as red, green and blue in 0..1.

    They are those of all maps together, so that a colour means the same in each. The outermost 2 %
    at either end are cut off.
    """
    flat = np.concatenate([x.reshape(-1, x.shape[-1]) for x in maps])
    found = principal_components(flat, 3)
    low, high = np.percentile(found, (2, 98), axis=0)
    colors = np.clip((found - low) / np.maximum(high - low, 1e-12), 0, 1).astype(np.float32)
    parts = np.split(colors, np.cumsum([x.shape[0] * x.shape[1] for x in maps])[:-1])
    return [part.reshape(*x.shape[:2], 3) for part, x in zip(parts, maps, strict=True)]
