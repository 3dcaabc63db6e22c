"""The compiler's estimates of HLO texts written by hand: what is counted, and in which row."""

import dataclasses
import json

import pytest
from test_search import made_up_plan

from esvit_jax.errors import UserError
from esvit_jax.models.kernels.layout import Layout
from esvit_jax.models.kernels.metadata import Call
from esvit_jax.planning import measure
from esvit_jax.planning.breakdown import Part, breakdown, costliest, part_of
from esvit_jax.planning.chips import CHIPS
from esvit_jax.planning.cycles import collective_bytes, costs, scheduled_cycles
from esvit_jax.planning.estimate import expected
from esvit_jax.planning.hlo import Module
from esvit_jax.planning.kernel_rule import RULES

V5E = CHIPS["v5e"]
PROGRAM = """HloModule step, is_scheduled=true

%double (a: f32[256,128]) -> f32[256,128] {
  %a = f32[256,128]{1,0:T(8,128)} parameter(0)
  ROOT %d = f32[256,128]{1,0:T(8,128)} add(%a, %a), metadata={op_name="jit(f)/transpose(jvp(N))/N/layers_0/blocks_1/mlp/add"}
}

%body (p: (s32[], f32[256,128])) -> (s32[], f32[256,128]) {
  %p = (s32[]{:S(2)}, f32[256,128]{1,0:T(8,128)}) parameter(0)
  %n = s32[]{:S(2)} get-tuple-element(%p), index=0
  %x = f32[256,128]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %f = f32[256,128]{1,0:T(8,128)} fusion(%x), kind=kLoop, calls=%double, metadata={op_name="jit(f)/jvp(N)/N/layers_0/blocks_1/attn/qkv/dot_general"}, backend_config={"window_config":{"estimated_cycles":"1000"}}
  %one = s32[]{:S(2)} constant(1)
  %next = s32[]{:S(2)} add(%n, %one)
  ROOT %t = (s32[]{:S(2)}, f32[256,128]{1,0:T(8,128)}) tuple(%next, %f)
}

%until (p: (s32[], f32[256,128])) -> pred[] {
  %p = (s32[]{:S(2)}, f32[256,128]{1,0:T(8,128)}) parameter(0)
  %n = s32[]{:S(2)} get-tuple-element(%p), index=0
  %bound = s32[]{:S(2)} constant(6)
  ROOT %less = pred[]{:S(2)} compare(%n, %bound), direction=LT
}

ENTRY %main (x: f32[256,128]) -> f32[256,128] {
  %x = f32[256,128]{1,0:T(8,128)} parameter(0)
  %zero = s32[]{:S(2)} constant(0)
  %start = (s32[]{:S(2)}, f32[256,128]{1,0:T(8,128)}) tuple(%zero, %x)
  %loop = (s32[]{:S(2)}, f32[256,128]{1,0:T(8,128)}) while(%start), condition=%until, body=%body
  %y = f32[256,128]{1,0:T(8,128)} get-tuple-element(%loop), index=1
  %nameless = f32[256,128]{1,0:T(8,128)} fusion(%y), kind=kLoop, calls=%double, backend_config={"window_config":{"estimated_cycles":"70"}}
  %fetch = (f32[256,128]{1,0:T(8,128)S(1)}, f32[256,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%nameless)
  %here = f32[256,128]{1,0:T(8,128)S(1)} copy-done(%fetch)
  %attend.3 = f32[256,128]{1,0:T(8,128)} custom-call(%here), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/N.forward/N/layers_0/blocks_0/attn/pallas_call"}
  ROOT %sum = f32[256,128]{1,0:T(8,128)} all-reduce(%attend.3), replica_groups={{0,1,2,3}}, to_apply=%add, metadata={op_name="jit(f)/psum"}
}
"""  # noqa: E501
ARRAY = 256 * 128 * 4


def program_costs(**fields):
    return list(costs(Module(PROGRAM), V5E, 4, **fields))


def test_cycles_count_as_often_as_they_are_spent():
    spent = {x.instruction.name: (x.times, x.cycles) for x in program_costs()}
    clock = 197e12 / (4 * 2 * 128**2)
    assert spent == {
        "f": (6, 1000),
        "next": (6, 0),
        "nameless": (1, 70),
        "fetch": (1, 0),  # beside the rest
        "attend.3": (1, round(ARRAY * clock / 819e9)),  # its result alone: the operand is there
        "sum": (1, round(2 * 3 / 4 * ARRAY * clock / 200e9)),
    }


SHARDS = """HloModule fsdp, is_scheduled=true

%beside (w: bf16[32,128]) -> bf16[256,128] {
  %w = bf16[32,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %gather = bf16[256,128]{1,0:T(8,128)(2,1)} all-gather(%w), channel_id=7, dimensions={0}
}

ENTRY %main (w: bf16[32,128], g: f32[256,128]) -> f32[32,128] {
  %w = bf16[32,128]{1,0:T(8,128)(2,1)} parameter(0)
  %g = f32[256,128]{1,0:T(8,128)} parameter(1)
  %first = bf16[256,128]{1,0:T(8,128)(2,1)} fusion(%w), kind=kCustom, calls=%beside, backend_config={"window_config":{"estimated_cycles":"40"}}
  %second = bf16[256,128]{1,0:T(8,128)(2,1)} fusion(%w), kind=kCustom, calls=%beside, backend_config={"window_config":{"estimated_cycles":"50"}}
  ROOT %mine = f32[32,128]{1,0:T(8,128)} reduce-scatter(%g), channel_id=8, dimensions={0}, to_apply=%add
}
"""  # noqa: E501


def test_collectives_count_once_by_what_crosses_the_links():
    module = Module(SHARDS)
    gathered, scattered = 7 / 8 * 256 * 128 * 2, 7 / 8 * 256 * 128 * 4
    assert collective_bytes(module, 8) == gathered + scattered
    one_channel = Module(SHARDS.replace("channel_id=8", "channel_id=7"))
    assert collective_bytes(one_channel, 8) == gathered + scattered
    spent = {x.instruction.name: x.cycles for x in costs(module, V5E, 8)}
    assert spent == {"first": 40, "second": 50, "mine": round(scattered * V5E.clock / 200e9)}
    assert collective_bytes(Module(PROGRAM), 4) == 2 * 3 / 4 * ARRAY


def test_a_kernel_takes_what_its_schedule_says_if_its_bytes_take_less():
    def kernel(cycles, chip=V5E):
        table = {"attend": lambda call: cycles * len(call.operands)}
        found = costs(Module(PROGRAM), chip, 4, kernel_cycles=table)
        spent = {x.instruction.name: x.cycles for x in found}
        return spent["attend.3"]

    assert kernel(cycles=5000) == 5000
    assert kernel(cycles=5) == 241
    assert kernel(cycles=5000, chip=CHIPS["v4"]) == 8000  # of more bundles


def test_a_kernel_counts_by_its_metadata():
    """Which jax writes in several lines; one alone would be no instruction."""
    call = Call(Layout(6, 6, None, 0, 12, 32, padding_key=True), maps=256, maps_per_program=32)
    metadata = json.dumps(call.metadata(), indent=0, separators=(",", ":"))
    told = f'"tpu_custom_call", frontend_attributes={{kernel_metadata={metadata}}}'
    entry = Module(PROGRAM.replace('"tpu_custom_call"', told)).computations["main"]
    kernel = entry.instructions["attend.3"]
    assert Call.of(kernel.attributes) == call and kernel.op_name.endswith("attn/pallas_call")
    assert scheduled_cycles(kernel) == 0  # its name is not one of ours
    ours = dataclasses.replace(kernel, name="backward_kernel.3")
    assert scheduled_cycles(ours) == RULES["backward_kernel"].cycles(call) > 10**5
    assert Call.of(Module(PROGRAM).computations["main"].instructions["attend.3"].attributes) is None


def test_every_cycle_and_byte_is_in_one_row():
    all_costs = program_costs(kernel_cycles={"attend": lambda _: 5000})
    rows = breakdown(all_costs, Module(PROGRAM))
    assert [row for row in rows if row.cycles or row.bytes] == [
        Part("window attention, student forward", 6000, 6 * 2 * ARRAY),
        Part("window attention, teacher", 5000, ARRAY),
        Part("MLPs", 70, 2 * ARRAY),
        Part("optimiser, teacher, copies, prefetches", 1478, 3 * ARRAY),
    ]
    assert sum(row.cycles for row in rows) == sum(x.times * x.cycles for x in all_costs)
    assert sum(row.bytes for row in rows) == sum(x.times * x.bytes for x in all_costs)
    first, second = costliest(all_costs, Module(PROGRAM), 2)
    assert (first.instruction, first.times, first.cycles) == ("f", 6, 6000)
    assert second.origin.endswith("attn/pallas_call")


@pytest.mark.parametrize(
    ("origin", "part"),
    [
        ("jit(f)/transpose(jvp(E))/E/backbone/layers_0/blocks_1/attn/proj/dot_general",
         "window attention, student backward"),
        ("jit(f)/jvp(E)/E/backbone/layers_2/blocks_1/attn/transpose",
         "window attention, student forward"),
        ("jit(f)/E.forward/E/backbone/layers_0/blocks_0/attn/sub", "window attention, teacher"),
        ("jit(f)/E.forward/E/backbone/layers_0/blocks_0/mlp/fc1/dot_general", "MLPs"),
        ("jit(f)/jvp(E)/E/backbone/layers_0/blocks_0/norm1/mul", "norms of blocks"),
        ("jit(f)/jvp(E)/E/backbone/layers_0/blocks_0/drop_path1/div", "norms of blocks"),
        ("jit(f)/jvp(E)/E/backbone/layer1_0/norm_embed/mul", "patch embedding, views, heads"),
        ("jit(f)/jvp(E)/E/backbone/layer3_10/norm/mul", "norms of blocks"),
        ("jit(f)/jvp(E)/E/backbone/layers_0/downsample/reduction/dot_general", "patch merging"),
        # A CvT's.
        ("jit(f)/jvp(E)/E/backbone/stage1_1/layers_0_0/fn/qkv/dw/mul",
         "window attention, student forward"),
        ("jit(f)/jvp(E)/E/backbone/stage1_1/layers_0_1/fn/net_2/dot_general", "MLPs"),
        ("jit(f)/jvp(E)/E/backbone/stage1_1/layers_0_1/norm/mul", "norms of blocks"),
        ("jit(f)/jvp(E)/E/backbone/stage1_1/layers_0_2/div", "norms of blocks"),
        ("jit(f)/jvp(E)/E/backbone/stage1_0/proj/conv_general_dilated", "patch merging"),
        ("jit(f)/jvp(E)/E/backbone/stage0_0/norm/mul", "patch embedding, views, heads"),
        ("jit(f)/jvp()/while/body/closed_call/sub", "prototypes"),
        ("jit(f)/shard_map/d,kd->k/dot_general", "prototypes"),
        ("jit(f)/transpose(jvp(tvbnd,vbnd->tvbn))/dot_general", "prototypes"),
        ("jit(f)/jvp(E)/E/E._head_output/view_head.prototypes/last_layer/jit(norm)", "prototypes"),
        ("jit(f)/jvp(E)/E/E._head_output/view_head/mlp_0/dot_general",
         "patch embedding, views, heads"),
        ("jit(f)/jvp(E)/E/backbone/patch_embed/norm/mul", "patch embedding, views, heads"),
        ("jit(f)/vmap(vmap())/while/body/closed_call/gather", "patch embedding, views, heads"),
        ("jit(f)/jit(_where)/select_n", "optimiser, teacher, copies, prefetches"),
        ("jit(f)/mul", "optimiser, teacher, copies, prefetches"),
        ("jit(f)/shard_map/sub", "optimiser, teacher, copies, prefetches"),
        ("jit(f)/shard_map/jit(_where)/select_n;jit(f)/vmap()/mul",
         "optimiser, teacher, copies, prefetches"),
        ("", "optimiser, teacher, copies, prefetches"),
        ("flat_args[12]", "optimiser, teacher, copies, prefetches"),
        ("jit(f)/something(new)/mul", "other"),
    ],
)  # fmt: skip
def test_parts(origin, part):
    assert part_of(origin) == part


def test_clocks():
    clocks = {name: chip.clock / 1e9 for name, chip in CHIPS.items()}
    assert clocks["v5e"] == pytest.approx(1.5, abs=0.01)
    assert clocks["v4"] == pytest.approx(1.05, abs=0.01)
    assert (clocks["v5p"], clocks["v6e"]) == pytest.approx((1.75, 1.75), abs=0.01)
    assert all(0.7 < clock < 2.3 for clock in clocks.values())


def test_what_is_expected_of_517_million_cycles():
    # Swin-T on v5e: 0.344 s, and 93 images a second and chip.
    operations = round(0.077 * 0.344 * 197e12)
    result = expected(V5E, 517_000_000, operations, batch_size=8 * 32, total_steps=1000)
    assert result.estimated_seconds == pytest.approx(0.344, abs=1e-3)
    assert result.estimated_images_per_second == pytest.approx(8 * 93, abs=1)
    assert result.estimated_mfu == pytest.approx(0.077, abs=1e-3)
    assert result.estimated_hours == pytest.approx(0.344 / 3.6, abs=1e-3)


def test_a_kept_program_is_accounted_for_again(tmp_path):
    pytest.importorskip("libtpu")
    plan = dataclasses.replace(
        made_up_plan(8, peak=1, memory=2), topology="v5e:2x2", chips=4, flops=10**9
    )
    path = tmp_path / "step.hlo"
    measure.keep_program(str(path), PROGRAM, plan, {"batch_size": 32, "total_steps": 100})
    assert [file.name for file in tmp_path.iterdir()] == ["step.hlo"]
    again = measure.account_again(path, top=1)
    assert again.estimated_cycles == 6000 + 70 + 241 + 1478
    assert again.bytes_accessed == 18 * ARRAY
    assert again.costliest and again.costliest[0].instruction == "f"
    assert again == type(plan).from_json(json.loads(json.dumps(again.as_json())))
    assert measure.account_again(path).costliest == []


@pytest.mark.parametrize("text", ["", "HloModule m\n", "// {}\nHloModule m\n", "// []\n"])
def test_files_without_a_program(tmp_path, text):
    path = tmp_path / "x"
    path.write_text(text)
    with pytest.raises(UserError, match="^path = .*x': there is no program in it"):
        measure.account_again(path)
    with pytest.raises(UserError, match="there is no program in it"):
        measure.account_again(tmp_path / "missing")
