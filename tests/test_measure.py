"""Costs of a step: operations against counts by hand, and what the compiler says about this one."""

import functools
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esvit_jax import parallel
from esvit_jax.config import resolve
from esvit_jax.planning import flops, measure
from esvit_jax.planning.chips import CHIPS
from esvit_jax.planning.estimate import floor
from esvit_jax.planning.plan import plan
from esvit_jax.recipe import build
from esvit_jax.state import create_state, init_params


def traced_flops(config, devices=4):
    numbers = resolve(config, num_images=6000, num_devices=devices)
    recipe = build(config, numbers)
    state = jax.eval_shape(
        lambda key: create_state(recipe.model, recipe.optimizer, init_params(recipe.model, key)),
        jax.random.key(0),
    )
    batch = measure.batch_shapes(config, devices, numbers.images_per_device)
    return flops.step_flops(recipe.step, state, batch), state


def test_matmul_flops():
    def count(f, *shapes):
        shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        return flops.matmul_flops(jax.make_jaxpr(f)(*shapes).jaxpr)

    def chain(x, ys):
        return jax.lax.scan(lambda x, y: (jnp.tanh(x @ y), None), x, ys)[0].sum()

    product = 2 * 3 * 5 * 5
    assert count(chain, (3, 5), (7, 5, 5)) == 7 * product
    assert count(jax.grad(chain, (0, 1)), (3, 5), (7, 5, 5)) == 3 * 7 * product

    def remat(x, y):
        return jax.checkpoint(lambda x: jnp.tanh(jnp.tanh(x @ y) @ y))(x).sum()

    # Forward 2, forward again 2, backward to x 2.
    assert count(jax.grad(remat), (3, 5), (5, 5)) == 6 * product
    assert count(lambda x, y: jnp.einsum("bij,bkj->bik", x, y), (4, 3, 5), (4, 6, 5)) == (
        2 * 4 * 3 * 5 * 6
    )

    def patches(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    forward = 2 * 2 * 4 * 4 * 6 * (4 * 4 * 3)
    assert count(patches, (2, 16, 16, 3), (4, 4, 3, 6)) == forward
    gradient = jax.grad(lambda kernel, x: (patches(x, kernel) ** 2).sum())
    assert count(gradient, (4, 4, 3, 6), (2, 16, 16, 3)) == 2 * forward


def test_flops_of_the_step_do_not_depend_on_chunks(tiny_config):
    whole, _ = traced_flops(tiny_config)
    tiny_config.loss.prototype_chunk = 8
    assert traced_flops(tiny_config)[0] == whole


def test_floor():
    bytes_of_a_tenth, flops_of_a_hundredth = 81_900_000_000, 1_970_000_000_000
    run = {"batch_size": 512, "total_steps": 36_000}
    result = floor(CHIPS["v5e"], bytes_of_a_tenth, flops_of_a_hundredth, **run)
    assert result == pytest.approx((0.1, 5120, 1))
    result = floor(CHIPS["v5e"], bytes_of_a_tenth, 100 * flops_of_a_hundredth, **run)
    assert result.floor_seconds == pytest.approx(1)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
         "temporaries (32.01G) exceeds available HBM (15.75G).", int(32.01 * 2**30)),
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
         "hbm. Used 950.50M of 15.75G hbm. Exceeded …", int(950.5 * 2**20)),
        ("INTERNAL: Mosaic failed", None),
    ],
)  # fmt: skip
def test_used_memory(message, expected):
    assert measure.used_memory(message) == expected


def test_plan_for_this_machine(tiny_config, monkeypatch, capsys):
    # What is asked of the program does not depend on how well its loops are compiled.
    quick = " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"] + quick)
    monkeypatch.setattr("esvit_jax.planning.plan.SIGN_OF_LIFE", 0.5)
    result = plan(tiny_config, "cpu", num_images=6000, batch_per_chip=2)
    printed = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"compiling for cpu, \d+ s", printed[0]) and len(printed) > 2
    assert result.chips == 4 and result.per_chip_batch == 2  # 4 virtual devices, as in here

    operations, state = traced_flops(tiny_config)
    assert result.flops == operations
    params = jax.jit(functools.partial(jax.tree.map, lambda x: jnp.zeros(x.shape, x.dtype)))(
        state.params
    )
    real = sum(np.asarray(x).nbytes for x in jax.tree.leaves(params))
    assert result.parameter_bytes == result.teacher_bytes == real
    assert result.optimizer_bytes == pytest.approx(2 * real, abs=64)  # and Adam's counters
    batch_bytes = 2 * (28 * 28 * 3 + 2 * 4)
    centers = 2 * 32 * 4
    assert result.argument_bytes == pytest.approx(4 * real + batch_bytes + centers, abs=128)
    assert result.argument_bytes is not None and result.bytes_accessed is not None
    assert result.peak_bytes > result.argument_bytes and result.fits
    assert result.bytes_accessed > result.argument_bytes
    assert result.floor_seconds is result.floor_images_per_second is None


def test_a_plan_counts_what_a_chip_holds_of_a_state_that_is_spread(tiny_config, monkeypatch):
    compiled = measure.Program(peak_bytes=0, fits=True)
    monkeypatch.setattr(measure, "compile_program", lambda lowered: compiled)
    whole = measure.measure(tiny_config, "cpu", num_images=6000)
    tiny_config.parallel = "fsdp"
    spread = measure.measure(tiny_config, "cpu", num_images=6000)
    assert (whole.parallel, spread.parallel) == ("pmap", "fsdp")

    numbers = resolve(tiny_config, num_images=6000, num_devices=4)
    recipe = build(tiny_config, numbers)
    params = jax.jit(functools.partial(init_params, recipe.model))(jax.random.key(0))
    held = sum(
        x.addressable_shards[0].data.nbytes
        for x in jax.tree.leaves(parallel.replicate(params, "fsdp"))
    )
    assert spread.parameter_bytes == spread.teacher_bytes == held
    assert spread.optimizer_bytes == pytest.approx(2 * held, abs=64)  # and Adam's counters
    assert whole.parameter_bytes / 4 <= held < whole.parameter_bytes / 3


@pytest.mark.slow
def test_a_spread_plan_for_a_tpu(tiny_config):
    pytest.importorskip("libtpu")
    tiny_config.parallel = "fsdp"
    result = plan(tiny_config, "v5e:2x2", num_images=6000, batch_per_chip=2)
    assert result.fits and result.parallel == "fsdp"
    assert result.collective_bytes is not None and result.collective_bytes > 0
    seconds = result.collective_bytes / CHIPS["v5e"].link_bandwidth
    assert result.collective_seconds == pytest.approx(seconds)


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:1x1", "v4:2x2x1"])
def test_plan_for_a_tpu(tiny_config, topology):
    pytest.importorskip("libtpu")
    result = plan(tiny_config, topology, num_images=6000, batch_per_chip=8)
    chips = {"v5e:1x1": 1, "v4:2x2x1": 4}[topology]
    tiny_config.batch_size = 8 * chips
    assert result.flops == traced_flops(tiny_config, devices=chips)[0]
    assert result.chips == chips and result.fits
    assert result.argument_bytes is not None and result.bytes_accessed is not None
    assert result.argument_bytes > 4 * result.parameter_bytes  # padding only adds
    # State and canvases are read, and the new state is written, at least once.
    assert result.bytes_accessed >= 2 * 4 * result.parameter_bytes
    chip = CHIPS[topology.partition(":")[0]]
    assert result.floor_seconds == pytest.approx(result.bytes_accessed / chip.bandwidth)
