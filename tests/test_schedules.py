"""Schedules of kernels: what is read of libtpu's files, and what a kernel tells of itself."""

from pathlib import Path

import pytest

from esvit_jax.config import parse_config
from esvit_jax.models.kernels.chunk_layout import ChunkLayout
from esvit_jax.models.kernels.layout import Layout
from esvit_jax.models.kernels.metadata import Call, ChunkCall
from esvit_jax.planning.bundles import Kernel, Loop, Schedule, compile_kernel, read_schedule
from esvit_jax.planning.kernel_rule import ChunkRule, Rule, program_registers, window_registers
from esvit_jax.planning.schedules import all_blocks, backbone_of, cycles_by_rule, fitted
from esvit_jax.planning.topology import parse_topology

EXCERPT = Path(__file__).parent / "data" / "forward_kernel-final_bundles.txt"


def test_loops_of_a_schedule():
    """Counted by hand: lines of three loops, the second of as many turns as there are rows."""
    schedule = read_schedule(EXCERPT.read_text())
    assert schedule.loops == (Loop(9, 0, 18), Loop(13, 2, None), Loop(9, 0, 6))
    assert schedule.once == 61 - 31
    assert schedule.windows.bundles == 13
    # 3 programs of 2 maps of 2 rows of windows, the last one of 1.
    call = Call(Layout(4, 4, 2, 1, 1, 8), maps=5, maps_per_program=2)
    assert (call.programs, call.turns, call.head_windows) == (3, 5 * 2 + 3 * 2, 20)
    assert schedule.cycles(call) == 3 * (30 + 9 * 18 + 9 * 6) + 16 * 13


def test_blocks_of_swin_tiny():
    config, _ = parse_config(["--config=esvit_swin:variant=tiny,window=7"])
    kinds = all_blocks(backbone_of(config), config.views, images=32)
    assert [(x.name, x.maps, x.forward, x.backward) for x in kinds] == [
        ("1, global views", 64, 2, 1),
        ("1, global views, shifted", 64, 2, 1),
        ("2, global views", 64, 2, 1),
        ("2, global views, shifted", 64, 2, 1),
        ("3, global views", 64, 6, 3),
        ("3, global views, shifted", 64, 6, 3),
        ("4, global views", 64, 4, 2),
        ("1, local views", 256, 1, 1),
        ("1, local views, shifted", 256, 1, 1),
        ("2, local views", 256, 1, 1),
        ("2, local views, shifted", 256, 1, 1),
        ("3, local views", 256, 6, 6),
        ("4, local views", 256, 2, 2),
    ]
    layouts = [x.layout for x in kinds]
    assert layouts[1] == Layout(56, 56, 7, 3, 3, 32)
    assert layouts[6] == Layout(7, 7, None, 0, 24, 32)
    assert layouts[8] == Layout(24, 24, 7, 3, 3, 32)
    assert layouts[11] == Layout(6, 6, None, 0, 12, 32, padding_key=True)
    config.views.num_local = 0
    assert len(all_blocks(backbone_of(config), config.views, images=32)) == 7


def test_blocks_of_a_vil():
    """Those of its two sparse stages."""
    config, _ = parse_config(["--config=esvit_vil"])
    kinds = all_blocks(backbone_of(config), config.views, images=32)
    assert [(x.name, x.maps, x.forward, x.backward) for x in kinds] == [
        ("1, global views", 64, 4, 2), ("2, global views", 64, 4, 2),
        ("1, local views", 256, 2, 2), ("2, local views", 256, 2, 2),
    ]  # fmt: skip
    assert kinds[0].layout == ChunkLayout(56, 56, 7, heads=3, dim=32, num_global=1)
    assert kinds[3].layout == ChunkLayout(12, 12, 7, heads=6, dim=32, num_global=1)


RULE = Rule(logits=2, queries=1, padded=4, copies=3)


@pytest.mark.parametrize(
    ("layout", "cycles"),
    [
        # Stage 1 of Swin-T, 32 programs of 2 maps: 576 turns of 8 windows of 2 units of 2 heads
        # in 128 lanes: 14 registers of logits, 32 of queries; 784 registers of maps, twice.
        (Layout(56, 56, 7, 3, 3, 32), 576 * 8 * (14 * 2 + 32) + 32 * 2 * 784 * 3),
        # Padded to 2 rows of 2 windows; 3 units; rows of 192 features take two tiles.
        (Layout(12, 12, 7, 0, 6, 32), 192 * 2 * (21 * 2 + 48 + 14 * 4) + 32 * 36 * 2 * 3),
        # A window of 14 lines of 16 slots: 224 queries in 256 lanes.
        (Layout(14, 14, 14, 0, 4, 32), 128 * (4 * 28 * 2 * 2 + 4 * 32) + 32 * 49 * 3),
    ],
)
def test_cycles_by_rule(layout, cycles):
    assert RULE.cycles(Call(layout, maps=64, maps_per_program=2)) == cycles


def test_a_rule_is_fitted():
    """To bundles that follow one, exactly."""
    kernels = []
    for layout in (
        Layout(56, 56, 7, 3, 3, 32), Layout(14, 14, 14, 0, 4, 32), Layout(12, 12, 7, 3, 6, 32),
    ):  # fmt: skip
        call = Call(layout, maps=8, maps_per_program=2)
        logits, queries, padded = window_registers(layout)
        bundles = layout.windows[1] * (2 * logits + queries + 4 * padded)
        schedule = Schedule(int(3 * program_registers(call)), (Loop(bundles, 0, None),))
        kernels.append(Kernel(call, schedule, 0))
    assert fitted(kernels) == pytest.approx(RULE)


CHUNK_RULE = ChunkRule(logits=6.0, keys=0.5, program=100.0)


def test_cycles_of_chunks_by_rule():
    """8 rows of 4 groups of two chunks, 128 queries, which attend to 3 rows of 4 slots of 64."""
    call = ChunkCall(ChunkLayout(56, 56, 7, heads=3, dim=32, num_global=1), maps=64)
    groups = 64 * 3 * 8 * 4
    assert call.registers == (groups * 96, groups * 24) and call.head_windows == 2 * groups
    assert CHUNK_RULE.cycles(call) == groups * (96 * 6 + 24 / 2) + 64 * 3 * 100


def test_a_rule_of_chunks_is_fitted():
    kernels = []
    for layout in (
        ChunkLayout(56, 56, 7, 3, 32, 1), ChunkLayout(28, 28, 7, 3, 64, 1),
        ChunkLayout(12, 12, 7, 6, 32, 1),
    ):  # fmt: skip
        call = ChunkCall(layout, maps=8)
        kernels.append(Kernel(call, Schedule(CHUNK_RULE.cycles(call) // call.programs, ()), 0))
    assert fitted(kernels) == pytest.approx(CHUNK_RULE)


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("topology", ["v5e:2x2", "v4:2x2x1", "v5p:2x2x1", "v6e:2x2", "v7x:2x2x1"])
def test_a_kernel_of_chunks_is_compiled(topology, direction):
    """For stage 1 of `vil_2262`; on a v5e the rule is within a tenth of the schedule."""
    pytest.importorskip("libtpu")
    layout, target = ChunkLayout(56, 56, 7, 3, 32, 1), parse_topology(topology)
    kernel = compile_kernel(layout, 64, direction, target)
    assert kernel is not None and kernel.call == ChunkCall(layout, 64) and target.chip
    (loop,) = kernel.schedule.loops
    assert loop.turns == 8 and loop.spills < loop.bundles / 2
    assert kernel.memory < 2**24
    by_rule = cycles_by_rule(kernel, direction, target.chip)
    assert abs(by_rule / kernel.cycles - 1) < (0.1 if topology == "v5e:2x2" else 0.5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "direction"),
    [
        ("v5e:2x2", "forward"), ("v5e:2x2", "backward"), ("v4:2x2x1", "backward"),
        ("v5p:2x2x1", "backward"), ("v6e:2x2", "backward"), ("v7x:2x2x1", "backward"),
    ],
)  # fmt: skip
def test_a_kernel_is_compiled(topology, direction):
    pytest.importorskip("libtpu")
    layout = Layout(4, 4, 2, 1, 1, 8)
    kernel = compile_kernel(layout, 64, direction, parse_topology(topology))
    assert kernel is not None
    assert isinstance(kernel.call, Call) and kernel.call == Call(layout, 64, 16)
    assert 50 < kernel.schedule.windows.bundles < 2000
    assert kernel.schedule.copies > 50
    assert kernel.cycles > kernel.call.turns * kernel.schedule.windows.bundles
    assert 2**16 < kernel.memory < 2**24


@pytest.mark.slow
def test_no_kernel_where_auto_takes_none():
    pytest.importorskip("libtpu")
    too_large = Layout(56, 56, 7, 3, 3, 32)
    assert compile_kernel(too_large, 64, "forward", parse_topology("v4:2x2x1")) is None
