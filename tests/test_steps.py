"""The training step and the feature step on one device, piece by piece."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from esvit_jax import parallel, steps
from esvit_jax.config import resolve
from esvit_jax.recipe import Recipe, build
from esvit_jax.state import TrainState, create_state
from esvit_jax.steps import mean_over_parts


def recipe_of(**overrides: Any) -> Recipe:
    config = tiny.tiny_config()
    for name, value in overrides.items():
        config[name] = value
    return build(config, resolve(config, num_images=6000, num_devices=1))


def new_state(recipe: Recipe) -> TrainState:
    return create_state(recipe.model, recipe.optimizer, tiny.initial_params(recipe.model))


def random_batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "canvas": rng.integers(0, 256, (1, 8, 28, 28, 3), np.uint8),
        "size": np.full((1, 8, 2), 28, np.int32),
    }


@pytest.fixture(scope="module")
def taken() -> tuple[Recipe, TrainState, TrainState, dict[str, Any], np.ndarray]:
    """A recipe, a state with centers, and what its step makes of it."""
    recipe = recipe_of()
    state = new_state(recipe)
    centers = {name: jnp.linspace(-1, 1, 32) for name in state.centers}
    state = dataclasses.replace(state, centers=centers, step=jnp.asarray(3, jnp.int32))
    run = parallel.on_all_devices(recipe.step, "pmap", devices=jax.devices()[:1])
    new, scalars, features = run(state, random_batch())
    return recipe, state, new, scalars, np.asarray(features)


def test_teacher_follows_the_new_student(taken):
    recipe, old, new, _, _ = taken
    m = recipe.schedules["teacher_momentum"](3)
    expected = jax.tree.map(lambda t, s: m * t + (1 - m) * s, old.teacher, new.params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), new.teacher, expected
    )
    assert int(new.step) == 4 and int(new.bad_steps) == 0


def test_centers_and_features_are_the_old_teachers(taken):
    """Computed again here from the views of the same keys."""
    recipe, old, new, _, features = taken
    key = jax.random.fold_in(jax.random.key(recipe.options.seed), old.step)
    view_key, _ = jax.random.split(key)
    keys = jax.vmap(lambda i: jax.random.fold_in(view_key, i))(jnp.arange(8))
    batch = {name: jnp.asarray(x[0]) for name, x in random_batch().items()}
    views = recipe.make_views(keys, batch)
    teacher, _ = jax.jit(recipe.model.forward_training)(old.teacher, [views["global"]])
    np.testing.assert_allclose(features, teacher.view_features[0][0], rtol=1e-4, atol=1e-5)
    for name, head in teacher.heads.items():
        logits = head.vectors[0].reshape(-1, 8) @ head.prototypes.T
        expected = 0.9 * old.centers[name] + 0.1 * logits.mean(axis=0)
        np.testing.assert_allclose(new.centers[name], expected, rtol=1e-4, atol=1e-5)


def test_a_step_that_is_not_finite_changes_only_the_counters(taken):
    recipe, old, _, _, _ = taken
    broken = dataclasses.replace(
        old, centers=jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), old.centers),
        bad_steps=jnp.asarray(1, jnp.int32), skipped_steps=jnp.asarray(5, jnp.int32),
    )  # fmt: skip
    run = parallel.on_all_devices(recipe.step, "pmap", devices=jax.devices()[:1])
    new, scalars, _ = run(broken, random_batch())
    assert not np.isfinite(scalars["loss"])
    assert (int(new.step), int(new.bad_steps), int(new.skipped_steps)) == (4, 2, 6)
    for name in ("params", "opt_state", "centers"):
        jax.tree.map(np.testing.assert_array_equal, getattr(new, name), getattr(broken, name))


def test_mean_over_parts_equals_a_loop():
    """Means of all results but the last, of which all parts are kept."""
    parts = {"x": jnp.arange(12.0).reshape(3, 4), "k": jnp.arange(3.0)}

    def run(part):
        return part["x"].sum(), {"k": part["k"] * jnp.ones(2)}, part["x"][:, None]

    total, other, rows = mean_over_parts(run, parts)
    np.testing.assert_allclose(total, np.arange(12.0).reshape(3, 4).sum(axis=1).mean())
    np.testing.assert_allclose(other["k"], [1.0, 1.0])
    np.testing.assert_array_equal(rows, np.arange(12.0).reshape(3, 4, 1))
    alone = mean_over_parts(run, jax.tree.map(lambda x: x[:1], parts))
    np.testing.assert_allclose(alone[0], 6.0)
    np.testing.assert_array_equal(alone[2], rows[:1])


def test_feature_step_gathers_all_devices_images():
    def extract(params, batch):
        return params * batch["x"]

    def step(params, batch):
        return steps.feature_step(params, batch, extract=extract)

    batch = {
        "x": np.arange(8.0, dtype=np.float32).reshape(4, 2),
        "label": np.arange(8, dtype=np.int32).reshape(4, 2),
        "mask": np.arange(8).reshape(4, 2) < 5,
    }
    found = parallel.on_all_devices(step, "pmap")(jnp.asarray(2.0), batch)
    np.testing.assert_array_equal(found["features"], 2 * np.arange(8.0))
    np.testing.assert_array_equal(found["label"], np.arange(8))
    np.testing.assert_array_equal(found["mask"], np.arange(8) < 5)
