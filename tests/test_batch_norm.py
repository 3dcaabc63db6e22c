"""Batch norms against float64 formulas, over devices and parts; and where they are in a run."""

import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config

from esvit_jax import checkpoint, loop, parallel
from esvit_jax.config import resolve
from esvit_jax.models.batch_norm import (
    AXIS,
    STATISTICS,
    BatchNorm,
    BatchStatistics,
    with_statistics,
)
from esvit_jax.models.heads import ProjectionHead
from esvit_jax.recipe import build
from esvit_jax.state import create_state, init_params

RNG = np.random.default_rng(0)
SCALE, BIAS = RNG.normal(size=(2, 5)).astype(np.float32)
PARAMS = {
    "scale": SCALE, "bias": BIAS, "running_mean": np.full(5, 0.5, np.float32),
    "running_var": np.full(5, 4.0, np.float32),
}  # fmt: skip
ROWS = RNG.normal(3.0, 2.0, size=(4, 6, 5)).astype(np.float32)  # devices, rows, features
WEIGHTS = RNG.normal(size=ROWS.shape).astype(np.float32)  # of a loss


def formula(rows, scale, bias):
    """All rows as one batch."""
    mean, variance = rows.mean((0, 1)), rows.var((0, 1))
    return (rows - mean) / np.sqrt(variance + 1e-5) * scale + bias


def trained(rows, params) -> tuple[Any, Any]:
    """Outputs on each device, and what they have seen."""
    out, seen = jax.vmap(
        lambda x, p: BatchNorm().apply({"params": p}, x, mutable=[STATISTICS]),
        in_axes=(0, None), axis_name=AXIS,
    )(rows, params)  # fmt: skip
    return out, seen[STATISTICS]


def test_training_normalises_by_the_rows_of_all_devices():
    out, seen = trained(ROWS, PARAMS)
    np.testing.assert_allclose(out, formula(ROWS.astype(np.float64), SCALE, BIAS), atol=2e-6)
    (call,) = seen["calls"]
    for device in range(4):
        np.testing.assert_allclose(call.mean[device], ROWS.mean((0, 1)), rtol=1e-6)
        np.testing.assert_allclose(call.variance[device], ROWS.var((0, 1)), rtol=1e-6)
        assert call.rows[device] == 24


def test_gradients_are_those_of_the_formula():
    """Of the sum of the devices' losses, by finite differences of the formula in float64."""

    def gradients(rows, params, weights):
        def loss(rows, params):
            out, _ = BatchNorm().apply({"params": params}, rows, mutable=[STATISTICS])
            return jnp.sum(out * weights)

        return jax.grad(loss, (0, 1))(rows, params)

    on_devices = jax.vmap(gradients, in_axes=(0, None, 0), axis_name=AXIS)
    of_rows, of_params = on_devices(ROWS, PARAMS, WEIGHTS)
    of_params = jax.tree.map(lambda x: x.sum(0), of_params)
    values = {"rows": ROWS, "scale": SCALE, "bias": BIAS}
    for name, ours in (("rows", of_rows), *((n, of_params[n]) for n in ("scale", "bias"))):
        theirs, step = np.zeros(values[name].shape), 1e-6
        for index in np.ndindex(theirs.shape):
            for sign in (1, -1):
                moved = {k: x.astype(np.float64) for k, x in values.items()}
                moved[name][index] += sign * step
                theirs[index] += sign * np.sum(formula(**moved) * WEIGHTS) / (2 * step)
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
    assert not np.any(of_params["running_mean"]) and not np.any(of_params["running_var"])


def test_evaluation_normalises_by_running_statistics():
    out: Any = BatchNorm().apply({"params": PARAMS}, jnp.asarray(ROWS))
    np.testing.assert_allclose(out, (ROWS - 0.5) / np.sqrt(4 + 1e-5) * SCALE + BIAS, atol=1e-5)


def test_running_statistics_follow_calls_in_their_order_and_parts_together():
    """Two calls, each of a batch in three parts; PyTorch's unbiased variance."""
    batches = RNG.normal(2.0, 3.0, size=(2, 3, 8, 5))
    calls = tuple(
        BatchStatistics(*map(jnp.asarray, (parts.mean(1), parts.var(1), np.full(3, 8.0))))
        for parts in batches
    )
    new = with_statistics({"norm": PARAMS}, {"norm": {"calls": calls}})["norm"]
    mean, variance = PARAMS["running_mean"], PARAMS["running_var"]
    for parts in batches:
        rows = parts.reshape(24, 5)
        mean = 0.9 * mean + 0.1 * rows.mean(0)
        variance = 0.9 * variance + 0.1 * rows.var(0, ddof=1)
    np.testing.assert_allclose(new["running_mean"], mean, rtol=1e-6)
    np.testing.assert_allclose(new["running_var"], variance, rtol=1e-6)
    np.testing.assert_array_equal(new["scale"], SCALE)


def test_a_head_with_batch_norms():
    """linear - norm - GELU twice, linear, L2; names as in the published state dict."""
    head = ProjectionHead(num_prototypes=4, hidden_dim=5, bottleneck_dim=3, batch_norm=True)
    params: Any = head.init(jax.random.key(0), jnp.zeros((1, 5)))["params"]
    assert set(params) == {"mlp_0", "mlp_1", "mlp_3", "mlp_4", "mlp_6"}
    rows = ROWS.reshape(24, 5)
    out, _ = jax.vmap(
        lambda x: head.apply({"params": params}, x, mutable=[STATISTICS]),
        axis_name=AXIS, axis_size=1, in_axes=None, out_axes=None,
    )(jnp.asarray(rows))  # fmt: skip
    x = rows
    for linear, norm in (("mlp_0", "mlp_1"), ("mlp_3", "mlp_4")):
        x = x @ params[linear]["kernel"] + params[linear]["bias"]
        x = formula(x[None], params[norm]["scale"], params[norm]["bias"])[0]
        x = jax.nn.gelu(x, approximate=False)
    x = x @ params["mlp_6"]["kernel"] + params["mlp_6"]["bias"]
    np.testing.assert_allclose(out, x / np.linalg.norm(x, axis=1, keepdims=True), atol=1e-5)


def resnet_config():
    """A ResNet of two blocks, and batch norms in its heads."""
    config = tiny_config()
    config.backbone.name = "resnet50"
    for name in ("embed_dim", "num_heads", "window_size"):
        config.backbone[name] = None
    config.backbone.base_width = 4
    config.head.batch_norm = True
    # Biases before a batch norm have no gradient but rounding, of which Adam makes steps.
    config.optimizer.name, config.optimizer.learning_rate = "sgd", 10.0
    config.total_steps = 4
    config.checkpoint_every_steps = 2
    return config


@pytest.fixture(scope="module")
def recipe():
    config = resnet_config()
    return build(config, resolve(config, num_images=64, num_devices=4))


def one_step(recipe, mode, devices):
    params = init_params(recipe.model, jax.random.key(0))
    state = create_state(recipe.model, recipe.optimizer, params)
    canvas = np.random.default_rng(1).integers(0, 256, (8, 28, 28, 3)).astype(np.uint8)
    batch = {"canvas": canvas, "size": np.full((8, 2), 28, np.int32)}
    batch = {name: x.reshape(devices, 8 // devices, *x.shape[1:]) for name, x in batch.items()}
    return parallel.on_all_devices(recipe.step, mode, devices=jax.devices()[:devices])(state, batch)


def test_devices_make_one_batch(recipe):
    """Four give the state of one, running statistics of both networks too; updates are up to 1."""
    one, *_ = one_step(recipe, "pmap", 1)
    for mode in ("pmap", "shard_map"):
        four, *_ = one_step(recipe, mode, 4)
        for ours, theirs in ((one.params, four.params), (one.teacher, four.teacher)):
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5), ours, theirs)
    start = init_params(recipe.model, jax.random.key(0))["backbone"]["bn1"]
    student, teacher = (p["backbone"]["bn1"] for p in (one.params, one.teacher))
    assert not np.allclose(student["running_mean"], start["running_mean"], atol=1e-4)
    # The teacher has seen the global views alone, and is not moved towards the student's.
    assert not np.allclose(student["running_mean"], teacher["running_mean"], atol=1e-4)


def test_a_run_goes_on_with_its_running_statistics(tmp_path):
    """From the checkpoint before the last, to the same bits."""
    loop.train(resnet_config(), tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "4")
    loop.train(resnet_config(), tmp_path / "again")
    whole, again = (checkpoint.load_model(tmp_path / name) for name in ("whole", "again"))
    assert whole.step == again.step == 4
    for ours, theirs in ((whole.student, again.student), (whole.teacher, again.teacher)):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
