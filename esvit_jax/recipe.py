"""What a config describes, built: the network, the optimiser chain, the schedules and the step."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array

from esvit_jax import optim, steps
from esvit_jax.config import ConfigDict, RunNumbers
from esvit_jax.data.augment import augment
from esvit_jax.models import EsViT, create_model
from esvit_jax.optim import Schedule
from esvit_jax.state import TrainState
from esvit_jax.steps import StepOptions

Batch = dict[str, Array]  # {"canvas": uint8[b, s, s, 3], "size": int32[b, 2]}
Views = dict[str, Array]  # {"global": f32[2, b, g, g, 3], "local": f32[v, b, l, l, 3]}


class Recipe(NamedTuple):
    """Everything that one training step is made of, but for the state and the batch.

    Attributes:
      model: the network of student and teacher.
      optimizer: see `optim.build_optimizer`.
      schedules: "learning_rate", "weight_decay", "teacher_momentum" and "teacher_temp".
      make_views: (keys [b], batch) -> views.
      options: of the step.
    """

    model: EsViT
    optimizer: optax.GradientTransformationExtraArgs
    schedules: dict[str, Schedule]
    make_views: Callable[[Array, Batch], Views]
    options: StepOptions

    @property
    def step(self) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array], Array]]:
        """`steps.train_step` for one device, to be run by `parallel.on_all_devices`."""
        return functools.partial(
            steps.train_step,
            model=self.model,
            optimizer=self.optimizer,
            make_views=self.make_views,
            teacher_temp=self.schedules["teacher_temp"],
            options=self.options,
        )


def build(config: ConfigDict, numbers: RunNumbers) -> Recipe:
    """The recipe of a checked config, with the schedules of a run of these numbers."""
    c, n = config.optimizer, numbers
    schedules = {
        "learning_rate": optim.warmup_cosine_schedule(
            n.peak_learning_rate, c.min_learning_rate, n.warmup_steps, n.total_steps
        ),
        "weight_decay": optim.cosine_schedule(c.weight_decay, c.final_weight_decay, n.total_steps),
        "teacher_momentum": optim.cosine_schedule(
            c.teacher_momentum, c.final_teacher_momentum, n.total_steps
        ),
        "teacher_temp": optim.epoch_line_schedule(
            config.loss.warmup_teacher_temp,
            config.loss.teacher_temp,
            config.loss.warmup_teacher_temp_epochs,
            n.steps_per_epoch,
        ),
    }
    optimizer = optim.build_optimizer(
        name=c.name,
        learning_rate=schedules["learning_rate"],
        weight_decay=schedules["weight_decay"],
        teacher_momentum=schedules["teacher_momentum"],
        clip_norm=c.clip_norm,
        freeze_prototypes_steps=n.freeze_prototypes_steps,
        norm_last_layer=config.head.norm_last_layer,
    )
    views = config.views
    return Recipe(
        model=create_model(config),
        optimizer=optimizer,
        schedules=schedules,
        make_views=lambda keys, batch: augment(keys, batch["canvas"], batch["size"], views),
        options=StepOptions(
            student_temp=config.loss.student_temp,
            center_momentum=config.loss.center_momentum,
            seed=config.seed,
            region_weight=config.loss.region_weight,
            accum_steps=config.accum_steps,
            prototype_chunk=config.loss.prototype_chunk,
            dtype=jnp.dtype(config.dtype),
        ),
    )
