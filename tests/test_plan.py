"""`esvit plan`: bytes and operations against counts by hand, the search against a made-up chip."""

import functools
import json
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esvit_jax.commands import plan as plan_module
from esvit_jax.commands.plan import main
from esvit_jax.config import resolve
from esvit_jax.errors import UserError
from esvit_jax.planning import measure, traffic
from esvit_jax.planning.chips import CHIPS
from esvit_jax.planning.search import largest_batch, plan, search
from esvit_jax.recipe import build
from esvit_jax.state import create_state, init_params

KEYS = {
    "topology", "chips", "per_chip_batch", "argument_bytes", "temp_bytes", "peak_bytes",
    "hbm_bytes", "fits", "flops", "bytes_accessed", "floor_seconds", "floor_images_per_second",
}  # fmt: skip


def traced_flops(config, devices=4):
    numbers = resolve(config, num_images=6000, num_devices=devices)
    recipe = build(config, numbers)
    state = jax.eval_shape(
        lambda key: create_state(recipe.model, recipe.optimizer, init_params(recipe.model, key)),
        jax.random.key(0),
    )
    batch = measure.batch_shapes(config, devices, numbers.images_per_device)
    return measure.step_flops(recipe.step, state, batch), state


# Bytes of an HLO text.


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("f32[3,49]{1,0}", 3 * 49 * 4),
        ("f32[3,49]{1,0:T(8,128)}", 8 * 128 * 4),
        ("f32[3,49]{0,1:T(8,128)}", 56 * 128 * 4),
        ("bf16[2,5,49,49]{3,2,1,0:T(8,128)(2,1)}", 2 * 5 * 56 * 128 * 2),
        ("f32[3,49]{1,0:T(8,128)S(1)}", 0),
        ("pred[1000]{0:T(1024)}", 1024),
        ("(s32[4]{0:T(128)S(1)}, /*index=1*/f32[9]{0:T(128)}, u8[256]{0})", 128 * 4 + 256),
        ("f32[]", 4),
        ("token[]", 0),
    ],
)
def test_shape_bytes(shape, expected):
    assert traffic.shape_bytes(shape) == expected


LOOP = """HloModule m, is_scheduled=true

%slice_one (a: f32[6,100], i: s32[]) -> f32[100] {
  %a = f32[6,100]{1,0} parameter(0)
  %i = s32[]{:S(2)} parameter(1)
  %zero = s32[]{:S(2)} constant(0)
  %s = f32[1,100]{1,0} dynamic-slice(%a, %i, %zero), dynamic_slice_sizes={1,100}
  ROOT %b = f32[100]{0} bitcast(%s)
}

%body (p: (s32[], f32[6,100], f32[100])) -> (s32[], f32[6,100], f32[100]) {
  %p = (s32[]{:S(2)}, f32[6,100]{1,0}, f32[100]{0}) parameter(0)
  %n = s32[]{:S(2)} get-tuple-element(%p), index=0
  %all = f32[6,100]{1,0} get-tuple-element(%p), index=1
  %sum = f32[100]{0} get-tuple-element(%p), index=2
  %row = f32[100]{0} fusion(%all, %n), kind=kLoop, calls=%slice_one, metadata={op_name="a(b)/c"}
  %new = f32[100]{0} add(%sum, %row)
  %one = s32[]{:S(2)} constant(1)
  %next = s32[]{:S(2)} add(%n, %one)
  ROOT %t = (s32[]{:S(2)}, f32[6,100]{1,0}, f32[100]{0}) tuple(%next, %all, %new)
}

%until (p: (s32[], f32[6,100], f32[100])) -> pred[] {
  %p = (s32[]{:S(2)}, f32[6,100]{1,0}, f32[100]{0}) parameter(0)
  %n = s32[]{:S(2)} get-tuple-element(%p), index=0
  %bound = s32[]{:S(2)} constant(6)
  ROOT %less = pred[]{:S(2)} compare(%n, %bound), direction=LT
}

ENTRY %main (x: f32[6,100], y: f32[100]) -> f32[100] {
  %x = f32[6,100]{1,0} parameter(0)
  %y = f32[100]{0} parameter(1)
  %zero = s32[]{:S(2)} constant(0)
  %start = (s32[]{:S(2)}, f32[6,100]{1,0}, f32[100]{0}) tuple(%zero, %x, %y)
  %loop = (s32[]{:S(2)}, f32[6,100]{1,0}, f32[100]{0}) while(%start), condition=%until, body=%body
  ROOT %out = f32[100]{0} get-tuple-element(%loop), index=2
}
"""


def test_bytes_of_a_loop():
    # A turn: one row read and written by the fusion, two read and one written by the sum.
    assert traffic.bytes_accessed(LOOP) == 6 * 5 * 400


def test_bytes_of_a_loop_without_a_known_length():
    with pytest.raises(ValueError, match="loop has no constant bound"):
        traffic.bytes_accessed(LOOP.replace("constant(6)", "parameter(1)"))


def test_bytes_of_an_update_in_place():
    text = """HloModule m

%update (a: f32[50,100], b: f32[1,100], i: s32[]) -> f32[50,100] {
  %a = f32[50,100]{1,0} parameter(0)
  %b = f32[1,100]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %u = f32[50,100]{1,0} dynamic-update-slice(%a, %b, %i, %i)
}

ENTRY %main (a: f32[50,100], b: f32[1,100], i: s32[]) -> f32[50,100] {
  %a = f32[50,100]{1,0} parameter(0)
  %b = f32[1,100]{1,0:S(1)} parameter(1)
  %i = s32[] parameter(2)
  ROOT %f = f32[50,100]{1,0} fusion(%a, %b, %i), kind=kLoop, calls=%update
}
"""
    assert traffic.bytes_accessed(text) == 400 + 4  # one row written, the index read


def test_bytes_of_copying_a_part_to_the_chip_and_back():
    text = """HloModule m

ENTRY %main (a: f32[50,100]) -> f32[50,100] {
  %a = f32[50,100]{1,0} parameter(0)
  %start = ((f32[50,100]{1,0}), f32[10,100]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:10], [0:100]}
  %part = f32[10,100]{1,0:S(1)} slice-done(%start)
  %half = f32[5,100]{1,0:S(1)} slice(%part), slice={[0:5], [0:100]}
  %row = f32[1,100]{1,0} slice(%half), slice={[0:1], [0:100]}
  %zero = s32[]{:S(2)} constant(0)
  ROOT %u = f32[50,100]{1,0} dynamic-update-slice(%a, %half, %zero, %zero)
}
"""  # noqa: E501
    # Ten lines to the chip, none between places there, one back, then five.
    assert traffic.bytes_accessed(text) == (10 + 0 + 1 + 5) * 400


def test_bytes_of_compiled_programs():
    def compiled(f, *shapes):
        shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        return traffic.bytes_accessed(jax.jit(f).lower(*shapes).compile().as_text())

    assert compiled(lambda x: jnp.sin(x) * 2 + 1, (1000, 1000)) == 8_000_000
    assert compiled(lambda x, y: x @ y, (64, 32), (32, 16)) == 4 * (64 * 32 + 32 * 16 + 64 * 16)

    def turns(n):
        def f(x, y):
            return jax.lax.fori_loop(0, n, lambda _, x: jnp.sin(x @ y), x)

        return compiled(f, (64, 64), (64, 64))

    a_turn = (turns(9) - turns(5)) / 4
    product, sine = 3 * 4 * 64 * 64, 2 * 4 * 64 * 64
    assert product + sine <= a_turn <= product + 2 * sine  # a copy of the carry, at most
    assert turns(5) - turns(2) == pytest.approx(3 * a_turn, rel=1e-3)


# Operations of a traced function.


def test_matmul_flops():
    def flops(f, *shapes):
        shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        return measure.matmul_flops(jax.make_jaxpr(f)(*shapes).jaxpr)

    def chain(x, ys):
        return jax.lax.scan(lambda x, y: (jnp.tanh(x @ y), None), x, ys)[0].sum()

    product = 2 * 3 * 5 * 5
    assert flops(chain, (3, 5), (7, 5, 5)) == 7 * product
    assert flops(jax.grad(chain, (0, 1)), (3, 5), (7, 5, 5)) == 3 * 7 * product

    def remat(x, y):
        return jax.checkpoint(lambda x: jnp.tanh(jnp.tanh(x @ y) @ y))(x).sum()

    # Forward 2, forward again 2, backward to x 2.
    assert flops(jax.grad(remat), (3, 5), (5, 5)) == 6 * product
    assert flops(lambda x, y: jnp.einsum("bij,bkj->bik", x, y), (4, 3, 5), (4, 6, 5)) == (
        2 * 4 * 3 * 5 * 6
    )

    def patches(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    forward = 2 * 2 * 4 * 4 * 6 * (4 * 4 * 3)
    assert flops(patches, (2, 16, 16, 3), (4, 4, 3, 6)) == forward
    gradient = jax.grad(lambda kernel, x: (patches(x, kernel) ** 2).sum())
    assert flops(gradient, (4, 4, 3, 6), (2, 16, 16, 3)) == 2 * forward


def test_flops_of_the_step_do_not_depend_on_chunks(tiny_config):
    whole, _ = traced_flops(tiny_config)
    tiny_config.loss.prototype_chunk = 8
    assert traced_flops(tiny_config)[0] == whole


# Floors, errors of the compiler.


def test_floor():
    facts = {"topology": "v5e:2x4", "bytes_accessed": 819e9 // 10, "flops": 197e12 // 100}
    result = measure.floor(facts, batch_size=512, total_steps=36_000)
    assert result["floor_seconds"] == pytest.approx(0.1)
    assert result["floor_images_per_second"] == pytest.approx(5120)
    assert result["floor_hours"] == pytest.approx(1)
    facts["flops"] = 197e12
    assert measure.floor(facts, batch_size=512, total_steps=1)["floor_seconds"] == pytest.approx(1)


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


# The search, on a chip whose memory is a line in the batch.


@pytest.mark.parametrize("bend", [0, 1.5, -1.5])
@pytest.mark.parametrize("room", [3, 9, 31, 100, 131, 1000])
def test_largest_batch(room, bend):
    tried = []

    def attempt(batch):
        tried.append(batch)
        peak = 2 + batch + (bend * math.sqrt(batch) if batch > 16 else 0)
        return {"batch": batch, "peak_bytes": peak, "hbm_bytes": room, "fits": peak <= room}

    found = largest_batch(attempt, limit=256)
    fitting = [b for b in range(8, 257, 8) if 2 + b + (bend * b**0.5 if b > 16 else 0) <= room]
    assert (found and found["batch"]) == (max(fitting) if fitting else None)
    assert len(tried) == len(set(tried)) <= 6


def test_search():
    def attempt(batch, *, remat, accum_steps):
        peak = batch // accum_steps * {"none": 4, "dots": 2, "block": 1}[remat] + (accum_steps > 1)
        return {
            "per_chip_batch": batch, "accum_steps": accum_steps, "remat": remat,
            "peak_bytes": peak, "hbm_bytes": 100, "fits": peak <= 100,
        }  # fmt: skip

    none, dots, block = search({"per_chip_batch": 48}, attempt)
    assert none["largest"]["per_chip_batch"] == 24
    # Two parts of 24 would do but for the gradients that wait.
    assert none["recipe"]["accum_steps"] == 2 and none["recipe"]["peak_bytes"] == 97
    assert dots["largest"]["per_chip_batch"] == 48 and dots["recipe"]["accum_steps"] == 1
    assert block["largest"]["per_chip_batch"] == 96 and block["recipe"]["accum_steps"] == 1


# The command.


def test_plan_for_this_machine(tiny_config, monkeypatch):
    # What is asked of the program does not depend on how well its loops are compiled.
    quick = " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"] + quick)
    facts = plan(tiny_config, "cpu", num_images=6000, batch_per_chip=2)
    assert set(facts) > KEYS
    assert facts["chips"] == 4 and facts["per_chip_batch"] == 2  # 4 virtual devices, as in here

    flops, state = traced_flops(tiny_config)
    assert facts["flops"] == flops
    params = jax.jit(functools.partial(jax.tree.map, lambda x: jnp.zeros(x.shape, x.dtype)))(
        state.params
    )
    real = sum(np.asarray(x).nbytes for x in jax.tree.leaves(params))
    assert facts["parameter_bytes"] == facts["teacher_bytes"] == real
    assert facts["optimizer_bytes"] == pytest.approx(2 * real, abs=64)  # and Adam's counters
    batch_bytes = 2 * (28 * 28 * 3 + 2 * 4)
    centers = 2 * 32 * 4
    assert facts["argument_bytes"] == pytest.approx(4 * real + batch_bytes + centers, abs=128)
    assert facts["peak_bytes"] > facts["argument_bytes"] and facts["fits"]
    assert facts["bytes_accessed"] > facts["argument_bytes"]
    assert facts["floor_seconds"] is facts["floor_images_per_second"] is None


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections
def test_command(monkeypatch, capsys):
    facts = dict.fromkeys(sorted(KEYS), 1.0) | {"topology": "v5e:2x4", "floor_seconds": None}
    facts |= dict.fromkeys(
        ("remat", "accum_steps", "parameter_bytes", "optimizer_bytes", "teacher_bytes",
         "floor_hours"), 3 * 2**20
    )  # fmt: skip
    given = []
    monkeypatch.setattr(plan_module, "plan", lambda *a, **k: given.append((a, k)) or facts)
    arguments = ["--config=configs/quickstart.py", "--config.remat=dots", "--topology=v5e:2x4"]
    main([*arguments, "--batch_per_chip=5", "--json"])
    assert json.loads(capsys.readouterr().out) == facts
    (((config,), fields),) = given
    assert config.remat == "dots"
    assert fields == {
        "topology": "v5e:2x4",
        "num_images": 1_281_167,
        "quick": False,
        "batch_per_chip": 5,
    }
    main(arguments)
    printed = capsys.readouterr().out
    assert "parameters, MiB" in printed and "3.0" in printed


@pytest.mark.parametrize("topology", ["v9:2x2", "v5e", "v5e:", "v5e:0x4", "tpu", "v4:2x2x1x1"])
def test_unknown_topology(tiny_config, topology):
    with pytest.raises(UserError, match=rf"{topology} is unknown; known are cpu and v2, .*v7x"):
        plan(tiny_config, topology)


def test_without_libtpu(tiny_config, monkeypatch):
    monkeypatch.setattr(measure.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'install it with pip install "esvit_jax\[tpu\]"'):
        plan(tiny_config, "v5e:2x4")


def test_batch_that_cannot_be(tiny_config):
    with pytest.raises(UserError, match="batch_per_chip=0"):
        plan(tiny_config, "cpu", batch_per_chip=0)


def test_environment():
    types = {
        "v5e:2x4": "v5litepod-8", "v4:2x2x1": "v4-8", "v5p:4x8x8": "v5p-512", "v6e:16x16": "v6e-256"
    }  # fmt: skip
    for topology, name in types.items():
        assert measure.environment(topology)["TPU_ACCELERATOR_TYPE"] == name


def test_chips():
    assert list(CHIPS) == ["v2", "v3", "v4", "v5e", "v5p", "v6e", "v7x"]
    for chip in CHIPS.values():
        assert 2**34 <= chip.memory <= 2**38 and 5e11 < chip.bandwidth < 1e13
        assert 40 < chip.peak_flops / chip.bandwidth < 600


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:1x1", "v4:2x2x1"])
def test_plan_for_a_tpu(tiny_config, topology):
    pytest.importorskip("libtpu")
    facts = plan(tiny_config, topology, num_images=6000, batch_per_chip=8)
    chips = {"v5e:1x1": 1, "v4:2x2x1": 4}[topology]
    tiny_config.batch_size = 8 * chips
    assert facts["flops"] == traced_flops(tiny_config, devices=chips)[0]
    assert facts["chips"] == chips and facts["fits"]
    assert facts["argument_bytes"] > 4 * facts["parameter_bytes"]  # padding only adds
    # State and canvases are read, and the new state is written, at least once.
    assert facts["bytes_accessed"] >= 2 * 4 * facts["parameter_bytes"]
    chip = CHIPS[topology.partition(":")[0]]
    assert facts["floor_seconds"] == pytest.approx(facts["bytes_accessed"] / chip.bandwidth)
