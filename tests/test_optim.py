"""Schedules and the optimiser chain against loops over steps and tensors, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from esvit_jax import optim
from esvit_jax.models import EsViT, Swin
from esvit_jax.state import init_params

STEPS, FROZEN, CLIP = 20, 6, 1.5
LEARNING_RATE = np.linspace(0.01, 0.002, STEPS)
WEIGHT_DECAY = np.linspace(0.04, 0.4, STEPS)
MOMENTUM = np.linspace(0.9, 1.0, STEPS)


def values(schedule, steps):
    return np.asarray(jax.jit(jax.vmap(schedule))(jnp.arange(steps)), np.float64)


@pytest.mark.parametrize(("base", "final", "steps"), [(0.04, 0.4, 50), (0.996, 1.0, 7)])
def test_cosine(base, final, steps):
    i = np.arange(steps)
    expected = final + 0.5 * (base - final) * (1 + np.cos(np.pi * i / steps))
    ours = values(optim.cosine_schedule(base, final, steps), steps)
    np.testing.assert_allclose(ours, expected, rtol=2e-6)
    assert ours[0] == pytest.approx(base, rel=1e-6) and ours[-1] != pytest.approx(final, rel=1e-6)


@pytest.mark.parametrize(("warmup", "steps"), [(10, 50), (0, 20), (1, 20), (2, 5), (20, 20)])
def test_warmup_then_cosine(warmup, steps):
    rest = np.arange(steps - warmup)
    cosine = 1e-6 + 0.5 * (1e-3 - 1e-6) * (1 + np.cos(np.pi * rest / max(1, len(rest))))
    expected = np.concatenate([np.linspace(0, 1e-3, warmup), cosine])
    ours = values(optim.warmup_cosine_schedule(1e-3, 1e-6, warmup, steps), steps)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("warmup", [0, 1, 2, 5])
def test_line_over_epochs(warmup):
    expected = np.concatenate([np.linspace(0.04, 0.07, warmup), np.full(8 - warmup, 0.07)])
    ours = values(optim.epoch_line_schedule(0.04, 0.07, warmup, 3), 24)
    np.testing.assert_allclose(ours, expected.repeat(3), rtol=1e-6)


def table(array):
    array = jnp.asarray(array, jnp.float32)
    return lambda step: array[step]


def build(name="adamw", clip=CLIP, frozen=FROZEN, norm_last_layer=False):
    return optim.build_optimizer(
        name=name, learning_rate=table(LEARNING_RATE), weight_decay=table(WEIGHT_DECAY),
        teacher_momentum=table(MOMENTUM), clip_norm=clip, freeze_prototypes_steps=frozen,
        norm_last_layer=norm_last_layer,
    )  # fmt: skip


def small_params():
    """A matrix, a vector and a bias table, and a head's last layer."""
    rng = np.random.default_rng(0)
    shapes = {
        "backbone": {"kernel": (4, 3), "bias": (3,), "relative_position_bias_table": (9, 2)},
        "view_head": {"mlp_0": {"kernel": (3, 3)}, "last_layer": {
            "weight_g": (5, 1), "weight_v": (5, 3)}},
    }  # fmt: skip
    draw = lambda s: jnp.asarray(rng.normal(size=s), jnp.float32)  # noqa: E731
    return jax.tree.map(draw, shapes, is_leaf=lambda x: isinstance(x, tuple))


def gradients(params, step):
    """Of norms on both sides of the clip."""
    rng = np.random.default_rng(100 + step)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)


def named(tree):
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): np.asarray(x, np.float64) for path, x in flat}


def run(optimizer, params, first=0, last=STEPS):
    """Params after some steps, the optimiser's state, and both after every step."""

    @jax.jit
    def update(params, state, grads, step):
        updates, state = optimizer.update(grads, state, params, step=step)
        return optax.apply_updates(params, updates), state

    state, history = optimizer.init(params), []
    for step in range(first, last):
        params, state = update(params, state, gradients(params, step), step)
        history.append((params, state))
    return params, state, history


def reference_run(name, params, fixed=()):
    """The same by loops: clip, freeze, optimiser, then the teacher from the new student."""
    start = named(params)
    student, teacher = dict(start), dict(start)
    m, v = ({k: np.zeros_like(x) for k, x in start.items()} for _ in range(2))
    counts = dict.fromkeys(start, 0)
    for step in range(STEPS):
        for key, g in named(gradients(params, step)).items():
            p, matrix = student[key], start[key].ndim > 1
            g = g * min(1.0, CLIP / (np.sqrt((g**2).sum()) + 1e-6))
            frozen = "last_layer" in key and step < FROZEN
            decay = WEIGHT_DECAY[step] * p if matrix else 0.0
            if not frozen and key not in fixed:
                if name == "adamw":
                    counts[key] += 1
                    m[key] = 0.9 * m[key] + 0.1 * g
                    v[key] = 0.999 * v[key] + 0.001 * g**2
                    m_hat = m[key] / (1 - 0.9 ** counts[key])
                    v_hat = v[key] / (1 - 0.999 ** counts[key])
                    direction = m_hat / (np.sqrt(v_hat) + 1e-8) + decay
                else:
                    g = g + decay
                    if name == "lars" and matrix:
                        g = g * 1e-3 * np.linalg.norm(p) / np.linalg.norm(g)
                    m[key] = direction = 0.9 * m[key] + g
                student[key] = p - LEARNING_RATE[step] * direction
            teacher[key] = MOMENTUM[step] * teacher[key] + (1 - MOMENTUM[step]) * student[key]
    return student, teacher


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_chain_equals_loops(name):
    """Twenty steps, the prototypes frozen in the first six."""
    params = small_params()
    ours, state, _ = run(build(name), params)
    student, teacher = reference_run(name, params)
    for key, value in named(ours).items():
        assert np.linalg.norm(value - student[key]) < 1e-6 * np.linalg.norm(student[key]), key
    for key, value in named(optim.teacher_params(state)).items():
        assert np.linalg.norm(value - teacher[key]) < 1e-6 * np.linalg.norm(teacher[key]), key


def test_fixed_norms_never_move():
    params = small_params()
    g = "['view_head']['last_layer']['weight_g']"
    ours, state, _ = run(build(norm_last_layer=True), params)
    student, _ = reference_run("adamw", params, fixed=(g,))
    for key, value in named(ours).items():
        assert np.linalg.norm(value - student[key]) < 1e-6 * np.linalg.norm(student[key]), key
    np.testing.assert_array_equal(named(ours)[g], named(params)[g])
    np.testing.assert_allclose(named(optim.teacher_params(state))[g], named(params)[g], rtol=1e-6)


def test_frozen_prototypes_are_skipped_entirely():
    """No update, no decay, no moments, no count; then bias-corrected as at a first step."""
    params = small_params()
    _, _, history = run(build(), params, last=FROZEN + 1)
    before = named(params["view_head"]["last_layer"])
    for student, state in history[:-1]:
        assert all(
            np.array_equal(x, before[k])
            for k, x in named(student["view_head"]["last_layer"]).items()
        )
        adam = state[1].inner_states["prototypes"].inner_state[0]
        assert adam.steps == 0 and not any(np.any(x) for x in jax.tree.leaves((adam.mu, adam.nu)))
    counts = [s[1].inner_states["rest"].inner_state[0].steps for _, s in history]
    assert counts == list(range(1, FROZEN + 2))
    assert history[-1][1][1].inner_states["prototypes"].inner_state[0].steps == 1
    after = named(history[-1][0]["view_head"]["last_layer"])
    grads = named(gradients(params, FROZEN)["view_head"]["last_layer"])
    for key, value in after.items():  # Adam's first direction is the sign of the gradient
        decayed = WEIGHT_DECAY[FROZEN] * before[key]
        expected = before[key] - LEARNING_RATE[FROZEN] * (np.sign(grads[key]) + decayed)
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


def test_clip_is_of_each_tensor():
    params = small_params()
    grads = jax.tree.map(lambda g: 2.0 * g, gradients(params, 0))
    clipped, _ = optim.clip_each_tensor(3.0).update(grads, optax.EmptyState())
    scales = []
    for key, g in named(grads).items():
        scales.append(min(1.0, 3.0 / (np.linalg.norm(g) + 1e-6)))
        np.testing.assert_allclose(named(clipped)[key], g * scales[-1], rtol=1e-6)
    assert min(scales) < 1.0 and max(scales) == 1.0
    zeros = jax.tree.map(jnp.zeros_like, params)
    clipped, _ = optim.clip_each_tensor(3.0).update(zeros, optax.EmptyState())
    assert all(not np.any(x) for x in jax.tree.leaves(clipped))


def test_no_clip():
    params = small_params()
    unclipped, _, _ = run(build("sgd", clip=0.0, frozen=0), params, last=1)
    grads = named(gradients(params, 0))
    for key, p in named(params).items():
        decay = WEIGHT_DECAY[0] * p if p.ndim > 1 else 0.0
        expected = p - LEARNING_RATE[0] * (grads[key] + decay)
        np.testing.assert_allclose(named(unclipped)[key], expected, rtol=1e-5, atol=1e-6)


def test_what_is_decayed_and_what_is_frozen():
    backbone = Swin(4, (1, 1), (1, 2), window_size=2, patch_size=2, image_size=8)
    model = EsViT(backbone, num_prototypes=5, hidden_dim=6, bottleneck_dim=3)
    params = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    flat = jax.tree_util.tree_flatten_with_path(optim.decayed(params))[0]
    leaves = ("kernel", "relative_position_bias_table", "weight_g", "weight_v")
    seen = set()
    for path, on in flat:
        seen.add(path[-1].key)
        assert on == (path[-1].key in leaves), path
    assert seen == {*leaves, "bias", "scale"}
    for norm_last_layer in (False, True):
        groups = jax.tree_util.tree_flatten_with_path(optim.param_groups(params, norm_last_layer))
        for path, group in groups[0]:
            expected = "prototypes" if "last_layer" in {key.key for key in path} else "rest"
            if norm_last_layer and path[-1].key == "weight_g":
                expected = "fixed"
            assert group == expected, path


def test_teacher_follows_the_new_student():
    ema = optim.teacher_ema(table(np.full(3, 0.75)))
    params, updates = {"w": jnp.asarray([1.0, -2.0])}, {"w": jnp.asarray([0.5, 4.0])}
    state = ema.init(params)
    passed, state = ema.update(updates, state, params, step=0)
    jax.tree.map(np.testing.assert_array_equal, passed, updates)
    teacher = optim.teacher_params((state,))
    np.testing.assert_allclose(teacher["w"], [0.75 + 0.25 * 1.5, -0.75 * 2 + 0.25 * 2])


def test_teacher_starts_as_a_copy():
    """The same numbers in other memory: a donated buffer can be given only once."""
    params = small_params()
    state = build().init(params)
    for ours, theirs in zip(
        jax.tree.leaves(optim.teacher_params(state)), jax.tree.leaves(params), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.unsafe_buffer_pointer() != theirs.unsafe_buffer_pointer()
