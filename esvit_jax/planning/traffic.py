"""How many bytes a compiled step moves to and from memory, read from its optimised HLO text.

XLA's own `cost_analysis` counts the body of a loop once, whatever its trip count, and counts
accesses to on-chip memory with those to the chip's main memory. Here a loop's body counts as often
as it runs, only what lies in main memory counts, and it counts with the padding of its layout: a
minor axis of 49 takes 128 places on a TPU.
"""

import dataclasses
import math
import re

# Instructions that name or group buffers and move nothing, or whose work the start has counted.
STILL = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "domain",
    "partition-id", "replica-id", "opt-barrier", "optimization-barrier",
}  # fmt: skip
PARTS = {"slice", "dynamic-slice", "gather"}  # read as much as they return
ELEMENT_BITS = re.compile(r"\d+")
SHAPE = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
TILE = re.compile(r"\(([\d,]+)\)")
ON_CHIP = re.compile(r"S\([1-9]\d*\)")
NAME = re.compile(r"%([\w.\-]+)")
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (.*)$")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO: `%name = shape opcode(operands), attributes`."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    literal: str  # what stands between the parentheses
    attributes: str

    def called(self, role: str) -> str:
        """The computation that the attribute `role` names."""
        found = re.search(rf"\b{role}=%?([\w.\-]+)", self.attributes)
        assert found, f"{self.opcode} {self.name} has no {role}"
        return found[1]


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in order; the root is what it returns."""

    instructions: dict[str, Instruction]
    root: Instruction

    def parameter(self, index: int) -> Instruction:
        """The index-th argument."""
        return next(
            x
            for x in self.instructions.values()
            if x.opcode == "parameter" and x.literal == str(index)
        )

    def users(self, name: str) -> list[Instruction]:
        """What reads this instruction's result."""
        return [x for x in self.instructions.values() if name in x.operands]


def shape_bytes(shape: str) -> int:
    """Bytes in main memory of an HLO shape, with its layout's padding; 0 for what is on the chip.

    >>> shape_bytes("f32[3,49]{1,0:T(8,128)}")
    4096
    """
    return sum(_array_bytes(*match) for match in SHAPE.findall(shape))


def _array_bytes(element: str, sizes: str, layout: str) -> int:
    if ON_CHIP.search(layout) or element in ("token", "opaque"):
        return 0
    dims = [int(size.removeprefix("<=")) for size in sizes.split(",") if size]
    order, _, tiling = layout.partition(":")
    if order:  # from the minor axis to the major one
        dims = [dims[int(axis)] for axis in order.split(",")]
    tile = TILE.match(tiling.removeprefix("T")) if tiling.startswith("T") else None
    if tile:
        tile = [int(size) for size in tile[1].split(",")][::-1]
        dims += [1] * (len(tile) - len(dims))
        for axis, size in enumerate(tile):
            dims[axis] = math.ceil(dims[axis] / size) * size
    digits = ELEMENT_BITS.search(element)
    bits = int(digits[0]) if digits else 8  # pred
    return math.prod(dims) * bits // 8


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Computations by name, and the name of the entry."""
    computations, entry, name, root, instructions = {}, "", "", "", {}
    for line in text.splitlines():
        if start := COMPUTATION.match(line):
            name, instructions = start[2], {}
            entry = name if start[1] else entry
        elif line == "}":
            computations[name] = Computation(instructions, instructions[root])
        elif match := INSTRUCTION.match(line):
            instructions[match[2]] = _instruction(match[2], match[3])
            root = match[2] if match[1] else root
    return computations, entry


def _instruction(name: str, text: str) -> Instruction:
    shape_end = _closing(text, 0) if text[0] == "(" else text.index(" ")
    opcode, _, rest = text[shape_end:].strip().partition("(")
    end = _closing("(" + rest, 0) - 1
    literal = rest[: end - 1]
    return Instruction(
        name, text[:shape_end], opcode, tuple(NAME.findall(literal)), literal, rest[end:]
    )


def _closing(text: str, start: int) -> int:
    """The place after the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    raise ValueError(f"unbalanced parentheses: {text[:80]}")


class Traffic:
    """Bytes moved by the computations of one HLO module."""

    def __init__(self, text: str):
        self.computations, self.entry = parse(text)
        self._known: dict[str, int] = {}

    def of(self, name: str) -> int:
        """Bytes read and written by one run of a computation."""
        if name not in self._known:
            computation = self.computations[name]
            self._known[name] = sum(
                self._moved(x, computation) for x in computation.instructions.values()
            )
        return self._known[name]

    def _moved(self, x: Instruction, computation: Computation) -> int:
        if x.opcode in STILL or x.opcode.endswith(("-done", "-update")):
            return 0
        if x.opcode == "while":
            return self.trip_count(x) * self.of(x.called("body"))
        if x.opcode in ("call", "async-start"):
            return self.of(x.called("to_apply" if x.opcode == "call" else "calls"))
        if x.opcode == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", x.attributes)
            names = NAME.findall(branches[1]) if branches else [
                x.called("true_computation"), x.called("false_computation")
            ]  # fmt: skip
            return max(self.of(branch) for branch in names)
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
            return reads + self._written(self.computations[inner].root, inner, x.shape)
        shapes = [computation.instructions[name].shape for name in x.operands]
        operands = [shape_bytes(shape) for shape in shapes]
        if x.opcode == "slice-start":  # its shape is ((source), part, context)
            return _copied(_tuple_parts(x.shape)[1], shapes[0])
        if x.opcode in PARTS:
            return _copied(x.shape, shapes[0]) + sum(operands[1:])
        if x.opcode == "dynamic-update-slice":
            return _copied(shapes[1], shapes[0])
        return sum(operands) + shape_bytes(x.shape)

    def _read_by_fusion(self, name: str, index: int, shape: str) -> int:
        """What a fused computation reads of an argument: less than all if it takes slices."""
        everything = shape_bytes(shape)
        if not everything:
            return 0
        computation = self.computations[name]
        return min(everything, self._read(computation, computation.parameter(index), everything))

    def _read(self, computation: Computation, source: Instruction, everything: int) -> int:
        total = 0
        for user in computation.users(source.name):
            if user.opcode in PARTS and user.operands[0] == source.name:
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
        instructions = self.computations[name].instructions
        if root.opcode == "tuple":
            shapes = _tuple_parts(shape)
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
            return self._written(self.computations[inner].root, inner, shape)
        return shape_bytes(shape)

    def trip_count(self, loop: Instruction) -> int:
        """How often a loop runs: known to XLA, or the bound of its condition `i < bound`.

        Raises:
          ValueError: the loop does not count up to a constant.
        """
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        condition = self.computations[loop.called("condition")]
        bounds = [
            int(x.literal) for x in condition.instructions.values()
            if x.opcode == "constant" and x.literal.isdigit()
        ]  # fmt: skip
        if len(bounds) != 1:
            raise ValueError(f"loop {loop.name} has no constant bound")
        return bounds[0]


def _copied(part: str, whole: str) -> int:
    """Bytes that copying a part of an array to or from it moves: each end in main memory counts."""
    in_main_memory = [shape for shape in (part, whole) if shape_bytes(shape)]
    return len(in_main_memory) * shape_bytes(ON_CHIP.sub("", part))


def _tuple_parts(shape: str) -> list[str]:
    """The shapes in a tuple's shape (not nested, as fusions return)."""
    return [match[0] for match in SHAPE.finditer(shape)]


def bytes_accessed(text: str) -> int:
    """Bytes that one run of an optimised HLO module reads from and writes to main memory."""
    traffic = Traffic(text)
    return traffic.of(traffic.entry)
