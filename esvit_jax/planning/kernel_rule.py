"""Cycles of the kernels of attention, by a rule in place of their schedules.

A kernel's instruction tells its layout and its maps, from which the registers follow that it
holds; the rule says how many bundles of instructions each takes. It is fitted to the schedules of
Swin-T's kernels of windows 7 and 14 on a v5e (`schedules`, which prints it anew);
docs/notes/kernels.md says how far off it is, there and elsewhere. The rule for chunks is made of
those of `vil_2262` (docs/notes/longformer.md).
"""

from typing import NamedTuple

from esvit_jax.models.kernels.layout import LANES, Layout
from esvit_jax.models.kernels.metadata import Call, ChunkCall


class Rule(NamedTuple):
    """Bundles for each register, 8 x 128, of what a kernel holds.

    Attributes:
      logits: of a window.
      queries: of a window, with one head's apart from another's.
      padded: for telling a window's padding from its tokens.
      copies: of the maps, between rows as they come and float32; rows that are narrower than a
        tile count twice, as their parts have to be turned to the lanes where they belong.
    """

    logits: float
    queries: float
    padded: float
    copies: float

    def cycles(self, call: Call) -> int:
        """Of all programs of a call."""
        window = sum(x * y for x, y in zip(self, window_registers(call.layout), strict=False))
        copies = self.copies * program_registers(call)
        return round(call.turns * call.layout.windows[1] * window + call.programs * copies)


def window_registers(layout: Layout) -> tuple[int, int, int]:
    """Of a window's logits, of its queries, and of its features if padding takes part."""
    rows, lanes = layout.rows // 8, layout.lanes // LANES
    padded = layout.tiles * rows * layout.padded
    return layout.units * rows * lanes, layout.units * layout.lanes // 8, padded


def program_registers(call: Call) -> float:
    """Of the features of a program's maps, those twice whose rows are narrower than a tile."""
    turned = 2 if call.layout.features < LANES else 1
    return call.maps_per_program * call.layout.tokens / 8 * call.layout.tiles * turned


class ChunkRule(NamedTuple):
    """Bundles for each register, and for each program besides.

    Attributes:
      logits: of a group of chunks.
      keys: that a group attends to.
      program: what a program does once.
    """

    logits: float
    keys: float
    program: float

    def cycles(self, call: ChunkCall) -> int:
        """Of all programs of a call."""
        logits, keys = call.registers
        return round(self.logits * logits + self.keys * keys + self.program * call.programs)


RULES = {
    "forward_kernel": Rule(2.3, 2.3, 3.9, 4.3),
    "backward_kernel": Rule(9.3, 3.5, 4.0, 7.1),
}
CHUNK_RULES = {
    "chunk_forward_kernel": ChunkRule(6.3, 0.7, 120),
    "chunk_backward_kernel": ChunkRule(11.7, 7.3, 600),
}
