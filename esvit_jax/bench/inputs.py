"""The input pipeline: photos to canvases on the host, beside making the views there."""

import functools
import importlib.util
import os
import random
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import jax
import jax.numpy as jnp
import numpy as np

from esvit_jax.bench.timing import time_in_turns
from esvit_jax.config import ConfigDict
from esvit_jax.data.augment import resized_crop, sample_parameters, to_levels
from esvit_jax.data.decode import decode
from esvit_jax.data.folders import IMAGE_SUFFIXES
from esvit_jax.data.loader import train_batches
from esvit_jax.data.sources import IndexedSource, Record
from esvit_jax.errors import UserError

PHOTO_SIZE = (500, 375)  # width and height, pixels: about the mean of ImageNet's
JPEG_QUALITY = 90
NUM_PHOTOS = 32  # timed at a time
NUM_RECORDS = 1_000_000  # that the loader shuffles


class InputSpeed(NamedTuple):
    """How fast photos of PHOTO_SIZE become canvases, and what the canvases lose.

    Attributes:
      decode: {decoder: images a second on one core}.
      loader: {how: images a second of the whole pipeline} with as many threads or processes as
        there are cores.
      cores: of this machine.
      pillow_views: images a second on one core that Pillow decodes and cuts all views of.
      fidelity: {canvas size: see `fidelity`}.
    """

    decode: dict[str, float]
    loader: dict[str, float]
    cores: int
    pillow_views: float
    fidelity: dict[int, dict[str, float]]


def bench_input(config: ConfigDict, photos: str, rounds: int) -> InputSpeed:
    """Times the input from JPEGs in memory.

    Args:
      config: its views, and its `data.canvas_size`.
      photos: a folder of photos, of which parts of PHOTO_SIZE are encoded again.
      rounds: timings, of which the median is given.

    Raises:
      UserError: no photos there, or no Pillow.
    """
    if importlib.util.find_spec("PIL") is None:
        raise UserError("the input is compared with Pillow's: pip install pillow")
    files = encoded_photos(photos)
    size = config.data.canvas_size
    decoders = {"opencv": lambda file: decode(file, size)}
    if importlib.util.find_spec("simplejpeg"):
        decoders["simplejpeg"] = functools.partial(decode_simplejpeg, canvas_size=size)
        decoders["simplejpeg, scaled"] = functools.partial(
            decode_simplejpeg, canvas_size=size, scaled=True
        )
    calls = {
        name: functools.partial(_run_all, decoder, files) for name, decoder in decoders.items()
    }
    pillow_views = functools.partial(views_with_pillow, views=config.views)
    calls["pillow_views"] = functools.partial(_run_all, pillow_views, files)
    rates = {
        name: len(files) / timing.median for name, timing in time_in_turns(calls, rounds).items()
    }
    cores = os.cpu_count() or 1
    return InputSpeed(
        decode={name: rates[name] for name in decoders},
        loader={
            f"{cores} threads": loader_rate(files, size, num_workers=0, num_threads=cores),
            f"{cores} processes": loader_rate(files, size, num_workers=cores, num_threads=1),
        },
        cores=cores,
        pillow_views=rates["pillow_views"],
        fidelity={side: fidelity(config, photos, side) for side in (256, 384, 512)},
    )


def _run_all(function: Callable[[bytes], object], files: list[bytes]) -> None:
    for file in files:
        function(file)


def read_photos(photos: str) -> list[np.ndarray]:
    """The images in a folder, uint8[h, w, 3], RGB.

    Raises:
      UserError: there are none.
    """
    paths = sorted(p for p in Path(photos).glob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    images = [cv2.imread(str(path), cv2.IMREAD_COLOR_RGB) for path in paths]
    images = [image for image in images if image is not None]
    if not images:
        message = "there are no images in it; give a folder of photos"
        raise UserError(message, argument="photos", value=photos)
    return images


def encoded_photos(photos: str) -> list[bytes]:
    """JPEGs of PHOTO_SIZE: random parts of the images in the folder `photos`."""
    images, rng, files = read_photos(photos), np.random.default_rng(0), []
    width, height = PHOTO_SIZE
    for i in range(NUM_PHOTOS):
        image = images[i % len(images)]
        full_height, full_width = image.shape[:2]
        side = min(full_width, full_height * width / height) * rng.uniform(0.7, 1.0)
        w, h = int(side), int(side * height / width)
        y, x = rng.integers(full_height - h + 1), rng.integers(full_width - w + 1)
        part = cv2.resize(image[y : y + h, x : x + w], PHOTO_SIZE, interpolation=cv2.INTER_CUBIC)
        quality = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
        files.append(cv2.imencode(".jpg", cv2.cvtColor(part, cv2.COLOR_RGB2BGR), quality)[1])
    return [file.tobytes() for file in files]


def decode_simplejpeg(file: bytes, canvas_size: int, scaled: bool = False) -> Any:
    """`decode.decode` with simplejpeg in place of OpenCV, for comparison.

    `scaled` lets the decoder skip the frequencies that the canvas does not hold.
    """
    import simplejpeg

    header: Any = simplejpeg.decode_jpeg_header(file)
    height, width = header[:2]
    scale = min(1.0, canvas_size / max(height, width))
    least = (round(height * scale), round(width * scale)) if scaled else (0, 0)
    rgb = simplejpeg.decode_jpeg(file, min_height=least[0], min_width=least[1])
    return decode(rgb, canvas_size)


def loader_rate(
    files: list[bytes], canvas_size: int, *, num_workers: int, num_threads: int
) -> float:
    """Images a second of `train_batches`, once it is under way."""
    batch_size, batches = NUM_PHOTOS, 16
    source = IndexedSource("photos", "train", (), _Photos(files))
    stream = train_batches(
        source, batch_size=batch_size, canvas_size=canvas_size, seed=0, start_step=0,
        num_workers=num_workers, num_threads=num_threads, max_bad_records=0,
    )  # fmt: skip
    with closing(stream):
        for _ in range(8):  # what was prepared while the workers started must not count
            next(stream)
        start = time.perf_counter()
        for _ in range(batches):
            next(stream)
        return batches * batch_size / (time.perf_counter() - start)


class _Photos:
    """JPEGs in memory as the records of a large source, over and over.

    Shuffling a few dozen indices takes grain as long as decoding the images, of thousands nothing.
    """

    def __init__(self, files: list[bytes]):
        self._files = files

    def __len__(self) -> int:
        return NUM_RECORDS

    def __getitem__(self, index: int) -> Record:
        return {"image": self._files[index % len(self._files)], "label": -1, "id": str(index)}


def views_with_pillow(file: bytes, views: ConfigDict) -> list[np.ndarray]:
    """Decodes a JPEG and cuts all views of it on the host, as the published pipeline does."""
    import io

    from PIL import Image, ImageEnhance, ImageFilter, ImageOps

    image, results = Image.open(io.BytesIO(file)).convert("RGB"), []
    for i in range(2 + views.num_local):
        kind = min(i, 2)
        side = views.global_size if kind < 2 else views.local_size
        scale = views.global_scale if kind < 2 else views.local_scale
        area = image.width * image.height * random.uniform(*scale)
        ratio = random.uniform(*views.ratio)
        w = min(image.width, round((area * ratio) ** 0.5))
        h = min(image.height, round((area / ratio) ** 0.5))
        x, y = random.randint(0, image.width - w), random.randint(0, image.height - h)
        view = image.crop((x, y, x + w, y + h)).resize((side, side), Image.Resampling.BICUBIC)
        if random.random() < views.flip:
            view = ImageOps.mirror(view)
        if random.random() < views.jitter_probability:
            for enhance, strength in (
                (ImageEnhance.Brightness, views.brightness),
                (ImageEnhance.Contrast, views.contrast),
                (ImageEnhance.Color, views.saturation),
            ):
                view = enhance(view).enhance(random.uniform(1 - strength, 1 + strength))
            hue, saturation, value = view.convert("HSV").split()
            turn = round(255 * random.uniform(-views.hue, views.hue))
            hue = hue.point([(level + turn) % 256 for level in range(256)])
            view = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
        if random.random() < views.grayscale:
            view = view.convert("L").convert("RGB")
        if random.random() < views.blur_probability[kind]:
            view = view.filter(ImageFilter.GaussianBlur(random.uniform(*views.blur_sigma)))
        if random.random() < views.solarize[kind]:
            view = ImageOps.solarize(view)
        pixels = np.asarray(view, np.float32) / 255
        results.append((pixels - np.float32(views.mean)) / np.float32(views.std))
    return results


def fidelity(config: ConfigDict, photos: str, canvas_size: int) -> dict[str, float]:
    """Mean absolute error, in levels of 255, of crops from a canvas against the full photos'.

    Boxes are drawn as in training, and all photos of the folder are used as they are.

    Returns:
      {"global": of global views, "local": of local views}.
    """
    views = config.views
    errors: dict[str, list[float]] = {"global": [], "local": []}
    for i, photo in enumerate(read_photos(photos)):
        canvas, size = decode(photo, canvas_size)
        full, scale = to_levels(jnp.asarray(photo)), max(photo.shape) / max(size)
        small = to_levels(jnp.asarray(canvas))
        for key in jax.random.split(jax.random.key(i), 4):
            boxes = sample_parameters(key, jnp.asarray(size), views).box
            for kind, chosen, side in (
                ("global", boxes[:2], views.global_size),
                ("local", boxes[2:], views.local_size),
            ):
                for box in chosen:
                    in_full = box.astype(jnp.float32) * scale
                    difference = _crop(small, box, side) - _crop(full, in_full, side)
                    errors[kind].append(float(jnp.abs(difference).mean()))
    return {kind: float(np.mean(values)) for kind, values in errors.items() if values}


_crop = jax.jit(resized_crop, static_argnums=2)
