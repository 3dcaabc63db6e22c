"""The maps of a program in its scratch memory, and their way into it and out of it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from esvit_jax.models.kernels.basics import F32
from esvit_jax.models.kernels.layout import LANES, Layout


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


def unpack(blocks: Blocks, source: Any, scratch: Any, parts: int, padding: Any, there: Any) -> None:
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

    _in_chunks(blocks.used, parts * tiles, copy)
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


def pack(blocks: Blocks, scratch: Any, target: Any, parts: int) -> None:
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

    _in_chunks(blocks.used, parts * tiles, copy)


def _in_chunks(rows: int, planes: int, copy: Any) -> None:
    """copy(first row, number of rows) over all rows, some 128 registers at a time.

    Fewer, and each waits for rotations of lanes; more is more code for nothing.
    """
    chunk = max(32, 1024 // planes // 16 * 16)

    def body(i: Any, carry: Any) -> Any:
        copy(pl.multiple_of(i * chunk, chunk), chunk)
        return carry

    if rows >= chunk:
        jax.lax.fori_loop(0, rows // chunk, body, None)
    if rows % chunk:
        copy(rows - rows % chunk, rows % chunk)


def maps_there(blocks: Blocks, maps: int) -> Any:
    """Maps of this program: the last one may have fewer than others."""
    return jnp.minimum(blocks.maps, maps - pl.program_id(0) * blocks.maps)


def each_row(blocks: Blocks, there: Any, body: Any) -> None:
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
