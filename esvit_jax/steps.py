"""The training step and the feature step: pure, for one device, collectives over one axis.

`parallel` lifts them to all devices. Everything that is not an array is bound beforehand with
`functools.partial`.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array

from esvit_jax import losses, prototypes
from esvit_jax.models import EsViT, EsViTOutput
from esvit_jax.optim import Schedule
from esvit_jax.state import TrainState

AXIS = "data"


def pair_losses(
    *,
    student: EsViTOutput,
    teacher: EsViTOutput,
    centers: dict[str, Array],
    student_temp: float,
    teacher_temp: Array | float,
    chunk: int,
    dtype: DTypeLike,
) -> tuple[Array, dict[str, Array]]:
    """Loss of a student's views against a teacher's global views: both halves, or the view's.

    Returns:
      The scalar loss, differentiable in `student`, and scalars to watch (entropies as a share of
      ln K, from 0 to 1; the Kullback-Leibler divergence in nats).
    """

    def teacher_side(vectors, head):
        result: Any = prototypes.expected_prototypes(
            rearrange(vectors, "... d -> (...) d"),
            getattr(teacher, f"{head}_prototypes"),
            getattr(student, f"{head}_prototypes"),
            centers[head],
            teacher_temp,
            chunk,
            dtype,
        )
        expected, entropy = result
        return expected.reshape(vectors.shape), entropy.mean()

    def student_side(stacks, head):
        """Log-normalisers of all stacks, in one pass over the prototypes."""
        rows = [rearrange(x, "... d -> (...) d") for x in stacks]
        result: Any = prototypes.log_normalizer(
            jnp.concatenate(rows),
            getattr(student, f"{head}_prototypes"),
            student_temp,
            chunk,
            dtype,
        )
        normalizer, entropy = result
        ends = np.cumsum([len(r) for r in rows])[:-1]
        parts = jnp.split(normalizer, ends)
        return [n.reshape(x.shape[:-1]) for n, x in zip(parts, stacks, strict=True)], entropy.mean()

    log_k = math.log(student.view_prototypes.shape[0])
    expected, teacher_entropy = teacher_side(teacher.view[0], "view")
    normalizers, student_entropy = student_side(student.view, "view")
    view = losses.view_loss(
        student=jnp.concatenate(student.view),
        log_normalizer=jnp.concatenate(normalizers),
        expected=expected,
        student_temp=student_temp,
    )
    scalars = {
        "view_loss": view,
        "teacher_entropy": teacher_entropy / log_k,
        "student_entropy": student_entropy / log_k,
        "teacher_student_kl": view - teacher_entropy,
    }
    if "region" not in centers:
        return view, scalars

    expected, _ = teacher_side(teacher.region[0], "region")
    normalizers, _ = student_side(student.region, "region")
    region = losses.region_loss(
        student=student.region,
        log_normalizer=normalizers,
        student_features=student.features,
        expected=expected,
        teacher_features=teacher.features[0],
        student_temp=student_temp,
    )
    return 0.5 * view + 0.5 * region, scalars | {"region_loss": region}


def loss_and_gradients(
    params: Any,
    teacher_params: Any,
    centers: dict[str, Array],
    views: dict[str, Array],
    drop_key: Array,
    *,
    model: EsViT,
    **loss_fields: Any,
) -> tuple[Any, dict[str, Array], dict[str, Array], Array]:
    """Teacher, student, loss and gradients on one part of the batch.

    Args:
      params, teacher_params: of the student, which gets gradients, and of the teacher.
      centers: {"view": f32[k], "region": f32[k]}.
      views: {"global": f32[2, b, g, g, 3], "local": f32[v, b, l, l, 3]}, v may be 0.
      drop_key: of the student's drop path.
      model: the network of both.
      **loss_fields: see `pair_losses`.

    Returns:
      Gradients, scalars, the teacher's mean logits {head: f32[k]}, and its view features f32[b, d].
    """
    apply: Callable[..., Any] = model.apply
    teacher = apply({"params": teacher_params}, [views["global"]])

    def loss_of(params):
        stacks = [views["global"], views["local"]] if len(views["local"]) else [views["global"]]
        student = apply({"params": params}, stacks, True, rngs={"drop_path": drop_key})
        loss, scalars = pair_losses(
            student=student, teacher=teacher, centers=centers, **loss_fields
        )
        return loss, {"loss": loss} | scalars

    gradients, scalars = jax.grad(loss_of, has_aux=True)(params)
    heads = {"view": teacher.view[0]}
    if "region" in centers:
        heads["region"] = teacher.region[0]
    mean_logits = {
        head: prototypes.mean_logits(
            rearrange(vectors, "... d -> (...) d"), getattr(teacher, f"{head}_prototypes")
        )
        for head, vectors in heads.items()
    }
    return gradients, scalars, mean_logits, teacher.pooled[0][0]


def train_step(
    state: TrainState,
    batch: dict[str, Array],
    *,
    model: EsViT,
    optimizer: optax.GradientTransformationExtraArgs,
    make_views: Callable[[Array, dict[str, Array]], dict[str, Array]],
    teacher_temp: Schedule,
    center_momentum: float,
    seed: int,
    accum_steps: int = 1,
    **loss_fields: Any,
) -> tuple[TrainState, dict[str, Array], Array]:
    """One step of EsViT on this device's share of the batch (paper, algorithm 1).

    Args:
      state: replicated.
      batch: arrays [b, ...]; this device's images.
      model, optimizer: see `EsViT`, `optim.build_optimizer`.
      make_views: (keys [b], batch) -> {"global": [2, b, ...], "local": [v, b, ...]}.
      teacher_temp: function of the step.
      center_momentum: see `losses.update_center`.
      seed: of views and drop path; an image's views depend on seed, step and its place in the
        global batch only, so that they are the same on any number of devices.
      accum_steps: parts the share is run through in, one after the other.
      **loss_fields: see `pair_losses`.

    Returns:
      The new state, scalars (mean over all devices), and view features of the teacher of the
      whole batch, f32[images, d]. A step whose loss or gradient is not finite changes nothing but
      the two counters.
    """
    device = jax.lax.axis_index(AXIS)
    view_key, drop_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step))
    images = len(jax.tree.leaves(batch)[0])
    image_keys = jax.vmap(lambda i: jax.random.fold_in(view_key, i))(
        device * images + jnp.arange(images)
    )
    drop_keys = jax.random.split(jax.random.fold_in(drop_key, device), accum_steps)

    # 1. Views, teacher, student, gradients: in parts, so that one part is in memory at a time.
    def run(part):
        keys, part_batch, key = part
        return loss_and_gradients(
            state.params,
            state.teacher,
            state.centers,
            make_views(keys, part_batch),
            key,
            model=model,
            teacher_temp=teacher_temp(state.step),
            **loss_fields,
        )

    parts = jax.tree.map(
        lambda x: rearrange(x, "(a b) ... -> a b ...", a=accum_steps), (image_keys, batch)
    )
    gradients, scalars, mean_logits, features = mean_over_parts(run, (*parts, drop_keys))

    # 2. Mean over devices.
    gradients, scalars, mean_logits = jax.lax.pmean((gradients, scalars, mean_logits), AXIS)
    features = jax.lax.all_gather(features, AXIS, tiled=True)

    # 3. Clip, optimiser, then the teacher follows the new student.
    scalars["gradient_norm"] = optax.tree.norm(gradients)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params, step=state.step)
    params = optax.apply_updates(state.params, updates)

    # 4. Centers, for the next step's loss.
    centers = {
        head: losses.update_center(
            center=state.centers[head], mean_logits=mean, momentum=center_momentum
        )
        for head, mean in mean_logits.items()
    }
    scalars["center_norm"] = jnp.linalg.norm(centers["view"])

    # 5. A step that is not finite is not taken.
    finite = jnp.isfinite(scalars["loss"]) & jnp.isfinite(scalars["gradient_norm"])
    params, opt_state, centers = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (params, opt_state, centers),
        (state.params, state.opt_state, state.centers),
    )
    bad_steps = jnp.where(finite, 0, state.bad_steps + 1)
    skipped_steps = state.skipped_steps + ~finite
    scalars |= {"bad_steps": bad_steps, "skipped_steps": skipped_steps}
    new_state = TrainState(state.step + 1, params, opt_state, centers, bad_steps, skipped_steps)
    return new_state, scalars, features


def mean_over_parts(run: Callable, parts: Any) -> Any:
    """Means of run(part) over the leading axis of `parts`; the last result is concatenated."""
    count = len(jax.tree.leaves(parts)[0])
    first = jax.tree.map(lambda x: x[0], parts)
    if count == 1:
        return run(first)

    def body(totals, part):
        *results, features = run(part)
        return jax.tree.map(jnp.add, totals, results), features

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(run, first))
    totals, features = jax.lax.scan(body, list(zeros[:-1]), parts)
    means = jax.tree.map(lambda x: x / count, totals)
    return *means, rearrange(features, "a b d -> (a b) d")


def feature_step(
    params: Any, batch: dict[str, Array], *, extract: Callable[[Any, dict[str, Array]], Any]
) -> dict[str, Any]:
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
