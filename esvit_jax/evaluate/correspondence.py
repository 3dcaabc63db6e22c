"""Whether the regions of an image find themselves again in its mirror image.

The paper's test of what the region loss teaches: one view is the image, the other is mirrored,
jittered in colour and grey. Each region of the first looks for the most similar one of the second;
of the pairs that are most sure of it, how many hit the place that is theirs?
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8
from rich.console import Console

from esvit_jax import losses, parallel
from esvit_jax.checkpoint import LoadedModel
from esvit_jax.config import ConfigDict
from esvit_jax.data import augment
from esvit_jax.data.sources import Source
from esvit_jax.errors import RunError, UserError
from esvit_jax.evaluate.features import FeatureExtractor
from esvit_jax.evaluate.result import Result
from esvit_jax.models import Backbone
from esvit_jax.runlog.alive import signs_of_life

# Pairs of an image that are counted, those of largest similarity.
COUNTED_PAIRS = 10
# How often and how far the colours of the second view are changed; see `config.views`.
JITTER_PROBABILITY, FACTORS, HUE = 0.8, (0.4, 0.4, 0.2), 0.1


class Correspondence(NamedTuple):
    """For every region of the first of two views, the one of the second that is most like it.

    Attributes:
      similarity: f32[..., n, m], cosines.
      match: int[..., n] in 0..m-1, the region of largest similarity.
      match_similarity: f32[..., n], that similarity.
      top: int[..., n], the regions of the first view by falling `match_similarity`.
    """

    similarity: Float[Array, "*b n m"]
    match: Int[Array, "*b n"]
    match_similarity: Float[Array, "*b n"]
    top: Int[Array, "*b n"]


def correspond(first: Float[Array, "*b n d"], second: Float[Array, "*b m d"]) -> Correspondence:
    """Matches the regions of two views, by their region features; one way, without a check back."""
    similarity = losses.region_similarity(first, second)
    match_similarity = jnp.max(similarity, axis=-1)
    top = jnp.argsort(match_similarity, axis=-1, descending=True)
    return Correspondence(similarity, jnp.argmax(similarity, axis=-1), match_similarity, top)


class MirrorScore(NamedTuple):
    """How well the surest matches of mirrored views hit.

    Attributes:
      accuracy: f32[...] in 0..1, the share of them that are exactly the mirrored cell.
      distance: f32[...], their mean distance from it, in cells.
      cutoff_similarity: f32[...], that of the first pair that is not counted, or of the last one
        where all are.
    """

    accuracy: Float[Array, "*b"]
    distance: Float[Array, "*b"]
    cutoff_similarity: Float[Array, "*b"]


def score_mirrored(
    found: Correspondence, shape: tuple[int, int], counted: int = COUNTED_PAIRS
) -> MirrorScore:
    """Scores matches where the second view is the first one, mirrored left to right.

    Args:
      found: for maps of regions in row-major order.
      shape: rows and columns of both maps.
      counted: pairs that count, those of largest similarity; no more than there are.
    """
    height, width = shape
    counted = min(counted, height * width)
    top = found.top[..., :counted]
    row, column = jnp.divmod(top, width)
    match = jnp.take_along_axis(found.match, top, axis=-1)
    match_row, match_column = jnp.divmod(match, width)
    down = (match_row - row).astype(jnp.float32)
    right = (match_column - (width - 1 - column)).astype(jnp.float32)
    distance = jnp.hypot(down, right)
    last = found.top[..., min(counted, height * width - 1)]
    cutoff = jnp.take_along_axis(found.match_similarity, last[..., None], axis=-1)[..., 0]
    return MirrorScore(
        accuracy=jnp.mean((distance == 0).astype(jnp.float32), axis=-1),
        distance=jnp.mean(distance, axis=-1),
        cutoff_similarity=cutoff,
    )


def mirrored_pair(
    key: Key[Array, ""],
    canvas: UInt8[Array, "s s 3"],
    size: Int[Array, " 2"],
    config: ConfigDict,
    stride: int,
) -> tuple[Float[Array, "v v 3"], Float[Array, "v v 3"]]:
    """The two views of one image: its centre; and that mirrored, jittered in colour, and grey.

    Args:
      key: of this image; what is drawn depends on it alone.
      canvas: the image in its top-left corner.
      size: true height and width, pixels.
      config: of the run; `evaluate` and `views` say how views are cut and normalised.
      stride: pixels along a side of a region. Views have whole regions only: in the mirror image of
        any other, regions lie elsewhere.
    """
    view_size = config.evaluate.size or config.views.global_size
    view_size = view_size // stride * stride or view_size
    levels = augment.center_crop(augment.to_levels(canvas), size, view_size, config.evaluate.crop)
    u = jax.random.uniform(key, (3 + len(FACTORS),))
    jitter = u[0] < JITTER_PROBABILITY
    strength = np.asarray(FACTORS, np.float32)
    factors = jnp.where(jitter, 1 + (2 * u[3:] - 1) * strength, 1.0)
    hue = jnp.where(jitter, (2 * u[1] - 1) * HUE, 0.0)
    orders = jnp.asarray(augment.ORDERS)
    order = orders[(u[2] * len(orders)).astype(jnp.int32)]
    mirrored = augment.color_jitter(levels[..., ::-1], factors, hue, order)
    mean, std = config.views.mean, config.views.std
    first = augment.normalize(levels, mean, std)
    return first, augment.normalize(augment.to_grayscale(mirrored), mean, std)


def mirrored_pairs(
    batch: dict[str, Array], config: ConfigDict, seed: int, stride: int
) -> tuple[Float[Array, "b v v 3"], Float[Array, "b v v 3"]]:
    """Of a batch of canvases; what is drawn for an image depends on its pixels and the seed."""
    canvas = batch["canvas"]
    places = jnp.arange(canvas[0].size, dtype=jnp.uint32).reshape(canvas.shape[1:])
    # Like a hash: the same pixels in other places give another sum.
    sums = jnp.sum(canvas.astype(jnp.uint32) * (2 * places + 1), axis=(1, 2, 3))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), sums)
    pair = functools.partial(mirrored_pair, config=config, stride=stride)
    return jax.vmap(pair)(keys, canvas, batch["size"])


def correspondence(
    backbone: Backbone, config: ConfigDict, seed: int = 0
) -> Callable[[PyTree, dict[str, Array]], dict[str, Array]]:
    """(the backbone's params, batch) -> the fields of `MirrorScore`, f32[b] each."""

    def extract(params, batch):
        first, second = (
            backbone.forward(params, views).region_features
            for views in mirrored_pairs(batch, config, seed, backbone.stages[-1].stride)
        )
        _, height, width, _ = first.shape
        found = correspond(*(rearrange(x, "b h w d -> b (h w) d") for x in (first, second)))
        return score_mirrored(found, (height, width))._asdict()

    return extract


def evaluate_correspondence(
    loaded: LoadedModel,
    source: Source,
    *,
    key: str | None = None,
    seed: int = 0,
    console: Console | None = None,
) -> tuple[Result, int]:
    """How well the regions of a split's images find themselves in their mirror images.

    Args:
      loaded: the network.
      source: of the images; labels are not looked at.
      key: "teacher" or "student"; None as in `LoadedModel.network`.
      seed: of the colours of the mirrored views.
      console: where signs of life go; None is standard output.

    Returns:
      Means over the images: "accuracy" in percent, "distance" in pixels of the view,
      "distance_cells", "cutoff_similarity" (see `MirrorScore`); and the number of images.

    Raises:
      UserError: no record is an image.
      RunError: features are not finite.
    """
    backbone, config = loaded.model.backbone, loaded.config
    params = parallel.replicate(loaded.network(key)["backbone"], config.parallel)
    extractor = FeatureExtractor(correspondence(backbone, config, seed), config, [source])
    with signs_of_life(extractor.describe, console):
        batches = [batch["features"] for batch in extractor.batches(params, source)]
    scores = {name: np.concatenate([b[name] for b in batches]) for name in MirrorScore._fields}
    count = len(scores["accuracy"])
    if not count:
        raise UserError(f"{source.name} {source.split}: none of {len(source)} records is an image")
    if not np.isfinite(scores["cutoff_similarity"]).all():
        raise RunError(
            f"{source.name} {source.split}: features are not finite; the network diverged, "
            "evaluate an earlier checkpoint"
        )
    mean = {name: float(np.mean(x, dtype=np.float64)) for name, x in scores.items()}
    values = {
        "accuracy": 100 * mean["accuracy"],
        "distance": backbone.stages[-1].stride * mean["distance"],
        "distance_cells": mean["distance"],
        "cutoff_similarity": mean["cutoff_similarity"],
    }
    return Result("correspondence", values, step=loaded.step), count
