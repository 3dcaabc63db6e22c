"""How many maps a program takes, what it holds in vector memory, and its call."""

import functools
import math
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from esvit_jax.models.kernels.basics import F32
from esvit_jax.models.kernels.blocks import Blocks
from esvit_jax.models.kernels.layout import LANES, Layout
from esvit_jax.models.kernels.metadata import Call


def fewest_maps(layout: Layout) -> int:
    """Rows of a block are a multiple of 8."""
    return next(count for count in range(1, 9) if count * layout.tokens % 8 == 0)


def maps_per_program(layout: Layout, maps: int, dtype: Any) -> int:
    """As many as make up 32 rows of windows, if there is room: two turns more are without use."""
    count = least = fewest_maps(layout)
    while (count + least) * layout.windows[0] <= 32 and (
        memory(layout, count + least, dtype) <= layout.room
    ):
        count += least
    return min(count, maps)


def call(
    kernel: Any, blocks: Blocks, maps: int, rows: list[Any], whole: list[Any], out: Any,
    others: list[Any], scratch: list[Any], interpret: bool,
) -> Any:  # fmt: skip
    """`rows` and `out`, [maps * tokens, ..], are cut into programs; `whole`, `others` are not."""

    def cut(x: Any) -> pl.BlockSpec:
        return pl.BlockSpec((blocks.used, x.shape[1]), lambda i: (i, 0))

    def keep(x: Any) -> pl.BlockSpec:
        return pl.BlockSpec(x.shape, lambda i: (0,) * x.ndim)

    return pl.pallas_call(
        functools.partial(kernel, blocks=blocks, maps=maps),
        grid=(-(-maps // blocks.maps),),
        in_specs=[*map(cut, rows), *map(keep, whole)],
        out_specs=[cut(out), *map(keep, others)],
        out_shape=[out, *others],
        scratch_shapes=[pltpu.VMEM(shape, dtype) for shape, dtype in scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=100 * 2**20
        ),
        interpret=interpret,
        metadata=Call(blocks.layout, maps, blocks.maps).metadata(),
        name=kernel.__name__.strip("_"),
    )(*rows, *whole)


def masked(layout: Layout, bias: Any) -> Any:
    """f32[kinds, units, rows, group_rows]: the bias for each kind of window (`_kind`)."""
    return bias + layout.masks()[:, None] if layout.shift else bias[None]


def padding_rows(layout: Layout, row: Any) -> Any:
    """[1, 3 features] -> f32[planes, 128]."""
    room = layout.tiles * LANES - layout.features
    row = jnp.pad(row.astype(F32).reshape(3, -1), ((0, 0), (0, room)))
    return row.reshape(3 * layout.tiles, LANES)


def scratch_of(blocks: Blocks, dtype: Any) -> tuple[Any, ...]:
    """(shape, dtype) of planes, logits, queries by head and turned keys of a row of windows."""
    layout, columns = blocks.layout, blocks.layout.windows[1]
    return (
        ((layout.tiles, blocks.scratch_rows, LANES), F32),
        ((columns, layout.units, layout.rows, layout.lanes), F32),
        ((columns, layout.units, layout.lanes, LANES), dtype),
        ((columns * layout.tiles, LANES, layout.rows), dtype),
        ((columns * layout.tiles, LANES, layout.lanes), dtype),
    )


def times(count: int, planes: Any) -> Any:
    """`count` arrays of planes in one."""
    (tiles, *shape), dtype = planes
    return (count * tiles, *shape), dtype


def fits(layout: Layout, dtype: Any) -> bool:
    """Whether there is room for the fewest maps of a program."""
    return memory(layout, fewest_maps(layout), dtype) <= layout.room


def memory(layout: Layout, maps: int, dtype: Any) -> int:
    """Bytes of a core's vector memory that the backward kernel takes for so many maps, nearly."""
    blocks = Blocks(layout, maps)
    planes, *others = scratch_of(blocks, dtype)
    size = jnp.dtype(dtype).itemsize
    widths = (3 * layout.features, layout.features, 3 * layout.features)
    lanes = sum(-(-width // LANES) * LANES for width in widths)
    logits, queries, keys, turned = (
        math.prod(shape[:-1]) * -(-shape[-1] // LANES) * LANES * jnp.dtype(kind).itemsize
        for shape, kind in others
    )
    scratch = 7 * math.prod(planes[0]) * 4 + 2 * logits + 2 * queries + keys + turned
    biases = 2 * (4 if layout.shift else 1) + 2
    biases *= layout.units * layout.rows * layout.lanes * 4
    return 2 * blocks.used * lanes * size + scratch + biases
