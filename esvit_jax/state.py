"""What a step reads and writes."""

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import PyTree

from esvit_jax.models.backbone import Leaf
from esvit_jax.models.esvit import EsViT
from esvit_jax.optim import teacher_params


@struct.dataclass
class TrainState:
    """Everything that training changes; there is no random state (keys come from seed and step).

    Attributes:
      step: int32, updates tried so far, and the position in the data.
      params: the student's.
      opt_state: of `optim.build_optimizer`; its last entry holds the teacher's params.
      centers: {"view": f32[k], "region": f32[k]}, running means of the teacher's logits.
      bad_steps: int32, updates in a row that were skipped because they were not finite.
      skipped_steps: int32, all that were.
    """

    step: Leaf
    params: PyTree
    opt_state: PyTree
    centers: dict[str, Leaf]
    bad_steps: Leaf
    skipped_steps: Leaf

    @property
    def teacher(self) -> PyTree:
        """The teacher's params."""
        return teacher_params(self.opt_state)


def init_params(model: EsViT, key: jax.Array) -> PyTree:
    """Random params, deterministic in `key`."""
    size = model.backbone.image_size
    return model.init(key, [jnp.zeros((2, 1, size, size, 3))])["params"]


def zero_centers(model: EsViT) -> dict[str, jax.Array]:
    """The centers before the first step."""
    heads = ("view", "region") if model.region else ("view",)
    return {head: jnp.zeros(model.num_prototypes) for head in heads}


def create_state(
    model: EsViT, optimizer: optax.GradientTransformation, params: PyTree
) -> TrainState:
    """The state before the first step, student and teacher both at `params`."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        centers=zero_centers(model),
        bad_steps=jnp.zeros((), jnp.int32),
        skipped_steps=jnp.zeros((), jnp.int32),
    )
