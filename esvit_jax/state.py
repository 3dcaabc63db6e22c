"""What a step reads and writes, and as which two items a checkpoint keeps it."""

from collections.abc import Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import PyTree

from esvit_jax.models.esvit import EsViT
from esvit_jax.models.layers import Leaf
from esvit_jax.optim import TeacherState, teacher_params, with_teacher_params


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

    def to_items(self) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
        """The items "model" and "training" of a checkpoint."""
        *moments, teacher = self.opt_state
        model = {"student": self.params, "teacher": teacher.params, "centers": self.centers}
        counts = {"step": self.step, "bad": self.bad_steps, "skipped": self.skipped_steps}
        return model, {"counts": counts, "opt_state": moments}

    def with_items(self, model: dict[str, PyTree], training: dict[str, PyTree]) -> "TrainState":
        """The state whose `to_items` these are."""
        return TrainState(
            step=training["counts"]["step"],
            params=model["student"],
            opt_state=(*training["opt_state"], TeacherState(model["teacher"])),
            centers=model["centers"],
            bad_steps=training["counts"]["bad"],
            skipped_steps=training["counts"]["skipped"],
        )


@struct.dataclass
class ClassifierState:
    """Everything that training on labels changes: a head, and of fine-tuning its backbone.

    Attributes:
      step: int32, updates made, and the position in the data.
      params: what is trained, {"head"} or {"backbone", "head"}.
      opt_state: of its optimiser.
      frozen: the other of the two, if any.
    """

    step: Leaf
    params: dict[str, PyTree]
    opt_state: PyTree
    frozen: dict[str, PyTree]

    def to_items(self) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
        """The items of a checkpoint; the first is that of a converted backbone."""
        both = self.params | self.frozen
        model = {"teacher": {"backbone": both["backbone"]}}
        return model, {"step": self.step, "head": both["head"], "opt_state": self.opt_state}

    def with_items(
        self, model: dict[str, PyTree], training: dict[str, PyTree]
    ) -> "ClassifierState":
        """The state whose `to_items` these are, with the same of them trained as here."""
        both = {"backbone": model["teacher"]["backbone"], "head": training["head"]}
        return ClassifierState(
            step=training["step"],
            params={name: both[name] for name in self.params},
            opt_state=training["opt_state"],
            frozen={name: both[name] for name in self.frozen},
        )


State = TypeVar("State", TrainState, ClassifierState)


def init_params(model: EsViT, key: jax.Array) -> PyTree:
    """Random params, deterministic in `key`."""
    size = model.backbone.image_size
    return model.init(key, [jnp.zeros((2, 1, size, size, 3))])["params"]


def zero_centers(model: EsViT) -> dict[str, jax.Array]:
    """The centers before the first step."""
    heads = ("view", "region") if model.region else ("view",)
    return {head: jnp.zeros(model.num_prototypes) for head in heads}


def create_state(
    model: EsViT,
    optimizer: optax.GradientTransformation,
    params: PyTree,
    teacher: PyTree | None = None,
    centers: Mapping[str, jax.Array] | None = None,
    step: int = 0,
) -> TrainState:
    """The state before the first step.

    Args:
      model, optimizer: of the run.
      params: of the student.
      teacher: its params; None are the student's.
      centers: those that are not new; None if all are.
      step: that is the first.
    """
    opt_state = optimizer.init(params)
    if teacher is not None:
        # Copies, as a donated buffer must be in the state once.
        opt_state = with_teacher_params(opt_state, jax.tree.map(jnp.copy, teacher))
    return TrainState(
        step=jnp.full((), step, jnp.int32),
        params=params,
        opt_state=opt_state,
        centers=zero_centers(model) | dict(centers or {}),
        bad_steps=jnp.zeros((), jnp.int32),
        skipped_steps=jnp.zeros((), jnp.int32),
    )
