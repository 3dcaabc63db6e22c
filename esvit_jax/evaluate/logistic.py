"""Logistic regression on frozen features: L-BFGS on the whole split, read in blocks.

Several heads, one for each strength of ℓ2, learn side by side: a pass over the data evaluates the
loss and the gradient of all of them, each at its own next point, so that the data is read once for
all. optax gives the L-BFGS directions. Its line search evaluates the loss inside of one compiled
program, where data cannot stream from the host, so the search for a step length is here: bisection
to the weak Wolfe conditions (Lewis and Overton 2013, "Nonsmooth optimization via quasi-Newton
methods", section 2.2), one state of a few numbers a head.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from esvit_jax import parallel
from esvit_jax.errors import UserError
from esvit_jax.evaluate.blocks import Block, Blocks, summarize

# Blocks stay on the devices if all of them are smaller than this.
RESIDENT_BYTES = 2**30
# Past gradients an L-BFGS direction is made of.
MEMORY = 10
# Wolfe conditions: the share of the promised decrease to reach, and of the slope to lose.
DECREASE, CURVATURE = 1e-4, 0.9
# What rounding makes of a loss in float32, as a share of it; and steps tried along a direction.
ROUNDING, TRIES = 1e-6, 30


class Logistic(NamedTuple):
    """m linear heads on standardised features: softmax, or a sigmoid a class.

    Attributes:
      l2: f32[m], the strength of each.
      weights: f32[m, d, c], of standardised features.
      bias: f32[m, c].
      mean: f32[d], subtracted from a feature,
      deviation: f32[d], by which it is then divided.
      loss: f32[m], mean over images of the loss that was minimised, ℓ2 included.
      gradient: f32[m], the largest component of its gradient by biases and by weights times
        √(1 + l2); above the tolerance where a head has not converged.
      iterations: int32[m], L-BFGS steps of each head.
      passes: over the data.
    """

    l2: np.ndarray
    weights: np.ndarray
    bias: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray
    loss: np.ndarray
    gradient: np.ndarray
    iterations: np.ndarray
    passes: int

    def scores(self, features: Float[np.ndarray, "b d"]) -> Float[np.ndarray, "m b c"]:
        """The logits of each head."""
        point = {"weights": self.weights, "bias": self.bias}
        return np.asarray(_logits(point, self.mean, self.deviation, features))


def fit_logistic(
    blocks: Blocks,
    l2: Any,
    num_classes: int,
    *,
    multilabel: bool = False,
    tolerance: float = 1e-5,
    max_iterations: int = 300,
) -> Logistic:
    """Minimises mean loss + l2 / 2 · |weights|² for each l2; biases are free.

    Features are standardised first: each gets mean 0 and deviation 1 over this split. The loss is
    the cross-entropy of a softmax, or with `multilabel` the sum over classes of that of a sigmoid;
    scikit-learn's `C` is 1 / (n · l2). Float32, with matrix products in full precision. Rows of a
    block are spread over all devices.

    Memory on the devices: one block (all of them while they come to less than `RESIDENT_BYTES`),
    its [m, b, c] logits, and for each head some 25 times its d · c weights.

    Args:
      blocks: of the training split; targets are classes int[b] from 0, or with `multilabel`
        int[b, c] of 1, 0 and -1 (does not count).
      l2: numbers above 0, one a head.
      num_classes: c.
      multilabel: an image may have several classes.
      tolerance: of the largest component of the gradient, at which a head is done.
      max_iterations: L-BFGS steps a head, after which it is done, too.

    Raises:
      UserError: an l2 is not positive; no images, features that are not finite, blocks that can be
        read only once; a class that is negative or not below `num_classes`; one class.
    """
    l2 = np.atleast_1d(np.asarray(l2, np.float32))
    if not (l2.size and np.isfinite(l2).all() and (l2 > 0).all()):
        raise UserError("it must be numbers above 0", argument="l2", value=l2.tolist())
    if num_classes < 2 and not multilabel:
        raise UserError(
            "with one class there is nothing to learn", argument="num_classes", value=num_classes
        )
    summary = summarize(blocks, "blocks")
    mean, deviation = (x.astype(np.float32) for x in (summary.mean, summary.deviation))
    sums = _Sums(blocks, summary.rows, summary.largest, mean, deviation, num_classes, multilabel)

    shape = (len(l2), len(mean), num_classes)
    zeros = {"weights": np.zeros(shape, np.float32), "bias": np.zeros(shape[::2], np.float32)}
    strengths, point = parallel.replicate(jax.tree.map(jnp.asarray, (l2, zeros)), "shard_map")
    # A point has weights times √(1 + l2), which makes strong ℓ2 as round as weak.
    heads = _start(point, *_with_decay(strengths, point, *sums.at(point)))
    while True:
        norm, iterations, tries = map(
            np.asarray, (heads.gradient_norm, heads.iterations, heads.tries)
        )
        busy = (norm > tolerance) & (iterations < max_iterations) & (tries < TRIES)
        if not busy.any():
            break
        trial = _trial(heads)
        value, gradient = _with_decay(strengths, trial, *sums.at(_layers(strengths, trial)))
        falls, arrives = _judge(heads, value, gradient)
        heads = _advance(heads, trial, value, gradient, falls, arrives, busy)
    found = jax.tree.map(np.asarray, heads._replace(point=_layers(strengths, heads.point)))
    return Logistic(
        l2, found.point["weights"], found.point["bias"], mean, deviation,
        found.value, found.gradient_norm, found.iterations, sums.passes,
    )  # fmt: skip


class _Sums:
    """Mean losses and their gradients over a split, block by block."""

    def __init__(
        self,
        blocks: Blocks,
        rows: int,
        largest: int,
        mean: np.ndarray,
        deviation: np.ndarray,
        num_classes: int,
        multilabel: bool,
    ):
        self._rows, self._num_classes, self._multilabel = rows, num_classes, multilabel
        self._standard = mean, deviation
        self._size = -(-largest // jax.device_count()) * jax.device_count()
        small = rows * mean.nbytes < RESIDENT_BYTES
        self._blocks = blocks
        self._resident = [self._place(block) for block in blocks] if small else None
        self.passes = 0

    def at(self, point: PyTree) -> tuple[Float[np.ndarray, " m"], PyTree]:
        """Mean loss and gradient of each head."""
        gradient = jax.tree.map(jnp.zeros_like, point)
        losses = []
        for block in self._resident or map(self._place, self._blocks):
            loss, gradient = _add(
                gradient, point, *self._standard, *block, multilabel=self._multilabel
            )
            losses.append(loss)
        self.passes += 1
        # Of many blocks, float32 would lose what the last steps gain.
        loss = np.sum([np.asarray(x, np.float64) for x in losses], axis=0) / self._rows
        scale = np.float32(1 / self._rows)
        return loss.astype(np.float32), jax.tree.map(lambda x: x * scale, gradient)

    def _place(self, block: Block) -> tuple[Array, Array]:
        """A block on the devices, padded with rows that do not count (-1)."""
        features, targets = block
        if not self._multilabel:
            self._check(targets)
        missing = self._size - len(features)
        padded = [
            np.pad(x.astype(kind), [(0, missing), *[(0, 0)] * (x.ndim - 1)], constant_values=fill)
            for x, kind, fill in ((features, np.float32, 0), (targets, np.int32, -1))
        ]
        return parallel.spread_rows(padded[0]), parallel.spread_rows(padded[1])

    def _check(self, targets: np.ndarray) -> None:
        if unlabelled := int(np.sum(targets < 0)):
            raise UserError(f"blocks: {unlabelled} of {len(targets)} images have no label (-1)")
        if targets.max() >= self._num_classes:
            raise UserError(
                f"it must be at least {targets.max() + 1}, as there is such a label",
                argument="num_classes", value=self._num_classes,
            )  # fmt: skip


@jax.jit
@jax.default_matmul_precision("highest")
def _logits(
    point: PyTree,
    mean: Float[Array, " d"],
    deviation: Float[Array, " d"],
    features: Float[Array, "b d"],
) -> Float[Array, "m b c"]:
    standard = (features - mean) / deviation
    logits = jnp.einsum("b d, m d c -> m b c", standard, point["weights"])
    return logits + point["bias"][:, None]


@partial(jax.jit, static_argnames="multilabel", donate_argnums=0)
@jax.default_matmul_precision("highest")
def _add(
    gradient: PyTree,
    point: PyTree,
    mean: Float[Array, " d"],
    deviation: Float[Array, " d"],
    features: Float[Array, "b d"],
    targets: Array,
    *,
    multilabel: bool,
) -> tuple[Float[Array, " m"], PyTree]:
    """The losses of a block, and the gradient with the block's added."""
    counts = targets >= 0
    known = jnp.where(counts, targets, 0)

    def losses(point):
        logits = _logits(point, mean, deviation, features)
        if multilabel:
            loss = optax.sigmoid_binary_cross_entropy(logits, known.astype(jnp.float32))
        else:
            everywhere = jnp.broadcast_to(known, logits.shape[:2])
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, everywhere)
        losses = jnp.where(counts, loss, 0).reshape(len(loss), -1).sum(axis=1)
        return losses.sum(), losses

    own, losses_of_block = jax.grad(losses, has_aux=True)(point)
    result = losses_of_block, jax.tree.map(jnp.add, gradient, own)
    return jax.lax.with_sharding_constraint(result, parallel.replicated_sharding())


class _Heads(NamedTuple):
    """Where each head is, and the line along which it looks for its next point."""

    point: PyTree
    value: Array
    gradient_norm: Array
    iterations: Array
    memory: PyTree  # optax's
    direction: PyTree
    slope: Array  # of the value along the direction, negative
    step: Array  # to try
    low: Array  # a step that is too short, and
    high: Array  # one that is too long, or inf
    tries: Array


_OPTIMIZER = optax.scale_by_lbfgs(MEMORY)


@jax.jit
def _layers(l2: Array, points: PyTree) -> PyTree:
    """The weights and biases of all heads."""
    return points | {"weights": points["weights"] / jnp.sqrt(1 + l2)[:, None, None]}


@jax.jit
@jax.vmap
def _with_decay(l2: Array, point: PyTree, value: Array, gradient: PyTree) -> tuple[Array, PyTree]:
    """The loss with ℓ2 at each head's point, from that of its weights; and the gradient there."""
    scale = jnp.sqrt(1 + l2)
    weights = point["weights"] / scale
    decayed = gradient | {"weights": (gradient["weights"] + l2 * weights) / scale}
    return value + l2 / 2 * jnp.sum(weights**2), decayed


def _arrived(
    memory: PyTree, iterations: Array, point: PyTree, value: Array, gradient: PyTree
) -> _Heads:
    """At a new point, with a direction from there."""
    updates, memory = _OPTIMIZER.update(gradient, memory, point)
    direction = jax.tree.map(jnp.negative, updates)
    norm = jnp.max(jnp.stack([jnp.max(jnp.abs(x)) for x in jax.tree.leaves(gradient)]))
    slope = jnp.asarray(optax.tree.vdot(direction, gradient))
    return _Heads(
        point, value, norm, iterations, memory, direction, slope, step=jnp.ones_like(value),
        low=jnp.zeros_like(value), high=jnp.full_like(value, jnp.inf),
        tries=jnp.zeros_like(iterations),
    )  # fmt: skip


@jax.jit
@jax.default_matmul_precision("highest")
def _start(point: PyTree, value: Array, gradient: PyTree) -> _Heads:
    def start(point, value, gradient):
        return _arrived(_OPTIMIZER.init(point), jnp.zeros((), jnp.int32), point, value, gradient)

    return jax.vmap(start)(point, value, gradient)


@jax.jit
def _trial(heads: _Heads) -> PyTree:
    def trial(head):
        return jax.tree.map(lambda x, d: x + head.step * d, head.point, head.direction)

    return jax.vmap(trial)(heads)


@jax.jit
@jax.default_matmul_precision("highest")
def _judge(heads: _Heads, value: Array, gradient: PyTree) -> tuple[Array, Array]:
    """Whether the step of each head is short enough, and whether it is also long enough.

    A program of its own. As part of `_advance` a verdict may be computed again in each place that
    reads it, and rounded otherwise: a head then arrives by half, and never ends.
    """

    def judge(head, value, gradient):
        slope = optax.tree.vdot(head.direction, gradient)
        # Close to the end, values differ by rounding only, and the slope has to tell (Hager and
        # Zhang 2005, "A new conjugate gradient method", section 3).
        falls = value <= head.value + DECREASE * head.step * head.slope
        level = value <= head.value + ROUNDING * jnp.abs(head.value)
        falls |= level & (slope <= -(1 - 2 * DECREASE) * head.slope)
        return falls, falls & (slope >= CURVATURE * head.slope)

    return jax.vmap(judge)(heads, value, gradient)


@partial(jax.jit, donate_argnums=0)
@jax.default_matmul_precision("highest")
def _advance(
    heads: _Heads,
    trial: PyTree,
    value: Array,
    gradient: PyTree,
    falls: Array,
    arrives: Array,
    busy: Array,
) -> _Heads:
    """Each busy head moves to its trial point, or tries another step next."""

    def advance(head, trial, value, gradient, falls, arrives, busy):
        arrived = _arrived(head.memory, head.iterations + 1, trial, value, gradient)
        low = jnp.where(falls, head.step, head.low)
        high = jnp.where(falls, head.high, head.step)
        stays = head._replace(
            low=low, high=high, tries=head.tries + 1,
            step=jnp.where(jnp.isinf(high), 2 * head.step, (low + high) / 2),
        )  # fmt: skip

        def choose(condition, x, y):
            return jax.tree.map(lambda x, y: jnp.where(condition, x, y), x, y)

        return choose(busy, choose(arrives, arrived, stays), head)

    return jax.vmap(advance)(heads, trial, value, gradient, falls, arrives, busy)
