"""Schedules and the optimiser chain, whose last link is the teacher.

Every schedule is a function of the training step, which reaches the chain as the keyword `step`:
`optimizer.update(grads, opt_state, params, step=step)`. Adam alone counts its own steps, since
frozen prototypes must not advance its bias correction.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import PyTree

from esvit_jax.models.batch_norm import is_running

Schedule = Callable[[ArrayLike], jax.Array]


def cosine_schedule(base: float, final: float, steps: int) -> Schedule:
    """final + (base - final) (1 + cos(pi step / steps)) / 2 for step = 0 .. steps - 1."""

    def schedule(step):
        share = jnp.pi * jnp.asarray(step, jnp.float32) / steps
        return final + 0.5 * (base - final) * (1.0 + jnp.cos(share))

    return schedule


def warmup_cosine_schedule(peak: float, final: float, warmup_steps: int, steps: int) -> Schedule:
    """A line from 0 to peak (both included) over the warm-up, then a cosine over the rest."""
    cosine = cosine_schedule(peak, final, max(1, steps - warmup_steps))

    def schedule(step):
        step = jnp.asarray(step)
        line = peak * step.astype(jnp.float32) / max(1, warmup_steps - 1)
        return jnp.where(step < warmup_steps, line, cosine(step - warmup_steps))

    return schedule


def epoch_line_schedule(
    start: float, end: float, warmup_epochs: int, steps_per_epoch: int
) -> Schedule:
    """A line from start to end (both included) over whole epochs, then constant."""

    def schedule(step):
        epoch = jnp.asarray(step) // steps_per_epoch
        share = jnp.minimum(epoch.astype(jnp.float32) / max(1, warmup_epochs - 1), 1.0)
        share = jnp.where(epoch >= warmup_epochs, 1.0, share)
        return start + (end - start) * share

    return schedule


def clip_each_tensor(max_norm: float) -> optax.GradientTransformation:
    """Scales every tensor by min(1, max_norm / (its norm + 1e-6)): the published clipping."""

    def clip(g):
        return g * jnp.minimum(1.0, max_norm / (jnp.linalg.norm(g.ravel()) + 1e-6))

    return optax.stateless(lambda updates, params: jax.tree.map(clip, updates))


def decayed(params: PyTree) -> PyTree[bool]:
    """True for what weight decay (and LARS) acts on: every tensor with more than one axis."""
    return jax.tree.map(lambda p: p.ndim > 1, params)


def scale_by_schedule(
    schedule: Schedule, sign: float = 1.0
) -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by sign * schedule(step)."""

    def update(updates, state, params=None, **extra):
        factor = sign * schedule(extra["step"])
        return jax.tree.map(lambda u: factor * u, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def add_weight_decay(schedule: Schedule) -> optax.GradientTransformationExtraArgs:
    """Adds schedule(step) * param to the updates of `decayed` tensors."""

    def update(updates, state, params=None, **extra):
        factor = schedule(extra["step"])
        return jax.tree.map(
            lambda u, p, on: u + factor * p if on else u, updates, params, decayed(params)
        ), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


class AdamState(NamedTuple):
    """First and second moments, and how many updates they have seen."""

    steps: jax.Array
    mu: PyTree
    nu: PyTree


def scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam's direction, mu_hat / (sqrt(nu_hat) + eps).

    `optax.scale_by_adam` but for the bias correction: 1 - b2**t as a float32 power is wrong in
    the fifth digit at the first steps. Over the 50 steps of the golden trajectory that moves the
    loss by 3e-4; with an exact correction the loss stays within 1e-6.
    """

    def init(params):
        return AdamState(
            jnp.zeros((), jnp.int32),
            jax.tree.map(jnp.zeros_like, params),
            jax.tree.map(jnp.zeros_like, params),
        )

    def update(updates, state, params=None):
        steps = state.steps + 1
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, updates)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, updates)
        count = steps.astype(jnp.float32)
        correction1 = -jnp.expm1(count * math.log(b1))
        correction2 = -jnp.expm1(count * math.log(b2))
        directions = jax.tree.map(
            lambda m, v: (m / correction1) / (jnp.sqrt(v / correction2) + eps), mu, nu
        )
        return directions, AdamState(steps, mu, nu)

    return optax.GradientTransformation(init, update)


def frozen_until(
    first_step: int, inner: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Before `first_step`: no updates, and the inner state (moments, counts) stays as it was."""
    inner = optax.with_extra_args_support(inner)

    def update(updates, state, params=None, **extra):
        new_updates, new_state = inner.update(updates, state, params, **extra)
        frozen = extra["step"] < first_step
        return (
            jax.tree.map(lambda u: jnp.where(frozen, 0.0, u), new_updates),
            jax.tree.map(lambda old, new: jnp.where(frozen, old, new), state, new_state),
        )

    return optax.GradientTransformationExtraArgs(inner.init, update)


class TeacherState(NamedTuple):
    """The teacher: an exponential moving average of the student's params."""

    params: PyTree


def teacher_ema(momentum: Schedule) -> optax.GradientTransformationExtraArgs:
    """Passes updates through and moves the teacher towards the *updated* student.

    teacher <- m teacher + (1 - m) (params + updates), in float32, but for running statistics,
    which are a network's own. The last link of a chain.
    """

    def init(params):
        # Copies: shared buffers cannot be donated twice.
        return TeacherState(jax.tree.map(jnp.copy, params))

    def update(updates, state, params=None, **extra):
        m = momentum(extra["step"])
        student = jax.tree.map(jnp.add, params, updates)
        teacher = jax.tree_util.tree_map_with_path(
            lambda path, t, s: t if is_running(path) else m * t + (1.0 - m) * s,
            state.params,
            student,
        )
        return updates, TeacherState(teacher)

    return optax.GradientTransformationExtraArgs(init, update)


def teacher_params(opt_state: PyTree) -> PyTree:
    """The teacher's params in the state of a chain built by `build_optimizer`."""
    return opt_state[-1].params


def with_teacher_params(opt_state: PyTree, params: PyTree) -> PyTree:
    """The state with other params of the teacher."""
    return (*opt_state[:-1], TeacherState(params))


def param_groups(params: PyTree, norm_last_layer: bool) -> PyTree[str]:
    """ "prototypes" for the last layers of the heads, "fixed" for what is not learned, else "rest".

    Not learned are norms kept at 1, and running statistics.
    """

    def group(path, _):
        names = [key.key for key in path]
        if is_running(path):
            return "fixed"
        if "last_layer" not in names:
            return "rest"
        return "fixed" if norm_last_layer and names[-1] == "weight_g" else "prototypes"

    return jax.tree_util.tree_map_with_path(group, params)


def build_optimizer(
    *,
    name: str,
    learning_rate: Schedule,
    weight_decay: Schedule,
    teacher_momentum: Schedule,
    clip_norm: float,
    freeze_prototypes_steps: int,
    norm_last_layer: bool,
) -> optax.GradientTransformationExtraArgs:
    """clip - optimiser (prototypes frozen at first) - teacher.

    Args:
      name: "adamw" (0.9, 0.999, eps 1e-8, decoupled decay), "sgd" (momentum 0.9) or "lars"
        (momentum 0.9, trust coefficient 1e-3, on tensors that are decayed).
      learning_rate, weight_decay, teacher_momentum: functions of the step.
      clip_norm: largest norm of one tensor's gradient; 0 for no limit.
      freeze_prototypes_steps: steps in which prototypes are skipped entirely.
      norm_last_layer: the prototypes' norms are fixed and never touched.
    """
    decay = add_weight_decay(weight_decay)
    learn = scale_by_schedule(learning_rate, sign=-1.0)
    chains = {
        "adamw": lambda: optax.chain(scale_by_adam(0.9, 0.999, 1e-8), decay, learn),
        "sgd": lambda: optax.chain(decay, optax.trace(0.9), learn),
        "lars": lambda: optax.chain(
            decay,
            optax.masked(optax.scale_by_trust_ratio(trust_coefficient=1e-3), decayed),
            optax.trace(0.9),
            learn,
        ),
    }
    inner = chains[name]()
    return optax.chain(
        clip_each_tensor(clip_norm) if clip_norm else optax.identity(),
        optax.partition(
            {
                "rest": inner,
                "prototypes": frozen_until(freeze_prototypes_steps, inner),
                "fixed": optax.set_to_zero(),
            },
            lambda params: param_groups(params, norm_last_layer),
        ),
        teacher_ema(teacher_momentum),
    )
