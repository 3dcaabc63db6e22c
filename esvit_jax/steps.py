"""The training step and the feature step: pure, for one device, collectives over one axis.

`parallel` runs them on all devices. Everything that is not an array is bound beforehand with
`functools.partial`.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from esvit_jax import losses, prototypes
from esvit_jax.models.batch_norm import AXIS, with_statistics
from esvit_jax.models.esvit import EsViT
from esvit_jax.optim import Schedule, teacher_params, with_teacher_params
from esvit_jax.state import ClassifierState, TrainState


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """What a step is told beside its networks and schedules.

    Attributes:
      student_temp: of the student's softmax.
      center_momentum: see `losses.update_center`.
      seed: of views and drop path; an image's depend on seed, step and its place in the global
        batch only, so that they are the same on any number of devices, and in any parts.
      region_weight: see `losses.esvit_loss`.
      accum_steps: parts a device's share is run through in, one after the other.
      prototype_chunk: prototypes held at a time; 0 means all.
      dtype: of the factors of products with prototypes.
    """

    student_temp: float
    center_momentum: float
    seed: int
    region_weight: float = 0.5
    accum_steps: int = 1
    prototype_chunk: int = 0
    dtype: DTypeLike = jnp.float32


def loss_and_gradients(
    params: PyTree,
    teacher_params: PyTree,
    centers: dict[str, Array],
    views: dict[str, Array],
    drop_keys: Array,
    *,
    model: EsViT,
    teacher_temp: Array | float,
    options: StepOptions,
) -> tuple[PyTree, dict[str, Array], dict[str, Array], tuple[Array, dict[str, PyTree]]]:
    """Teacher, student, loss and gradients on one part of the batch.

    Args:
      params, teacher_params: of the student, which gets gradients, and of the teacher.
      centers: {"view": f32[k], "region": f32[k]}.
      views: {"global": f32[2, b, g, g, 3], "local": f32[v, b, l, l, 3]}, v may be 0.
      drop_keys: one an image, of the student's drop path.
      model: the network of both.
      teacher_temp: of the teacher's softmax.
      options: of the step.

    Returns:
      Gradients, scalars, the teacher's mean logits {head: f32[k]}; and its view features f32[b, d]
      with what the batch norms of "student" and "teacher" have seen.
    """
    teacher, teacher_seen = model.forward_training(teacher_params, [views["global"]])

    def loss_of(params):
        stacks = [views["global"], views["local"]] if len(views["local"]) else [views["global"]]
        student, seen = model.forward_training(params, stacks, drop_keys=drop_keys)
        loss, scalars = losses.esvit_loss(
            student=student,
            teacher=teacher,
            centers=centers,
            student_temp=options.student_temp,
            teacher_temp=teacher_temp,
            region_weight=options.region_weight,
            prototype_chunk=options.prototype_chunk,
            dtype=options.dtype,
        )
        return loss, ({"loss": loss} | scalars, seen)

    gradients, (scalars, student_seen) = jax.grad(loss_of, has_aux=True)(params)
    mean_logits = {
        name: prototypes.mean_logits(
            rearrange(head.vectors[0], "... d -> (...) d"), head.prototypes
        )
        for name, head in teacher.heads.items()
    }
    seen = {"student": student_seen, "teacher": teacher_seen}
    return gradients, scalars, mean_logits, (teacher.view_features[0][0], seen)


def train_step(
    state: TrainState,
    batch: dict[str, Array],
    *,
    model: EsViT,
    optimizer: optax.GradientTransformationExtraArgs,
    make_views: Callable[[Array, dict[str, Array]], dict[str, Array]],
    teacher_temp: Schedule,
    options: StepOptions,
) -> tuple[TrainState, dict[str, Array], Array]:
    """One step of EsViT on this device's share of the batch (paper, algorithm 1).

    Args:
      state, batch: replicated, and arrays [b, ...] of this device's images.
      model, optimizer, options: see `EsViT`, `optim.build_optimizer`, `StepOptions`.
      make_views: (keys [b], batch) -> {"global": [2, b, ...], "local": [v, b, ...]}.
      teacher_temp: function of the step.

    Returns:
      The new state, scalars (mean over all devices), and the teacher's view features of the whole
      batch, f32[images, d]. A step that is not finite changes nothing but the two counters.
    """
    keys = step_keys(
        jax.random.fold_in(jax.random.key(options.seed), state.step),
        images=len(jax.tree.leaves(batch)[0]),
    )

    # 1. Views, teacher, student, gradients: in parts, so that one part is in memory at a time.
    def run(part):
        (view_keys, drop_keys), part_batch = part
        return loss_and_gradients(
            state.params,
            state.teacher,
            state.centers,
            make_views(view_keys, part_batch),
            drop_keys,
            model=model,
            teacher_temp=teacher_temp(state.step),
            options=options,
        )

    parts = jax.tree.map(
        lambda x: rearrange(x, "(a b) ... -> a b ...", a=options.accum_steps), (keys, batch)
    )
    gradients, scalars, mean_logits, (features, seen) = mean_over_parts(run, parts)

    # 2. Mean over devices.
    gradients, scalars, mean_logits = jax.lax.pmean((gradients, scalars, mean_logits), AXIS)
    features = rearrange(features, "a b d -> (a b) d")
    features = jax.lax.all_gather(features, AXIS, tiled=True)

    # 3. Clip, optimiser, then the teacher follows the new student; running statistics.
    scalars["gradient_norm"] = optax.tree.norm(gradients)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params, step=state.step)
    params = with_statistics(optax.apply_updates(state.params, updates), seen["student"])
    teacher = with_statistics(teacher_params(opt_state), seen["teacher"])
    opt_state = with_teacher_params(opt_state, teacher)

    # 4. Centers, for the next step's loss.
    centers = {
        head: losses.update_center(
            center=state.centers[head], mean_logits=mean, momentum=options.center_momentum
        )
        for head, mean in mean_logits.items()
    }
    scalars["center_norm"] = jnp.linalg.norm(centers["view"])

    # 5. A step that is not finite is not taken.
    finite = jnp.isfinite(scalars["loss"]) & jnp.isfinite(scalars["gradient_norm"])
    new_state = next_state(state, (params, opt_state, centers), finite)
    scalars |= {"bad_steps": new_state.bad_steps, "skipped_steps": new_state.skipped_steps}
    return new_state, scalars, features


def classifier_step(
    state: ClassifierState,
    batch: dict[str, Array],
    *,
    loss_of: Callable[..., tuple[Array, dict[str, PyTree[Array]]]],
    optimizer: optax.GradientTransformationExtraArgs,
    seed: int,
) -> tuple[ClassifierState, dict[str, PyTree[Array]]]:
    """One step of training on labels, on this device's share of the batch.

    Args:
      state, batch: replicated, and arrays [b, ...] of this device's images.
      loss_of: (params, frozen, batch, two keys [b] an image) -> what is made small, and scalars.
      optimizer: of `state.params`; its `update` is given the step.
      seed: of the keys, which depend on seed, step and an image's place in the global batch only.

    Returns:
      The new state, and the scalars (mean over all devices).
    """
    keys = step_keys(
        jax.random.fold_in(jax.random.key(seed), state.step), images=len(batch["label"])
    )
    gradients, scalars = jax.grad(loss_of, has_aux=True)(state.params, state.frozen, batch, keys)
    gradients, scalars = jax.lax.pmean((gradients, scalars), AXIS)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params, step=state.step)
    params: PyTree = optax.apply_updates(state.params, updates)
    return ClassifierState(state.step + 1, params, opt_state, state.frozen), scalars


def step_keys(key: Array, *, images: int) -> tuple[Array, Array]:
    """The keys of a step for this device's images: of their views, and of their drop path.

    An image's keys depend on its place in the global batch alone.
    """
    view_key, drop_key = jax.random.split(key)
    places = jax.lax.axis_index(AXIS) * images + jnp.arange(images)
    keys_of = jax.vmap(jax.random.fold_in, (None, 0))
    return keys_of(view_key, places), keys_of(drop_key, places)


def next_state(state: TrainState, new: PyTree, taken: Array) -> TrainState:
    """The state after a step that was taken, or that only counts.

    Args:
      state: before the step.
      new: params, optimiser state and centers after it.
      taken: bool; whether they take the place of the old ones.
    """
    old = (state.params, state.opt_state, state.centers)
    params, opt_state, centers = jax.tree.map(lambda n, o: jnp.where(taken, n, o), new, old)
    return TrainState(
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        centers=centers,
        bad_steps=jnp.where(taken, 0, state.bad_steps + 1),
        skipped_steps=state.skipped_steps + jnp.where(taken, 0, 1),
    )


def mean_over_parts(
    run: Callable[[PyTree], tuple[PyTree, ...]], parts: PyTree
) -> tuple[PyTree, ...]:
    """Means of run(part) over the leading axis of `parts`; of the last result, all parts."""
    count = len(jax.tree.leaves(parts)[0])
    first = jax.tree.map(lambda x: x[0], parts)
    if count == 1:
        *results, kept = run(first)
        return *results, jax.tree.map(lambda x: x[None], kept)

    def body(totals, part):
        *results, kept = run(part)
        return jax.tree.map(jnp.add, totals, results), kept

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(run, first))
    totals, kept = jax.lax.scan(body, list(zeros[:-1]), parts)
    return *jax.tree.map(lambda x: x / count, totals), kept


def feature_step(
    params: PyTree,
    batch: dict[str, Array],
    *,
    extract: Callable[[PyTree, dict[str, Array]], PyTree[Array]],
) -> dict[str, PyTree[Array]]:
    """What `extract(params, batch)` returns for all devices' images, with their labels and mask.

    Args:
      params: replicated.
      batch: this device's images, with "label" and "mask".
      extract: (params, batch) -> arrays [b, ...].

    Returns:
      {"features": what it returned, "label": int32[images], "mask": bool[images]}, gathered.
    """
    result = {"features": extract(params, batch), "label": batch["label"], "mask": batch["mask"]}
    return jax.lax.all_gather(result, AXIS, tiled=True)
