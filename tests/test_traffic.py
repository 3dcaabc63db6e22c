"""Bytes of HLO texts and of compiled programs against counts by hand."""

import jax
import jax.numpy as jnp
import pytest

from esvit_jax.planning import traffic
from esvit_jax.planning.hlo import Module, shape_bytes


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
    assert shape_bytes(shape) == expected


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
        return traffic.bytes_accessed(jax.jit(f).lower(*shapes).compile().as_text() or "")

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


def test_what_is_executed_adds_up():
    executed = list(traffic.Traffic(Module(LOOP)).executed())
    assert [(x.instruction.name, x.times, x.bytes) for x in executed] == [
        ("row", 6, 800),
        ("new", 6, 1200),
        ("next", 6, 0),
    ]
    assert executed[0].instruction.op_name == "a(b)/c" and executed[1].instruction.op_name == ""
    assert sum(x.times * x.bytes for x in executed) == traffic.bytes_accessed(LOOP)


def test_of_a_conditional_the_largest_branch_counts():
    text = """HloModule m

%few (p: f32[10]) -> f32[10] {
  %p = f32[10]{0} parameter(0)
  ROOT %n = f32[10]{0} negate(%p)
}

%many (p: f32[10]) -> f32[10] {
  %p = f32[10]{0} parameter(0)
  %n = f32[10]{0} negate(%p)
  ROOT %m = f32[10]{0} negate(%n)
}

ENTRY %main (i: s32[], x: f32[10]) -> f32[10] {
  %i = s32[]{:S(2)} parameter(0)
  %x = f32[10]{0} parameter(1)
  ROOT %c = f32[10]{0} conditional(%i, %x, %x), branch_computations={%few, %many}
}
"""
    assert traffic.bytes_accessed(text) == 2 * 80
