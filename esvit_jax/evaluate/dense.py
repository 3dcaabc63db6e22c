"""Dense probes: a linear layer on frozen region features says what each pixel is, or how far.

The layer's map is scaled up bilinearly to the pixels that its regions cover, and judged there.
Where a map ends before the view does, its last row or column goes on.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree, Shaped
from rich.console import Console
from rich.table import Table

from esvit_jax import parallel
from esvit_jax.checkpoint import LoadedModel
from esvit_jax.data.dense import DenseTargets, center_of
from esvit_jax.errors import RunError, UserError
from esvit_jax.evaluate.features import FeatureExtractor, evaluation_images
from esvit_jax.evaluate.metrics import confusion, mean_iou
from esvit_jax.evaluate.result import Result
from esvit_jax.optim import scale_by_adam
from esvit_jax.runlog.alive import signs_of_life

LEARNING_RATES = (1e-4, 1e-3, 1e-2, 1e-1)
EPOCHS, BATCH_SIZE = 20, 16
# One image in so many is held out, to choose the learning rate by.
EVERY = 5


class DenseSplit(NamedTuple):
    """Region features f32[n, h, w, d], and targets [n, s, s] of the pixels of n views.

    Targets are classes int32, -1 where a pixel does not count; or depths float32, 0 where unknown.
    """

    features: np.ndarray
    targets: np.ndarray
    stride: int  # pixels along a side of a region


class DenseProbe(NamedTuple):
    """A layer that was chosen and tested.

    Attributes:
      result: of the test split: {"miou": percent} or {"rmse": …} in the unit of the targets.
      learning_rate: that was chosen.
      held_out: {learning rate: what it reaches on the held-out images}.
      images: that were trained on, held out, and tested.
    """

    result: Result
    learning_rate: float
    held_out: dict[float, float]
    images: tuple[int, int, int]


def dense_split(
    loaded: LoadedModel,
    data: DenseTargets,
    num_classes: int | None,
    *,
    ignore: Sequence[int] = (),
    key: str | None = None,
    console: Console | None = None,
) -> DenseSplit:
    """Region features and targets of a split, in memory.

    Args:
      loaded: the network.
      data: the split.
      num_classes: of masks; None for depths.
      ignore: numbers in masks that are no class.
      key: "teacher" or "student"; see `LoadedModel.network`.
      console: for signs of life; None is standard output.

    Raises:
      UserError: no image can be read; a mask has a number that is neither a class nor ignored.
      RunError: features are not finite.
    """
    config, source = loaded.config, data.source

    def extract(params: PyTree, batch: dict[str, Array]) -> Array:
        return loaded.model.backbone.forward(
            params, evaluation_images(config, batch)
        ).region_features

    extractor = FeatureExtractor(extract, config, [source])
    params = parallel.replicate(loaded.network(key)["backbone"], config.parallel)
    size = config.evaluate.size or config.views.global_size
    features, targets = [], []
    with signs_of_life(extractor.describe, console or Console()):
        for batch in extractor.batches(params, source):
            features.append(batch["features"])
            for name in batch["id"]:
                target = center_of(data.read(name), size, config.evaluate.crop)
                targets.append(_checked(target, num_classes, ignore, f"{source.name} {name}"))
    if not targets:
        raise UserError(f"{source.name} {source.split}: none of {len(source)} images can be read")
    stride = loaded.model.backbone.stages[-1].stride
    found = DenseSplit(np.concatenate(features), np.stack(targets), stride)
    if not np.isfinite(found.features).all():
        raise RunError(
            f"{source.name} {source.split}: features are not finite; the network diverged, "
            "evaluate an earlier checkpoint"
        )
    return found


def _checked(
    target: np.ndarray, num_classes: int | None, ignore: Sequence[int], where: str
) -> np.ndarray:
    if num_classes is None:
        depth = target.astype(np.float32)
        return np.where(np.isfinite(depth) & (depth > 0), depth, 0)
    mask = target.astype(np.int32)
    mask = np.where(np.isin(mask, ignore), -1, mask)
    if mask.max() >= num_classes:
        raise UserError(
            f"it must be at least {mask.max() + 1}, or {mask.max()} ignored: {where} has it",
            argument="num_classes", value=num_classes,
        )  # fmt: skip
    return mask


def dense_probe(
    train: DenseSplit,
    test: DenseSplit,
    num_classes: int | None,
    *,
    learning_rates: Sequence[float] = LEARNING_RATES,
    epochs: int = EPOCHS,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    step: int | None = None,
) -> DenseProbe:
    """Trains one layer for each learning rate, side by side, and tests the best.

    Features are standardised over the images that are trained on. Adam, whose learning rate
    falls to 0 as a cosine; of masks the loss is the cross-entropy of a pixel, of depths the
    square of the error. Each fifth image of a shuffled order is held out; on them the layer is
    chosen, and it is not trained again.

    Args:
      train, test: see `dense_split`.
      num_classes: of masks; None for depths.
      learning_rates: that are tried.
      epochs: of training.
      batch_size: images a step.
      seed: of the order of images.
      step: training steps behind the network, for the result.

    Raises:
      UserError: fewer than two images, or no pixel of a split counts.
    """
    if len(train.targets) < 2:
        raise UserError("train: one image to train on and one to choose by are two")
    order = np.random.default_rng(seed).permutation(len(train.targets))
    held, own = order[::EVERY], np.delete(order, np.s_[::EVERY])
    part = DenseSplit(train.features[own], train.targets[own], train.stride)
    scale = _scale_of(part, num_classes)
    layers = _train(part, scale, num_classes, learning_rates, epochs, batch_size, seed)
    chooses = DenseSplit(train.features[held], train.targets[held], train.stride)
    choices = dict(zip(learning_rates, _measure(layers, scale, chooses, num_classes), strict=True))
    best = (max if num_classes else min)(choices, key=lambda rate: choices[rate])
    picked = jax.tree.map(lambda x: x[list(choices).index(best)][None], layers)
    (value,) = _measure(picked, scale, test, num_classes)
    name = "miou" if num_classes else "rmse"
    images = len(own), len(held), len(test.targets)
    return DenseProbe(Result("dense", {name: value}, step=step), best, choices, images)


class _Scale(NamedTuple):
    """What features are standardised by; and depths, by one mean and deviation of them all."""

    mean: np.ndarray  # f32[d]
    deviation: np.ndarray  # f32[d]
    depth_mean: np.float32
    depth_deviation: np.float32


def _scale_of(split: DenseSplit, num_classes: int | None) -> _Scale:
    counts = split.targets >= 0 if num_classes else split.targets > 0
    if not counts.any():
        raise UserError("train: no pixel has a class or a depth")
    known = np.zeros(1) if num_classes else split.targets[counts]
    features = split.features.reshape(-1, split.features.shape[-1])
    deviation = np.maximum(features.std(axis=0, dtype=np.float64), 1e-6)
    return _Scale(
        features.mean(axis=0, dtype=np.float64).astype(np.float32), deviation.astype(np.float32),
        np.float32(known.mean()), np.float32(max(known.std(), 1e-6)),
    )  # fmt: skip


def _train(
    split: DenseSplit,
    scale: _Scale,
    num_classes: int | None,
    learning_rates: Sequence[float],
    epochs: int,
    batch_size: int,
    seed: int,
) -> dict[str, Array]:
    """Layers {"weights": f32[m, d, c], "bias": f32[m, c]}, one for each learning rate."""
    count, d, c = len(split.targets), split.features.shape[-1], num_classes or 1
    batch_size = min(batch_size, count)
    whole = count // batch_size * batch_size  # images of an epoch
    layers = {
        "weights": jnp.zeros((len(learning_rates), d, c)),
        "bias": jnp.zeros((len(learning_rates), c)),
    }
    moments = _ADAM.init(layers)
    rates = np.asarray(learning_rates, np.float32)
    order = np.random.default_rng(seed)
    batches = np.stack([order.permutation(count)[:whole] for _ in range(epochs)])
    batches = batches.reshape(-1, batch_size)
    for step, rows in enumerate(batches):
        now = rates * np.float32(0.5 + 0.5 * np.cos(np.pi * step / len(batches)))
        layers, moments = _update(
            layers, moments, now, scale, split.features[rows], split.targets[rows], split.stride
        )
    return layers


def _measure(
    layers: dict[str, Array], scale: _Scale, split: DenseSplit, num_classes: int | None
) -> list[float]:
    """Of each layer mean IoU in percent, or the root mean square error in the depths' unit."""
    heads = len(layers["bias"])
    matrices = np.zeros((heads, num_classes or 0, num_classes or 0), np.int64)
    squares, pixels = np.zeros(heads), 0
    for start in range(0, len(split.targets), BATCH_SIZE):
        features, targets = (x[start : start + BATCH_SIZE] for x in split[:2])
        maps = np.asarray(_maps(layers, scale, features, targets.shape[1], split.stride))
        if num_classes:
            every = [confusion(x, targets, num_classes) for x in maps.argmax(axis=-1)]
            matrices += np.stack(every)
        else:
            known = targets > 0
            depths = maps[..., 0] * scale.depth_deviation + scale.depth_mean
            errors = np.where(known, depths - targets, 0).astype(np.float64)
            squares += (errors**2).sum(axis=(1, 2, 3))
            pixels += int(known.sum())
    if not (matrices.any() if num_classes else pixels):
        raise UserError("no pixel of the split has a class or a depth")
    if num_classes:
        return [mean_iou(matrix) for matrix in matrices]
    return [float(x) for x in np.sqrt(squares / pixels)]


_ADAM = scale_by_adam(0.9, 0.999, 1e-8)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _maps(
    layers: dict[str, Array],
    scale: _Scale,
    features: Float[Array, "b h w d"],
    size: int,
    stride: int,
) -> Float[Array, "m b s s c"]:
    standard = (features - scale.mean) / scale.deviation
    maps = jnp.einsum(
        "b h w d, m d c -> m b h w c", standard, layers["weights"],
        precision=jax.lax.Precision.HIGHEST,
    )  # fmt: skip
    maps += layers["bias"][:, None, None, None]
    m, b, h, w, c = maps.shape
    covered = jax.image.resize(maps, (m, b, h * stride, w * stride, c), "bilinear")
    missing = [(0, max(0, size - side)) for side in covered.shape[2:4]]
    whole = jnp.pad(covered, [(0, 0), (0, 0), *missing, (0, 0)], "edge")
    return whole[:, :, :size, :size]


@functools.partial(jax.jit, static_argnums=6)
def _update(
    layers: dict[str, Array],
    moments: optax.OptState,
    rates: Float[Array, " m"],
    scale: _Scale,
    features: Float[Array, "b h w d"],
    targets: Shaped[Array, "b s s"],
    stride: int,
) -> tuple[dict[str, Array], optax.OptState]:
    """A step of Adam for all layers."""

    def loss(layers):
        maps = _maps(layers, scale, features, targets.shape[1], stride)
        if jnp.issubdtype(targets.dtype, jnp.integer):
            counts, known = targets >= 0, jnp.maximum(targets, 0)
            losses = optax.softmax_cross_entropy_with_integer_labels(
                maps, jnp.broadcast_to(known, maps.shape[:-1])
            )
        else:
            counts = targets > 0
            losses = (maps[..., 0] - (targets - scale.depth_mean) / scale.depth_deviation) ** 2
        # Layers are apart from each other, so the gradient of the sum is that of each.
        return jnp.sum(losses, where=counts) / jnp.sum(counts).clip(1).astype(jnp.float32)

    updates, moments = _ADAM.update(jax.grad(loss)(layers), moments)
    return jax.tree.map(
        lambda x, u: x - rates[:, *[None] * (x.ndim - 1)] * u, layers, updates
    ), moments


def dense_table(probe: DenseProbe) -> Table:
    """A row for each learning rate: what it reaches on the held-out images, the pick marked."""
    (name,) = probe.result.values
    table = Table("learning rate", f"held out, {name}", title="dense probe")
    for column in table.columns:
        column.justify = "right"
    for rate, value in probe.held_out.items():
        mark = " ←" if rate == probe.learning_rate else ""
        table.add_row(f"{rate:g}", f"{value:.3f}{mark}")
    return table
