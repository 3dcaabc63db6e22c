"""Linear heads that are trained all at once: one for each learning rate, decay and features.

Heads on the same features are the rows of one array, and each is trained as if it were alone: they
share images, features and their start, and differ in learning rate and decay.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from esvit_jax.errors import UserError
from esvit_jax.evaluate.accuracy import label_ranks
from esvit_jax.models import Backbone
from esvit_jax.optim import cosine_schedule, scale_by_schedule

# For 256 images a step. The published numbers are of 0.001 and 0.003 (Swin) and 0.01 (ResNet-50);
# small data sets, of which 100 epochs are few steps, ask for up to a thousand times as much.
LEARNING_RATES = (3e-4, 0.001, 0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
WEIGHT_DECAYS = (0.0, 1e-4)
BLOCKS = (1, 4)
MOMENTUM, INIT_STD = 0.9, 0.01

# {blocks: {"kernel": f32[h, d, c], "bias": f32[h, c]}}; keys are text, as a checkpoint's are.
Heads = dict[str, dict[str, Array]]


class Head(NamedTuple):
    """What tells a head from the others.

    Attributes:
      blocks: last blocks whose mean maps it sees, side by side.
      learning_rate: at the start, for 256 images a step.
      weight_decay: of its kernel.
    """

    blocks: int
    learning_rate: float
    weight_decay: float

    def __str__(self) -> str:
        return (
            f"last {self.blocks} block{'s' if self.blocks > 1 else ''}, learning rate "
            f"{self.learning_rate:g}, decay {self.weight_decay:g}"
        )


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The heads that are tried: all combinations.

    Attributes:
      blocks, learning_rates, weight_decays: see `Head`.
    """

    blocks: tuple[int, ...] = BLOCKS
    learning_rates: tuple[float, ...] = LEARNING_RATES
    weight_decays: tuple[float, ...] = WEIGHT_DECAYS

    def heads(self, blocks: int) -> list[Head]:
        """Those on so many blocks, as they follow each other in the arrays."""
        pairs = itertools.product(self.weight_decays, self.learning_rates)
        return [Head(blocks, rate, decay) for decay, rate in pairs]

    def check(self, depth: int) -> None:
        """Refuses what cannot be, for a backbone of so many blocks.

        Raises:
          UserError: names the field.
        """
        for name in ("blocks", "learning_rates", "weight_decays"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise UserError("it must be some numbers, none twice", argument=name, value=values)
        if not all(1 <= blocks <= depth for blocks in self.blocks):
            raise UserError(
                f"the network has {depth} blocks; numbers from 1 to {depth} will do",
                argument="blocks", value=self.blocks,
            )  # fmt: skip
        if not all(0 < rate < math.inf for rate in self.learning_rates):
            raise UserError(
                "they must be more than 0", argument="learning_rates", value=self.learning_rates
            )
        if not all(0 <= decay < math.inf for decay in self.weight_decays):
            raise UserError(
                "they must be at least 0", argument="weight_decays", value=self.weight_decays
            )


def block_features(
    backbone: Backbone, params: PyTree, images: Float[Array, "b h w 3"], sweep: Sweep
) -> dict[str, Float[Array, "b d"]]:
    """What the heads see: the mean maps of the last blocks, side by side, by their number."""
    means = backbone.forward(params, images).block_means
    return {str(n): jnp.concatenate(means[-n:], axis=-1) for n in sweep.blocks}


def init_heads(
    key: jax.Array, num_features: Mapping[str, int], sweep: Sweep, num_classes: int
) -> Heads:
    """Kernels N(0, 0.01), the same for all heads on the same features; biases 0."""
    heads = {}
    for n, d in num_features.items():
        count = len(sweep.heads(int(n)))
        kernel = INIT_STD * jax.random.normal(jax.random.fold_in(key, int(n)), (d, num_classes))
        heads[n] = {
            "kernel": jnp.tile(kernel, (count, 1, 1)),
            "bias": jnp.zeros((count, num_classes)),
        }
    return heads


def head_logits(head: dict[str, Array], features: Float[Array, "b d"]) -> Float[Array, "b c"]:
    """Of one head, in float32 whatever the devices prefer."""
    product = jnp.matmul(features, head["kernel"], precision=jax.lax.Precision.HIGHEST)
    return product + head["bias"]


def head_losses(
    heads: Heads, features: Mapping[str, Float[Array, "b d"]], labels: Int[Array, " b"]
) -> dict[str, Float[Array, " h"]]:
    """The mean cross-entropy of each head."""

    def loss(head, x):
        logits = head_logits(head, x)
        # Its gradient with labels as numbers is a scatter, which XLA is slow to compile.
        wanted = jax.nn.one_hot(labels, logits.shape[1])
        return jnp.mean(optax.softmax_cross_entropy(logits, wanted))

    return {n: jax.vmap(loss, (0, None))(heads[n], features[n]) for n in heads}


def head_ranks(
    heads: Heads, features: Mapping[str, Float[Array, "b d"]], labels: Int[Array, " b"]
) -> dict[str, Int[Array, "b h"]]:
    """The `label_ranks` of each head."""

    def ranks(head, x):
        return label_ranks(head_logits(head, x), labels)

    return {n: jax.vmap(ranks, (0, None), out_axes=1)(heads[n], features[n]) for n in heads}


def sweep_optimizer(
    sweep: Sweep, batch_size: int, total_steps: int
) -> optax.GradientTransformationExtraArgs:
    """SGD with momentum 0.9 for {"head": `Heads`}, each head with its own rate and decay.

    The rate of a head falls from learning_rate · batch_size / 256 to 0 in a cosine over all steps
    (the public code lowers it once an epoch). Decay is added to the gradients of kernels.
    """
    rates, decays = {}, {}
    for n in map(str, sweep.blocks):
        heads = sweep.heads(int(n))
        rates[n] = np.array([x.learning_rate * batch_size / 256 for x in heads], np.float32)
        decays[n] = np.array([x.weight_decay for x in heads], np.float32)

    def decay(updates: PyTree, params: PyTree) -> PyTree:
        def add(n: str, name: str, gradient: Array) -> Array:
            if name == "bias":
                return gradient
            return gradient + decays[n][:, None, None] * params["head"][n][name]

        return _map_heads(add, updates)

    def scale(updates: PyTree, _: PyTree) -> PyTree:
        return _map_heads(lambda n, name, x: rates[n].reshape(-1, *[1] * (x.ndim - 1)) * x, updates)

    return optax.chain(
        optax.stateless(decay),
        optax.trace(MOMENTUM),
        optax.stateless(scale),
        scale_by_schedule(cosine_schedule(1.0, 0.0, total_steps), sign=-1.0),
    )


def _map_heads(function, updates: PyTree) -> PyTree:
    """function(blocks, "kernel" or "bias", array) of all arrays of {"head": Heads}."""
    return {
        "head": {
            n: {name: function(n, name, x) for name, x in head.items()}
            for n, head in updates["head"].items()
        }
    }
