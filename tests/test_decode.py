"""Decoding images into canvases."""

import importlib.util
import io
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from images import encoded, noise
from PIL import Image, ImageOps

from esvit_jax.data.decode import DecodeError, decode


def test_small_images_are_not_scaled():
    image = noise(0, 5, 7, 3)
    canvas, size = decode(encoded(image), 8)
    assert canvas.dtype == np.uint8 and size.dtype == np.int32
    assert size.tolist() == [5, 7]
    np.testing.assert_array_equal(canvas[:5, :7], image)
    assert not canvas[5:].any() and not canvas[:, 7:].any()


def test_scaling_by_a_whole_factor_is_the_mean_of_blocks():
    image = noise(1, 24, 48, 3)
    canvas, size = decode(image, 16)
    assert size.tolist() == [8, 16]
    blocks = image.reshape(8, 3, 16, 3, 3).mean((1, 3))
    assert np.abs(canvas[:8].astype(float) - blocks).max() <= 0.5 + 1e-6
    assert not canvas[8:].any()


@pytest.mark.parametrize(("height", "width"), [(100, 75), (61, 200), (33, 32), (300, 1)])
def test_scaling_is_the_mean_over_areas(height: int, width: int):
    image = noise(2, height, width, 3)
    canvas, size = decode(image, 32)
    scale = 32 / max(height, width)
    assert size.tolist() == [max(1, round(height * scale)), max(1, round(width * scale))]
    expected = area_mean(image, size)
    assert np.abs(canvas[: size[0], : size[1]] - expected).max() <= 1.0


def test_scaling_agrees_with_pillow_reduce():
    image = noise(3, 96, 64, 3)
    halved, size = decode(encoded(image), 48)
    assert size.tolist() == [48, 32]
    reduced = np.asarray(Image.fromarray(image).reduce(2))
    assert np.abs(halved[:48, :32].astype(int) - reduced).max() <= 1


def area_mean(image: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Mean over each output pixel's area, by weights of overlap: [h, w, 3] → [*size, 3]."""

    def weights(new: int, old: int) -> np.ndarray:
        edges = np.linspace(0, old, new + 1)
        low, high = edges[:-1, None], edges[1:, None]
        pixel = np.arange(old)[None]
        overlap = np.clip(np.minimum(high, pixel + 1) - np.maximum(low, pixel), 0, None)
        return overlap / overlap.sum(1, keepdims=True)

    rows, columns = weights(size[0], image.shape[0]), weights(size[1], image.shape[1])
    return np.einsum("yh,hwc,xw->yxc", rows, image.astype(float), columns)


def test_kinds_of_images_become_rgb():
    grey, rgba = noise(3, 6, 8), noise(4, 6, 8, 4)
    sixteen = np.random.default_rng(5).integers(0, 65536, (6, 8), dtype=np.uint16)
    palette = Image.fromarray(rgba[..., :3]).quantize(16)
    expected = {
        "grey png": (encoded(grey), grey[..., None].repeat(3, 2)),
        "grey array": (grey, grey[..., None].repeat(3, 2)),
        "grey array with a channel": (grey[..., None], grey[..., None].repeat(3, 2)),
        "alpha is dropped": (encoded(rgba), rgba[..., :3]),
        "alpha array": (rgba, rgba[..., :3]),
        "palette": (encoded(palette), np.asarray(palette.convert("RGB"))),
        "16 bit png": (encoded(sixteen), (sixteen >> 8).astype(np.uint8)[..., None].repeat(3, 2)),
        "16 bit array": (sixteen, (sixteen >> 8).astype(np.uint8)[..., None].repeat(3, 2)),
        "webp": (encoded(rgba[..., :3], "WEBP", lossless=True), rgba[..., :3]),
    }
    for kind, (image, rgb) in expected.items():
        canvas, size = decode(image, 8)
        assert size.tolist() == [6, 8], kind
        np.testing.assert_array_equal(canvas[:6], rgb, err_msg=kind)


def test_jpeg_agrees_with_pillow():
    smooth = Image.fromarray(noise(6, 5, 6, 3)).resize((48, 40), Image.Resampling.BICUBIC)
    data = encoded(smooth, "JPEG", quality=90)
    canvas, _ = decode(data, 48)
    reading = np.asarray(Image.open(io.BytesIO(data)))
    assert np.abs(canvas[:40].astype(int) - reading).max() <= 1


@pytest.mark.parametrize("format", ["PNG", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(orientation: int, format: str):
    image = Image.fromarray(noise(7, 3, 4, 3)).resize((32, 24), Image.Resampling.NEAREST)
    exif = image.getexif()
    exif[0x0112] = orientation
    data = encoded(image, format, exif=exif, quality=100)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    canvas, size = decode(data, 32)
    assert tuple(size) == (upright.height, upright.width)
    assert (upright.height > upright.width) == (orientation > 4)
    np.testing.assert_array_equal(canvas[: size[0], : size[1]], np.asarray(upright))


def test_heic_without_pillow_heif_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DecodeError, match=r"HEIC image: pip install esvit_jax\[heic\]"):
        decode(b"\0\0\0\x1cftypheic" + bytes(40), 8)


def test_heic_agrees_with_the_image_that_it_was_made_of():
    pillow_heif = pytest.importorskip("pillow_heif")
    smooth = Image.fromarray(noise(6, 5, 6, 3)).resize((48, 40), Image.Resampling.BICUBIC)
    for image in (smooth, smooth.convert("RGBA"), smooth.convert("L")):
        file = io.BytesIO()
        pillow_heif.from_pillow(image).save(file, quality=100, chroma=444)
        canvas, size = decode(file.getvalue(), 48)
        assert size.tolist() == [40, 48]
        difference = canvas[:40].astype(int) - np.asarray(image.convert("RGB"))
        assert np.abs(difference).max() <= 6
        with pytest.raises(DecodeError, match="pillow-heif reads no whole image"):
            decode(file.getvalue()[:-100], 48)


def smooth(mode: str = "RGB") -> Image.Image:
    """An image that JPEG changes little, 48 pixels wide and 40 high."""
    small = Image.fromarray(noise(6, 5, 6, 3))
    return small.resize((48, 40), Image.Resampling.BICUBIC).convert(mode)


def animated(format: str, **options: object) -> bytes:
    """Two frames, the second of which is the negative of the first."""
    negative = Image.fromarray(255 - np.asarray(smooth()))
    return encoded(smooth(), format, save_all=True, append_images=[negative], **options)


@pytest.mark.parametrize(
    "data",
    [
        encoded(smooth().resize((1, 1))),
        encoded(smooth("CMYK"), "JPEG", quality=95),
        encoded(smooth(), "JPEG", quality=95, progressive=True),
        encoded(smooth("L"), "JPEG", quality=95),
        encoded(smooth("1")),
        encoded(smooth("LA")),
        animated("GIF"),
        animated("PNG"),
        animated("WEBP", lossless=True),
    ],
    ids=["1x1", "cmyk", "progressive", "grey", "1 bit", "grey and alpha", "gif", "apng", "webp"],
)
def test_unusual_images_are_as_pillow_reads_them(data: bytes):
    """Of those that move, the first frame."""
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    canvas, size = decode(data, 48)
    assert size.tolist() == list(expected.shape[:2])
    assert np.abs(canvas[: size[0], : size[1]].astype(int) - expected).max() <= 1


def test_of_16_bits_the_upper_8_are_used():
    pixels = np.random.default_rng(0).integers(0, 65536, (6, 8, 3), np.uint16)
    data = cv2.imencode(".png", pixels[..., ::-1])[1].tobytes()  # Pillow writes no such RGB
    np.testing.assert_array_equal(decode(data, 8)[0][:6], pixels >> 8)


def test_a_line_of_pixels_stays_one():
    column = noise(9, 5000, 1, 3)
    canvas, size = decode(encoded(column), 50)
    assert size.tolist() == [50, 1]
    means = column.reshape(50, 100, 3).mean(1)
    assert np.abs(canvas[:50, 0] - means).max() <= 0.5 + 1e-6
    assert decode(encoded(noise(9, 1, 5000, 3)), 50)[1].tolist() == [1, 50]


def bomb(side: int) -> bytes:
    """A black PNG of one bit a pixel."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)

    row, packer = bytes(1 + -(-side // 8)), zlib.compressobj(9)
    pixels = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


HOSTILE = """
import json, resource, sys, time
from esvit_jax.data.loader import eval_batches
from esvit_jax.data.sources import open_source
source = open_source("folder:" + sys.argv[1], "train")
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
(batch,) = eval_batches(source, batch_size=len(source), canvas_size=32, num_threads=1)
print(json.dumps({
    "seconds": time.monotonic() - start,
    "megabytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
    "read": [name for name, good in zip(batch["id"], batch["mask"]) if good],
}))
"""


def test_hostile_files_are_bad_records_at_once(tmp_path: Path):
    """In a process of its own: OpenCV takes the limit on pixels when it is loaded."""
    files = {
        "bomb.png": bomb(30_000),
        "bomb.jpg": bomb(15_000),  # whatever its name says
        "empty.jpg": b"",
        "text.jpg": b"This is no picture.",
        "cut.jpg": encoded(smooth(), "JPEG")[:-200],
        "good.png": encoded(smooth()),
        "large.png": bomb(3_000),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert len(files["bomb.png"]) < 200_000
    found = subprocess.run(
        [sys.executable, "-c", HOSTILE, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert found.returncode == 0, found.stderr
    measured = json.loads(found.stdout)
    assert sorted(measured["read"]) == ["good.png", "large.png"]
    assert measured["seconds"] < 2 and measured["megabytes"] < 200, measured
    named = {line.split(" train: ")[1] for line in found.stderr.splitlines() if "decoded" in line}
    assert {line.split(" cannot be decoded: ")[0] for line in named} == {
        "bomb.png", "bomb.jpg", "empty.jpg", "text.jpg", "cut.jpg",
    }  # fmt: skip
    limit = "it has more than 200,000,000 pixels (OPENCV_IO_MAX_IMAGE_PIXELS in the environment"
    assert sum(limit in line for line in named) == 2


def test_what_is_no_image_is_refused():
    whole = encoded(noise(8, 40, 40, 3), "JPEG")
    for image in (b"", b"text", whole[: len(whole) // 2], encoded(noise(8, 40, 40))[:-30]):
        with pytest.raises(DecodeError):
            decode(image, 8)
    for array in (np.zeros((4, 4, 2), np.uint8), np.zeros((4, 4)), np.zeros((0, 4), np.uint8)):
        with pytest.raises(DecodeError):
            decode(array, 8)
