"""Which regions of two pictures a backbone takes for the same, ready to be drawn."""

from collections.abc import Sequence

import jax
import numpy as np
from einops import rearrange

from esvit_jax.analyze.pictures import MatchedPair, Picture, to_picture
from esvit_jax.checkpoint import LoadedModel
from esvit_jax.errors import RunError
from esvit_jax.evaluate.correspondence import (
    COUNTED_PAIRS,
    correspond,
    mirrored_pairs,
)


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
