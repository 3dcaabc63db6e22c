"""Which regions of two pictures a backbone takes for the same, ready to be drawn."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from einops import rearrange

from esvit_jax.analyze.pictures import MatchedPair, Picture, short_name, to_picture
from esvit_jax.checkpoint import LoadedModel
from esvit_jax.data.look import first_images
from esvit_jax.data.sources import Source
from esvit_jax.errors import RunError, UserError
from esvit_jax.evaluate.correspondence import (
    COUNTED_PAIRS,
    correspond,
    mirrored_pairs,
)
from esvit_jax.interop.load import names_of, preprocessor, read_canvases


def matches_in_split(
    loaded: LoadedModel, source: Source, count: int, *, key: str | None = None, seed: int = 0
) -> list[MatchedPair]:
    """The surest matches of the first images of a split with their mirror images.

    Args:
      loaded: the network.
      source: of the images.
      count: of images; fewer where there are no more that can be read.
      key, seed: see `mirrored_matches`.

    Raises:
      RunError: features are not finite.
    """
    data = loaded.config.data
    ids, canvases = first_images(
        source, count, canvas_size=data.canvas_size, num_threads=data.num_threads
    )
    if not ids:
        return []
    titles = list(map(short_name, ids))
    return mirrored_matches(loaded, canvases, key=key, seed=seed, titles=titles)


def matches_in_images(
    loaded: LoadedModel, images: Sequence[Any], *, key: str | None = None, seed: int = 0
) -> list[MatchedPair]:
    """The surest matches of one image with its mirror image, or of two with each other.

    Raises:
      UserError: other than one or two, or one is no image.
      RunError: features are not finite.
    """
    if not 1 <= len(images) <= 2:
        raise UserError("it takes one or two files or arrays", argument="images", value=images)
    names = names_of(images)
    if len(images) == 1:
        canvases = read_canvases(images, loaded.config.data.canvas_size)
        return mirrored_matches(loaded, canvases, key=key, seed=seed, titles=names)
    first, second = preprocessor(loaded.config)(images)
    return [matches_of_two(loaded, first, second, key=key, title=" and ".join(names))]


def mirrored_matches(
    loaded: LoadedModel,
    canvases: dict[str, np.ndarray],
    *,
    key: str | None = None,
    seed: int = 0,
    titles: Sequence[str],
) -> list[MatchedPair]:
    """The surest matches of images with their mirror images, hits and misses.

    Args:
      loaded: the network.
      canvases: "canvas" uint8[b, s, s, 3] and "size" int[b, 2].
      key: "teacher" or "student"; None as in `LoadedModel.network`.
      seed: of the colours of the mirrored views.
      titles: of each image; what share of its pairs hit comes after it.

    Raises:
      RunError: features are not finite.
    """
    stride = loaded.model.backbone.stages[-1].stride
    views = jax.jit(lambda batch: mirrored_pairs(batch, loaded.config, seed, stride))(canvases)
    found = _match(loaded, key, *views)
    pairs = []
    for pair, title in zip(found, titles, strict=True):
        width = pair.widths[0]
        row, column = np.divmod(pair.start, width)
        hit = pair.end == row * width + width - 1 - column
        words = f"{title}: {hit.sum()} of {len(hit)} hit"
        pairs.append(pair._replace(hit=hit, title=words))
    return pairs


def matches_of_two(
    loaded: LoadedModel,
    first: jax.Array,
    second: jax.Array,
    *,
    key: str | None = None,
    title: str,
) -> MatchedPair:
    """The surest matches between two images, f32[s, s, 3] as a backbone takes them.

    Raises:
      RunError: features are not finite.
    """
    (pair,) = _match(loaded, key, first[None], second[None])
    return pair._replace(title=title)


def _match(
    loaded: LoadedModel, key: str | None, first: jax.Array, second: jax.Array
) -> list[MatchedPair]:
    backbone, params = loaded.model.backbone, loaded.network(key)["backbone"]
    forward = jax.jit(lambda images: backbone.forward(params, images).region_features)
    maps = forward(first), forward(second)
    if not all(np.isfinite(x).all() for x in maps):
        raise RunError("features are not finite; the network diverged, take an earlier checkpoint")
    widths, stride = (maps[0].shape[2], maps[1].shape[2]), backbone.stages[-1].stride
    found = correspond(*(rearrange(x, "b h w d -> b (h w) d") for x in maps))

    def picture(view: jax.Array) -> Picture:
        views = loaded.config.views
        return to_picture(np.asarray(view), views.mean, views.std)

    pairs = []
    for i in range(len(first)):
        start = np.asarray(found.top[i])[:COUNTED_PAIRS]
        end = np.asarray(found.match[i])[start]
        both = picture(first[i]), picture(second[i])
        pairs.append(MatchedPair(*both, widths, stride, start, end, None, ""))
    return pairs
