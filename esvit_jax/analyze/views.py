"""Training images, and the views that a run cuts them into."""

from contextlib import closing
from typing import NamedTuple

import jax
import numpy as np

from esvit_jax.analyze.inline import Inlined, inlined
from esvit_jax.analyze.pictures import short_name, to_picture
from esvit_jax.config import ConfigDict
from esvit_jax.data.augment import augment, sample_parameters
from esvit_jax.data.loader import eval_batches
from esvit_jax.data.sources import Source

VIEW_SIDE = 160  # pixels of a view in a page; an image has twice as many


class ViewedImage(NamedTuple):
    """One image and its views.

    Attributes:
      name: of the image.
      image: uint8[h, w, 3].
      views: {"global": f32[2, g, g, 3], "local": f32[L, l, l, 3]}, normalised.
      boxes: int[2 + L, 4]: y, x, height, width in pixels of the image that the views show.
    """

    name: str
    image: np.ndarray
    views: dict[str, np.ndarray]
    boxes: np.ndarray


def views_of_images(config: ConfigDict, source: Source, count: int) -> list[ViewedImage]:
    """The views of the first images that can be read, as some step of the run might cut them.

    Args:
      config: of the run.
      source: its training images.
      count: of images; fewer come back where there are no more that can be read.
    """

    @jax.jit
    def cut(key, canvas, size):
        views = augment(key[None], canvas, size, config.views)
        return views, sample_parameters(key, size[0], config.views).box

    keys = jax.random.split(jax.random.key(config.seed), count)
    batches = eval_batches(source, batch_size=1, canvas_size=config.data.canvas_size, num_threads=1)
    found: list[ViewedImage] = []
    with closing(batches):
        while len(found) < count and (batch := next(batches, None)):
            if not batch["mask"][0]:
                continue
            views, boxes = cut(keys[len(found)], batch["canvas"], batch["size"])
            height, width = batch["size"][0]
            found.append(
                ViewedImage(
                    short_name(batch["id"][0]), batch["canvas"][0, :height, :width],
                    {name: np.asarray(stack[:, 0]) for name, stack in views.items()},
                    np.asarray(boxes),
                )
            )  # fmt: skip
    return found


class PicturedView(NamedTuple):
    """A view in a page.

    Attributes:
      name: such as "local 3".
      picture: its pixels.
      box: left, top, width and height of what it shows, in shares of the image.
    """

    name: str
    picture: Inlined
    box: tuple[float, float, float, float]


class Pictured(NamedTuple):
    """An image and its views in a page."""

    name: str
    picture: Inlined
    views: list[PicturedView]


def pictured(viewed: ViewedImage, views: ConfigDict) -> Pictured:
    """An image and its views as small pictures.

    Args:
      viewed: to be shown.
      views: `config.views`, by whose mean and std the views were normalised.
    """
    height, width = viewed.image.shape[:2]
    named = [
        (f"{kind} {i + 1}", view)
        for kind in ("global", "local") for i, view in enumerate(viewed.views[kind])
    ]  # fmt: skip
    shown = []
    for (name, view), (y, x, h, w) in zip(named, viewed.boxes, strict=True):
        pixels = to_picture(view, views.mean, views.std)
        picture = inlined((255 * pixels + 0.5).astype(np.uint8), VIEW_SIDE)
        box = (float(x / width), float(y / height), float(w / width), float(h / height))
        shown.append(PicturedView(name, picture, box))
    return Pictured(viewed.name, inlined(viewed.image, 2 * VIEW_SIDE), shown)
