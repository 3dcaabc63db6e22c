"""How many bytes a compiled step moves to and from memory, read from its optimised HLO text.

XLA's own `cost_analysis` counts the body of a loop once, whatever its trip count, and counts
accesses to on-chip memory with those to the chip's main memory. Here a loop's body counts as often
as it runs, and only what lies in main memory counts, with the padding of its layout.
"""

from collections.abc import Iterator
from typing import NamedTuple

from esvit_jax.planning.hlo import (
    ON_CHIP,
    Computation,
    Instruction,
    Module,
    shape_bytes,
    tuple_parts,
)

# Instructions that name or group buffers and move nothing.
NOT_MOVING = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "domain",
    "partition-id", "replica-id", "opt-barrier", "optimization-barrier",
}  # fmt: skip
SLICING = {"slice", "dynamic-slice", "gather"}  # read as much as they return


class Executed(NamedTuple):
    """An instruction of a program as it runs.

    Attributes:
      instruction: that does work: loops, calls and conditionals are opened.
      times: how often it runs.
      bytes: it moves to and from main memory each time.
    """

    instruction: Instruction
    times: int
    bytes: int


class Traffic:
    """Bytes moved by the computations of one HLO module."""

    def __init__(self, module: Module):
        self._module = module
        self._known: dict[str, int] = {}

    def total(self) -> int:
        """Bytes read and written by one run of the module."""
        return self._of(self._module.entry)

    def executed(self) -> Iterator[Executed]:
        """All that one run of the module executes; their bytes add up to `total`."""
        yield from self._executed(self._module.entry, 1)

    def _of(self, name: str) -> int:
        if name not in self._known:
            self._known[name] = sum(x.times * x.bytes for x in self._executed(name, 1))
        return self._known[name]

    def _executed(self, name: str, times: int) -> Iterator[Executed]:
        computation = self._module.computations[name]
        for x in computation.instructions.values():
            if x.opcode == "while":
                yield from self._executed(x.called("body"), times * self._module.trip_count(x))
            elif x.opcode == "call":
                yield from self._executed(x.called("to_apply"), times)
            elif x.opcode == "async-start":
                yield from self._executed(x.called("calls"), times)
            elif x.opcode == "conditional":  # the largest branch counts
                branch = max(self._module.branches(x), key=self._of)
                yield from self._executed(branch, times)
            elif x.opcode not in NOT_MOVING and not x.opcode.endswith(("-done", "-update")):
                # The start of what runs by itself has counted its work.
                yield Executed(x, times, self._moved(x, computation))

    def _moved(self, x: Instruction, computation: Computation) -> int:
        if x.opcode == "custom-call" and '"AllocateBuffer"' in x.attributes:
            return 0
        if x.opcode == "copy-start":  # its shape is (destination, source, context)
            return shape_bytes(x.shape)
        if x.opcode == "fusion":
            inner = x.called("calls")
            reads = sum(
                self._read_by_fusion(inner, i, computation.instructions[operand].shape)
                for i, operand in enumerate(x.operands)
            )
            return reads + self._written(self._module.computations[inner].root, inner, x.shape)
        shapes = [computation.instructions[name].shape for name in x.operands]
        operands = [shape_bytes(shape) for shape in shapes]
        if x.opcode == "slice-start":  # its shape is ((source), part, context)
            return _copied(tuple_parts(x.shape)[1], shapes[0])
        if x.opcode in SLICING:
            return _copied(x.shape, shapes[0]) + sum(operands[1:])
        if x.opcode == "dynamic-update-slice":
            return _copied(shapes[1], shapes[0])
        return sum(operands) + shape_bytes(x.shape)

    def _read_by_fusion(self, name: str, index: int, shape: str) -> int:
        """What a fused computation reads of an argument: less than all if it takes slices."""
        everything = shape_bytes(shape)
        if not everything:
            return 0
        computation = self._module.computations[name]
        return min(everything, self._read(computation, computation.parameter(index), everything))

    def _read(self, computation: Computation, source: Instruction, everything: int) -> int:
        total = 0
        for user in computation.users(source.name):
            if user.opcode in SLICING and user.operands[0] == source.name:
                total += shape_bytes(user.shape)
            elif user.opcode == "bitcast":
                total += self._read(computation, user, everything)
            elif user.opcode == "fusion":
                inner = user.called("calls")
                total += sum(
                    self._read_by_fusion(inner, i, source.shape)
                    for i, operand in enumerate(user.operands)
                    if operand == source.name
                )
            elif user.opcode != "dynamic-update-slice" or user.operands[0] != source.name:
                return everything
        return total

    def _written(self, root: Instruction, name: str, shape: str) -> int:
        """What a fused computation writes: less than its result where it updates it in place."""
        if not shape_bytes(shape):
            return 0
        instructions = self._module.computations[name].instructions
        if root.opcode == "tuple":
            shapes = tuple_parts(shape)
            return sum(
                self._written(instructions[operand], name, part)
                for operand, part in zip(root.operands, shapes, strict=True)
            )
        if root.opcode == "bitcast":
            return self._written(instructions[root.operands[0]], name, shape)
        if root.opcode == "dynamic-update-slice":
            return shape_bytes(instructions[root.operands[1]].shape)
        if root.opcode == "fusion":
            inner = root.called("calls")
            return self._written(self._module.computations[inner].root, inner, shape)
        return shape_bytes(shape)


def _copied(part: str, whole: str) -> int:
    """Bytes that copying a part of an array to or from it moves: each end in main memory counts."""
    in_main_memory = [shape for shape in (part, whole) if shape_bytes(shape)]
    return len(in_main_memory) * shape_bytes(ON_CHIP.sub("", part))


def bytes_accessed(text: str) -> int:
    """Bytes that one run of an optimised HLO module reads from and writes to main memory."""
    return Traffic(Module(text)).total()
