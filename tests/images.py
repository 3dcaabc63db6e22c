"""Images for tests: encoded, noisy, or grey of a value by which they are recognised."""

import io
from pathlib import Path

import numpy as np
from PIL import Image


def encoded(image: Image.Image | np.ndarray, format: str = "PNG", **options: object) -> bytes:
    """The bytes of an image file."""
    file = io.BytesIO()
    pillow = image if isinstance(image, Image.Image) else Image.fromarray(image)
    pillow.save(file, format, **options)
    return file.getvalue()


def noise(seed: int, *shape: int) -> np.ndarray:
    """uint8[*shape]."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_image(path: Path, value: int = 0, size: tuple[int, int] = (6, 4)) -> None:
    """A grey PNG of one value, whatever its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(np.full(size, value, np.uint8)))
