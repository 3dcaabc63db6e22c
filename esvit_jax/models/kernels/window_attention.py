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

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from esvit_jax.models.kernels.layout import LANES, Layout

F32 = jnp.float32


# Products of blocks. The names say which axes of the two factors are summed over.
def _product(a: Any, b: Any, axes: tuple[int, int]) -> Any:
    precision = jax.lax.Precision.HIGHEST if a.dtype == F32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(
        a, b, (((axes[0],), (axes[1],)), ((), ())), precision=precision,
        preferred_element_type=F32,
    )  # fmt: skip


def _lane_of(shape: tuple[int, int], first: int, count: int) -> Any:
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return (lane >= first) & (lane < first + count)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the maps of a program lie in its scratch memory: f32[planes, scratch rows, 128].

    Rows of one tile of lanes lie without gaps, so 8 of them can be loaded from any row on. In
    float32, as rows of bfloat16 come in pairs.
    """

    layout: Layout
    maps: int  # of a program

    @property
    def used(self) -> int:
        """Rows of a program's maps."""
        return self.maps * self.layout.tokens

    @property
    def padding_start(self) -> int:
        """First row of a line of padding; behind it, as before and behind the maps, is room."""
        return -(-(self.used + 2 * self.layout.slots) // 8) * 8

    @property
    def scratch_rows(self) -> int:
        """All rows."""
        room = -(-(self.layout.width + 2 * self.layout.slots) // 8) * 8
        return self.padding_start + (room if self.layout.padded else 0)

    def line_row(self, index: Any, y: Any, line: int) -> tuple[Any, Any]:
        """(row of a line's first column, whether the line is padding) in window row y."""
        layout = self.layout
        covered = layout.windows[0] * layout.lines
        position = y * layout.lines + line + layout.shift
        if layout.shift:
            position = jnp.where(position >= covered, position - covered, position)
        row = layout.slots + index * layout.tokens + position * layout.width
        if covered == layout.height:
            return row, None
        outside = position >= layout.height
        return jnp.where(outside, self.padding_start + layout.slots, row), outside

    def lines(self, index: Any, y: Any) -> list[tuple[Any, Any]]:
        """`line_row` of all lines of window row y of a map."""
        return [self.line_row(index, y, line) for line in range(self.layout.lines)]

    def slot_mask(self, x: int, line: int, padding: bool) -> Any:
        """bool[slots, 128]: the slots of a line that hold tokens (or: padding)."""
        slot = jax.lax.broadcasted_iota(jnp.int32, (self.layout.slots, LANES), 0)
        mask = jnp.zeros(slot.shape, bool)
        for start, count, column in self.layout.segments(x, line == 0):
            if (column is None) == padding:
                mask |= (slot >= start) & (slot < start + count)
        return mask

    def load(self, ref: Any, plane: int, lines: Any, x: int, padding: Any) -> Any:
        """f32[rows, 128] of a window; `padding` f32[1, 128] fills in, or (None) 0 everywhere."""
        slots = self.layout.slots
        pieces = []
        for line, (row, _) in enumerate(lines):
            slot = jax.lax.broadcasted_iota(jnp.int32, (slots, LANES), 0)
            piece = None
            for start, _, column in self.layout.segments(x, line == 0):
                if column is None:
                    part = None if padding is None else jnp.broadcast_to(padding, (slots, LANES))
                else:
                    part = ref[plane, pl.ds(row + (column - start), slots), :]
                if part is not None:
                    piece = part if piece is None else jnp.where(slot >= start, part, piece)
            assert piece is not None
            if padding is None:
                piece = jnp.where(self.slot_mask(x, line, False), piece, 0.0)
            pieces.append(piece)
        return jnp.concatenate(pieces, axis=0)

    def store(self, ref: Any, plane: int, lines: Any, x: int, value: Any) -> None:
        """Puts the tokens of f32[rows, 128] back; those of padded lines go to the padding."""
        for line, (row, _) in enumerate(lines):
            for start, count, column in self.layout.segments(x, line == 0):
                if column is not None:
                    first = line * self.layout.slots + start
                    ref[plane, pl.ds(row + column, count), :] = value[first : first + count]

    def padding_sum(self, lines: Any, x: int, value: Any) -> Any:
        """f32[slots, 128]: what of f32[rows, 128] belongs to padding, summed over lines."""
        total = jnp.zeros((self.layout.slots, LANES), F32)
        for line, (_, outside) in enumerate(lines):
            mask = self.slot_mask(x, line, True)
            if outside is not None:
                mask |= self.slot_mask(x, line, False) & outside
            first = line * self.layout.slots
            total += jnp.where(mask, value[first : first + self.layout.slots], 0.0)
        return total


def _unpack(
    blocks: Blocks, source: Any, scratch: Any, parts: int, padding: Any, there: Any
) -> None:
    """Rows of `parts` times the features into planes; room around them finite."""
    layout = blocks.layout
    features, tiles, margin = layout.features, layout.tiles, layout.slots

    def planes(rows: Any) -> list[Any]:
        found = []
        for part in range(parts):
            for tile in range(tiles):
                first = part * features + tile * LANES
                width = min(LANES, (part + 1) * features - first)
                piece = rows[:, first : first + width]
                if width < LANES:
                    piece = jnp.pad(piece, ((0, 0), (0, LANES - width)))
                found.append(piece)
        return found

    def copy(start: Any, count: int) -> None:
        rows = source[pl.ds(start, count), :].astype(F32)
        for plane, piece in enumerate(planes(rows)):
            scratch[plane, pl.ds(margin + start, count), :] = piece

    _in_chunks(blocks.used, copy)
    for plane in range(parts * tiles):
        empty = jnp.zeros((margin, LANES), F32)
        scratch[plane, pl.ds(0, margin), :] = empty
        scratch[plane, pl.ds(margin + there * layout.tokens, margin), :] = empty
        if layout.padded:
            row = empty[:1] if padding is None else padding[pl.ds(plane, 1), :]
            room = blocks.scratch_rows - blocks.padding_start
            scratch[plane, pl.ds(blocks.padding_start, room), :] = jnp.broadcast_to(
                row, (room, LANES)
            )


def _pack(blocks: Blocks, scratch: Any, target: Any, parts: int) -> None:
    """Planes into rows of `parts` times the features."""
    layout = blocks.layout
    features, tiles, margin = layout.features, layout.tiles, layout.slots

    def copy(start: Any, count: int) -> None:
        rows = []
        for part in range(parts):
            for tile in range(tiles):
                width = min(LANES, features - tile * LANES)
                piece = scratch[part * tiles + tile, pl.ds(margin + start, count), :]
                rows.append(piece[:, :width])
        target[pl.ds(start, count), :] = jnp.concatenate(rows, axis=1).astype(target.dtype)

    _in_chunks(blocks.used, copy)


def _in_chunks(rows: int, copy: Any, chunk: int = 112) -> None:
    """copy(first row, number of rows) over all rows, `chunk` at a time."""

    def body(i: Any, carry: Any) -> Any:
        copy(pl.multiple_of(i * chunk, chunk), chunk)
        return carry

    if rows >= chunk:
        jax.lax.fori_loop(0, rows // chunk, body, None)
    if rows % chunk:
        copy(rows - rows % chunk, rows % chunk)


def _maps_there(blocks: Blocks, maps: int) -> Any:
    """Maps of this program: the last one may have fewer than others."""
    return jnp.minimum(blocks.maps, maps - pl.program_id(0) * blocks.maps)


def _each_row(blocks: Blocks, there: Any, body: Any) -> None:
    """body(rows, valid): rows of windows, (map, y), of all maps that there are, in a pipeline.

    Each turn begins rows[0], goes on with rows[1], begun in the turn before, and finishes rows[2],
    so that its three parts do not wait for each other. At both ends a turn has less to do: it
    does something twice then, or with what memory holds; `valid` is false if rows[1] is that.
    """
    count = blocks.layout.windows[0]
    total = there * count

    def turn(t: Any, carry: Any) -> Any:
        rows = []
        for lag in range(3):
            i = jnp.clip(t - lag, 0, total - 1)
            rows.append((i, 0) if count == 1 else (jax.lax.div(i, count), jax.lax.rem(i, count)))
        body(rows, (t >= 1) & (t <= total))
        return carry

    jax.lax.fori_loop(0, total + 2, turn, None)


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


def _jobs(layout: Layout) -> list[tuple[int, int]]:
    return [(x, tile) for x in range(layout.windows[1]) for tile in range(layout.tiles)]


def _load_qkv(blocks: Blocks, planes: Any, padding: Any, lines: Any, x: int, tile: int) -> Any:
    """Queries (scaled), keys and values of a window, f32[rows, 128] each."""
    found = []
    for part in range(3):
        plane = part * blocks.layout.tiles + tile
        found.append(blocks.load(planes, plane, lines, x, padding[pl.ds(plane, 1), :]))
    return found[0] * blocks.layout.dim**-0.5, found[1], found[2]


def _turned(layout, value: Any, dtype: Any) -> Any:
    if value.shape[0] % 16:
        value = jnp.concatenate([value, jnp.zeros((8, LANES), F32)], axis=0)
    return value.astype(dtype).T[:, :layout.rows]


def _forward_kernel(
    qkv: Any, padding: Any, bias: Any, out: Any, planes: Any, results: Any, logits: Any,
    values: Any, turned: Any, *, blocks: Blocks, maps: int,
) -> None:  # fmt: skip
    layout, dtype = blocks.layout, qkv.dtype
    there = _maps_there(blocks, maps)
    _unpack(blocks, qkv, planes, 3, padding, there)

    def body(rows: Any, valid: Any) -> None:
        lines = [blocks.lines(*row) for row in rows]
        for job, (x, tile) in enumerate(_jobs(layout)):
            blocks.store(results, tile, lines[2], x, _rows_of(layout, turned[job]))
            units = layout.units_of(tile)
            kind = _kind(layout, rows[1][1], x)
            weights = [_weights(logits[x, unit], bias[kind, unit]).astype(dtype)
                       for unit, _ in units]
            before = [values[job, pl.ds(lane, layout.group * layout.dim), :] for _, lane in units]
            q, k, v = _load_qkv(blocks, planes, padding, lines[0], x, tile)
            k = k.astype(dtype)
            values[job] = _turned(layout, v, dtype)
            for (unit, lane), w, v in zip(units, weights, before, strict=True):
                queries = _by_head(layout, q, lane).astype(dtype)
                logits[x, unit] = _product(k, queries, (1, 1))
                product = _product(v, w, (1, 0)).astype(dtype)
                turned[job, pl.ds(lane, layout.group * layout.dim), :] = product

    _each_row(blocks, there, body)
    _pack(blocks, results, out, 1)


def _backward_kernel(
    qkv: Any, d_out: Any, padding: Any, bias: Any, d_qkv: Any, d_padding: Any, d_bias: Any,
    planes: Any, d_planes: Any, results: Any, logits: Any, d_weights: Any, queries: Any,
    d_outs: Any, keys: Any, turned: Any, *, blocks: Blocks, maps: int,
) -> None:  # fmt: skip
    layout, dtype = blocks.layout, qkv.dtype
    tiles, scale = layout.tiles, layout.dim**-0.5
    there = _maps_there(blocks, maps)
    _unpack(blocks, qkv, planes, 3, padding, there)
    _unpack(blocks, d_out, d_planes, 1, None, there)

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
            given.append((lane, weights.astype(dtype), d.astype(dtype), d_outs[x, unit],
                          queries[x, unit], keys[job, pl.ds(lane, width), :]))

        def products() -> None:
            dk = dv = jnp.zeros((layout.rows, LANES), F32)
            for lane, weights, d, d_o, q, k in given:
                dv += _product(weights, d_o, (1, 0))
                dk += _product(d, q, (1, 0))
                turned[job, pl.ds(lane, width), :] = _product(k, d, (1, 0)).astype(dtype)
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
            logits[x, unit] = _product(k, by_head, (1, 1))
            by_head = _by_head(layout, d_o, lane).astype(dtype)
            d_outs[x, unit] = by_head
            d_weights[x, unit] = _product(v, by_head, (1, 1))

    def body(rows: Any, valid: Any) -> None:
        lines = [blocks.lines(*row) for row in rows]
        for job, (x, tile) in enumerate(_jobs(layout)):
            finish(lines[2], job, x, tile)
            products = go_on(rows[1], valid, lines[1], job, x, tile)
            begin(lines[0], job, x, tile)
            products()

    _each_row(blocks, there, body)
    _pack(blocks, results, d_qkv, 3)


def _maps_per_program(layout: Layout, maps: int) -> int:
    """Enough rows to hide what a program costs; blocks of rows are multiples of 16."""
    count = 1
    while count * layout.tokens % 16 or count * layout.windows[0] * layout.windows[1] < 8:
        count += 1
    return min(count, maps)


def _call(
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
        name=kernel.__name__.strip("_"),
    )(*rows, *whole)


def _masked(layout: Layout, bias: Any) -> Any:
    """f32[kinds, units, rows, group_rows]: the bias for each kind of window (`_kind`)."""
    return bias + layout.masks()[:, None] if layout.shift else bias[None]


def _padding_rows(layout: Layout, row: Any) -> Any:
    """[1, 3 features] -> f32[planes, 128]."""
    room = layout.tiles * LANES - layout.features
    row = jnp.pad(row.astype(F32).reshape(3, -1), ((0, 0), (0, room)))
    return row.reshape(3 * layout.tiles, LANES)


def _scratch(blocks: Blocks, dtype: Any) -> tuple[Any, ...]:
    """(shape, dtype) of planes, logits, queries by head and turned keys of a row of windows."""
    layout, columns = blocks.layout, blocks.layout.windows[1]
    return (
        ((layout.tiles, blocks.scratch_rows, LANES), F32),
        ((columns, layout.units, layout.rows, layout.lanes), F32),
        ((columns, layout.units, layout.lanes, LANES), dtype),
        ((columns * layout.tiles, LANES, layout.rows), dtype),
        ((columns * layout.tiles, LANES, layout.lanes), dtype),
    )


def _planes(count: int, planes: Any) -> Any:
    (tiles, *shape), dtype = planes
    return (count * tiles, *shape), dtype


def forward(qkv: Any, padding: Any, bias: Any, layout: Layout, interpret: bool = False) -> Any:
    """`attend`, of a bias as `Layout.bias_rows` lays it."""
    maps = qkv.shape[0] // layout.tokens
    blocks = Blocks(layout, _maps_per_program(layout, maps))
    out = jax.ShapeDtypeStruct((qkv.shape[0], layout.features), qkv.dtype)
    whole = [_padding_rows(layout, padding), _masked(layout, bias)]
    planes, logits, _, values, turned = _scratch(blocks, qkv.dtype)
    scratch = [_planes(3, planes), planes, logits, values, turned]
    return _call(_forward_kernel, blocks, maps, [qkv], whole, out, [], scratch, interpret)[0]


def backward(
    qkv: Any, d_out: Any, padding: Any, bias: Any, layout: Layout, interpret: bool = False
) -> tuple[Any, Any, Any]:
    """Gradients of qkv, padding and (laid) bias, from those of the output."""
    maps = qkv.shape[0] // layout.tokens
    blocks = Blocks(layout, _maps_per_program(layout, maps))
    whole = [_padding_rows(layout, padding), _masked(layout, bias)]
    others = [
        jax.ShapeDtypeStruct((3 * layout.tiles, layout.slots, LANES), F32),
        jax.ShapeDtypeStruct(bias.shape, F32),
    ]
    planes, logits, queries, keys, turned = _scratch(blocks, qkv.dtype)
    scratch = [_planes(3, planes), planes, _planes(3, planes)]
    scratch += [logits, logits, queries, queries, keys, turned]
    d_qkv, d_padding, d_bias = _call(
        _backward_kernel, blocks, maps, [qkv, d_out], whole,
        jax.ShapeDtypeStruct(qkv.shape, qkv.dtype), others, scratch, interpret,
    )  # fmt: skip
    d_padding = jnp.sum(d_padding, axis=1).reshape(3, -1)[:, : layout.features]
    return d_qkv, d_padding.reshape(padding.shape).astype(padding.dtype), d_bias


def _by_platform(function: Any, layout: Layout, *arrays: Any) -> Any:
    """On a TPU the compiled kernel, elsewhere Pallas's interpreter."""
    return jax.lax.platform_dependent(
        *arrays,
        tpu=functools.partial(function, layout=layout),
        default=functools.partial(function, layout=layout, interpret=True),
    )


# Blocks of the same shape are traced once.
_forward = jax.jit(functools.partial(_by_platform, forward), static_argnums=0)
_backward = jax.jit(functools.partial(_by_platform, backward), static_argnums=0)


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
    if not supported(layout):
        raise ValueError(f"no kernel for heads of {layout.dim} features: no power of two up to 128")
    return _attend(qkv, padding, layout.bias_rows(bias.astype(F32)), layout)


def supported(layout: Layout) -> bool:
    """Whether heads divide the lanes of a register."""
    return layout.dim <= LANES and LANES % layout.dim == 0


def memory(layout: Layout, maps: int, dtype: Any) -> int:
    """Bytes of a core's vector memory that the backward kernel takes, nearly."""
    blocks = Blocks(layout, _maps_per_program(layout, maps))
    planes, *others = _scratch(blocks, dtype)
    size = jnp.dtype(dtype).itemsize
    widths = (3 * layout.features, layout.features, 3 * layout.features)
    lanes = sum(-(-width // LANES) * LANES for width in widths)
    logits, queries, keys, turned = (
        math.prod(shape[:-1]) * -(-shape[-1] // LANES) * LANES * jnp.dtype(kind).itemsize
        for shape, kind in others
    )
    scratch = 7 * math.prod(planes[0]) * 4 + 2 * logits + 2 * queries + keys + turned
    bias = (4 if layout.shift else 1) + 1
    return 2 * blocks.used * lanes * size + scratch + bias * layout.units * layout.rows * layout.lanes * 4
