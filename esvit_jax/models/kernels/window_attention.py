"""Attention within the windows of maps, as a pair of kernels for TPUs.

XLA's attention of a Swin waits: for copies that cut maps into windows and put them back, and for
logits, which fill a third of the registers that hold them. Here a program takes whole maps as the
projection leaves them, queries, keys and values side by side in rows b h w, and leaves its output
in the same rows: windows, shifts and paddings are addresses. Logits never leave the chip; the
backward pass computes them again (Dao et al. 2022, FlashAttention).

Logits are held transposed, keys along rows and (head, query) along lanes, two heads of 49 tokens
side by side: sums over keys are additions of registers, and the products for values' and keys'
gradients need no transposition. A head's queries are told from its neighbour's by zeros in the
lanes of the other: [(head, query), features of both] has two blocks, and one product with the
keys gives the logits of both heads.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from esvit_jax.models.kernels.basics import F32, by_platform, product
from esvit_jax.models.kernels.blocks import Blocks, each_row, maps_there, pack, unpack
from esvit_jax.models.kernels.layout import LANES, Layout
from esvit_jax.models.kernels.programs import (
    call,
    maps_per_program,
    masked,
    padding_rows,
    scratch_of,
    times,
)


def _lane_of(shape: tuple[int, int], first: int, count: int) -> Any:
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return (lane >= first) & (lane < first + count)


def _by_head(layout: Layout, value: Any, lane: int) -> Any:
    """[rows, 128] -> [lanes, 128]: once for each head, with 0 in all other lanes."""
    pieces = [
        jnp.where(_lane_of(value.shape, lane + g * layout.dim, layout.dim), value, 0.0)
        for g in range(layout.group)
    ]
    if spare := layout.lanes - layout.group * layout.rows:
        pieces.append(jnp.zeros((spare, LANES), value.dtype))
    return jnp.concatenate(pieces, axis=0)


def _rows_of(layout: Layout, turned: Any) -> Any:
    """[128 (head, feature), (head, query)] of a tile's units -> [query, 128]."""
    turned = turned.T.astype(F32)
    rows = turned[: layout.rows]
    # Both are powers of two.
    lane = jax.lax.broadcasted_iota(jnp.int32, rows.shape, 1) & (layout.group * layout.dim - 1)
    for g in range(1, layout.group):
        part = turned[g * layout.rows : (g + 1) * layout.rows]
        rows = jnp.where(lane >= g * layout.dim, part, rows)
    return rows


def _weights(logits: Any, bias: Any) -> Any:
    """softmax over keys of f32[keys, (head, query)]."""
    logits = logits + bias
    exp = jnp.exp(logits - jnp.max(logits, axis=0, keepdims=True))
    return exp * (1.0 / jnp.sum(exp, axis=0, keepdims=True))


def _kind(layout: Layout, y: Any, x: int) -> Any:
    """Which of the masks a window has: a border below, one at the right, both or none."""
    if not layout.shift:
        return 0
    right = int(x == layout.windows[1] - 1)
    return jnp.where(y == layout.windows[0] - 1, 2, 0) + right


def _load_qkv(blocks: Blocks, planes: Any, padding: Any, lines: Any, x: int, tile: int) -> Any:
    """Queries (scaled), keys and values of a window, f32[rows, 128] each."""
    found = []
    for part in range(3):
        plane = part * blocks.layout.tiles + tile
        found.append(blocks.load(planes, plane, lines, x, padding[pl.ds(plane, 1), :]))
    return found[0] * blocks.layout.dim**-0.5, found[1], found[2]


def _turned(layout: Layout, value: Any, dtype: Any) -> Any:
    """f32[rows, 128] -> [128, rows]."""
    # In bfloat16, whole registers of 16 rows are turned.
    if value.shape[0] % 16:
        value = jnp.concatenate([value, jnp.zeros((8, LANES), F32)], axis=0)
    return value.astype(dtype).T[:, : layout.rows]


def _forward_kernel(
    qkv: Any, padding: Any, bias: Any, out: Any, planes: Any, results: Any, logits: Any,
    values: Any, turned: Any, *, blocks: Blocks, maps: int,
) -> None:  # fmt: skip
    layout, dtype = blocks.layout, qkv.dtype
    there = maps_there(blocks, maps)
    unpack(blocks, qkv, planes, 3, padding, there)

    def body(rows: Any, valid: Any) -> None:
        lines = [blocks.lines(*row) for row in rows]
        for job, (x, tile) in enumerate(layout.jobs()):
            blocks.store(results, tile, lines[2], x, _rows_of(layout, turned[job]))
            units = layout.units_of(tile)
            kind = _kind(layout, rows[1][1], x)
            weights = [
                _weights(logits[x, unit], bias[kind, unit]).astype(dtype) for unit, _ in units
            ]
            before = [values[job, pl.ds(lane, layout.group * layout.dim), :] for _, lane in units]
            q, k, v = _load_qkv(blocks, planes, padding, lines[0], x, tile)
            k = k.astype(dtype)
            values[job] = _turned(layout, v, dtype)
            for (unit, lane), w, v in zip(units, weights, before, strict=True):
                queries = _by_head(layout, q, lane).astype(dtype)
                logits[x, unit] = product(k, queries, (1, 1))
                attended = product(v, w, (1, 0)).astype(dtype)
                turned[job, pl.ds(lane, layout.group * layout.dim), :] = attended

    each_row(blocks, there, body)
    pack(blocks, results, out, 1)


def _backward_kernel(
    qkv: Any, d_out: Any, padding: Any, bias: Any, d_qkv: Any, d_padding: Any, d_bias: Any,
    planes: Any, d_planes: Any, results: Any, logits: Any, d_weights: Any, queries: Any,
    d_outs: Any, keys: Any, turned: Any, *, blocks: Blocks, maps: int,
) -> None:  # fmt: skip
    layout, dtype = blocks.layout, qkv.dtype
    tiles, scale = layout.tiles, layout.dim**-0.5
    there = maps_there(blocks, maps)
    unpack(blocks, qkv, planes, 3, padding, there)
    unpack(blocks, d_out, d_planes, 1, None, there)

    @pl.when(pl.program_id(0) == 0)
    def _() -> None:
        d_bias[...] = jnp.zeros_like(d_bias)
        d_padding[...] = jnp.zeros_like(d_padding)

    def finish(lines: Any, job: int, x: int, tile: int) -> None:
        blocks.store(results, tile, lines, x, _rows_of(layout, turned[job]) * scale)

    def go_on(row: Any, valid: Any, lines: Any, job: int, x: int, tile: int) -> Any:
        kind, width = _kind(layout, row[1], x), layout.group * layout.dim
        given = []
        for unit, lane in layout.units_of(tile):
            weights = _weights(logits[x, unit], bias[kind, unit])
            d = d_weights[x, unit]
            d = weights * (d - jnp.sum(weights * d, axis=0, keepdims=True))
            d_bias[unit] += jnp.where(valid, d, 0.0)
            given.append(
                (
                    lane,
                    weights.astype(dtype),
                    d.astype(dtype),
                    d_outs[x, unit],
                    queries[x, unit],
                    keys[job, pl.ds(lane, width), :],
                )
            )

        def products() -> None:
            dk = dv = jnp.zeros((layout.rows, LANES), F32)
            for lane, weights, d, d_o, q, k in given:
                dv += product(weights, d_o, (1, 0))
                dk += product(d, q, (1, 0))
                turned[job, pl.ds(lane, width), :] = product(k, d, (1, 0)).astype(dtype)
            for p, value in ((1, dk), (2, dv)):
                plane = p * tiles + tile
                blocks.store(results, plane, lines, x, value)
                if layout.padded:
                    total = blocks.padding_sum(lines, x, value)
                    d_padding[plane] += jnp.where(valid, total, 0.0)

        return products

    def begin(lines: Any, job: int, x: int, tile: int) -> None:
        q, k, v = _load_qkv(blocks, planes, padding, lines, x, tile)
        d_o = blocks.load(d_planes, tile, lines, x, None)
        keys[job] = _turned(layout, k, dtype)
        k, v = k.astype(dtype), v.astype(dtype)
        for unit, lane in layout.units_of(tile):
            by_head = _by_head(layout, q, lane).astype(dtype)
            queries[x, unit] = by_head
            logits[x, unit] = product(k, by_head, (1, 1))
            by_head = _by_head(layout, d_o, lane).astype(dtype)
            d_outs[x, unit] = by_head
            d_weights[x, unit] = product(v, by_head, (1, 1))

    def body(rows: Any, valid: Any) -> None:
        lines = [blocks.lines(*row) for row in rows]
        for job, (x, tile) in enumerate(layout.jobs()):
            finish(lines[2], job, x, tile)
            products = go_on(rows[1], valid, lines[1], job, x, tile)
            begin(lines[0], job, x, tile)
            products()

    each_row(blocks, there, body)
    pack(blocks, results, d_qkv, 3)


def forward(qkv: Any, padding: Any, bias: Any, layout: Layout, interpret: bool = False) -> Any:
    """`attend`, of a bias as `Layout.bias_rows` lays it."""
    maps = qkv.shape[0] // layout.tokens
    blocks = Blocks(layout, maps_per_program(layout, maps, qkv.dtype))
    out = jax.ShapeDtypeStruct((qkv.shape[0], layout.features), qkv.dtype)
    whole = [padding_rows(layout, padding), masked(layout, bias)]
    planes, logits, _, values, turned = scratch_of(blocks, qkv.dtype)
    scratch = [times(3, planes), planes, logits, values, turned]
    return call(_forward_kernel, blocks, maps, [qkv], whole, out, [], scratch, interpret)[0]


def backward(
    qkv: Any, d_out: Any, padding: Any, bias: Any, layout: Layout, interpret: bool = False
) -> tuple[Any, Any, Any]:
    """Gradients of qkv, padding and (laid) bias, from those of the output."""
    maps = qkv.shape[0] // layout.tokens
    blocks = Blocks(layout, maps_per_program(layout, maps, qkv.dtype))
    whole = [padding_rows(layout, padding), masked(layout, bias)]
    others = [
        jax.ShapeDtypeStruct((3 * layout.tiles, layout.slots, LANES), F32),
        jax.ShapeDtypeStruct(bias.shape, F32),
    ]
    planes, logits, queries, keys, turned = scratch_of(blocks, qkv.dtype)
    scratch = [times(3, planes), planes, times(3, planes)]
    scratch += [logits, logits, queries, queries, keys, turned]
    d_qkv, d_padding, d_bias = call(
        _backward_kernel, blocks, maps, [qkv, d_out], whole,
        jax.ShapeDtypeStruct(qkv.shape, qkv.dtype), others, scratch, interpret,
    )  # fmt: skip
    d_padding = jnp.sum(d_padding, axis=1).reshape(3, -1)[:, : layout.features]
    return d_qkv, d_padding.reshape(padding.shape).astype(padding.dtype), d_bias


# Blocks of the same shape are traced once.
_forward = jax.jit(functools.partial(by_platform, forward), static_argnums=0)
_backward = jax.jit(functools.partial(by_platform, backward), static_argnums=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attend(qkv: Any, padding: Any, bias: Any, layout: Layout) -> Any:
    return _forward(layout, qkv, padding, bias)


def _attend_forward(qkv: Any, padding: Any, bias: Any, layout: Layout) -> Any:
    return _forward(layout, qkv, padding, bias), (qkv, padding, bias)


def _attend_backward(layout: Layout, kept: Any, d_out: Any) -> Any:
    qkv, padding, bias = kept
    return _backward(layout, qkv, d_out, padding, bias)


_attend.defvjp(_attend_forward, _attend_backward)


def attend(
    qkv: Float[Array, "bhw d3"],
    padding: Float[Array, "1 d3"],
    bias: Float[Array, "heads n k"],
    layout: Layout,
) -> Float[Array, "bhw d"]:
    """softmax(scaled query key' + bias + shift mask) value, in each head of each window of maps.

    Args:
      qkv: of all tokens of all maps, row-major; queries, keys and values side by side, heads side
        by side in each.
      padding: what a padded token has in place of a row of qkv; it takes part like any other.
      bias: of relative positions, in float32; k = n + 1 if the layout has a padding key.
      layout: of the maps.

    Returns the tokens' values in the order and the dtype of qkv, heads side by side.

    Raises:
      ValueError: the kernel has no form for heads of these features.
    """
    if not layout.supported:
        raise ValueError(f"no kernel for heads of {layout.dim} features: no power of two up to 128")
    return _attend(qkv, padding, layout.bias_rows(bias.astype(F32)), layout)
