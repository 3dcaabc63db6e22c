"""The text of an optimised HLO module: its instructions, its loops, and the bytes of its shapes.

A shape counts with the padding of its layout (a minor axis of 49 takes 128 places on a TPU), and
only where it lies in the chip's main memory.
"""

import dataclasses
import math
import re

ELEMENT_BITS = re.compile(r"\d+")
SHAPE = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
TILE = re.compile(r"\(([\d,]+)\)")
ON_CHIP = re.compile(r"S\([1-9]\d*\)")
NAME = re.compile(r"%([\w.\-]+)")
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
KERNEL_METADATA = re.compile(r"kernel_metadata=\{[^{}]*\}")  # jax writes it in several lines
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

    @property
    def op_name(self) -> str:
        """Where it comes from: the path of the operation in the traced function, or ""."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

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


class Module:
    """The computations of an HLO text by name, and which of them is the entry."""

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        name, root = "", ""
        instructions: dict[str, Instruction] = {}
        text = KERNEL_METADATA.sub(lambda found: found[0].replace("\n", ""), text)
        for line in text.splitlines():
            if start := COMPUTATION.match(line):
                name, instructions = start[2], {}
                self.entry = name if start[1] else self.entry
            elif line == "}":
                self.computations[name] = Computation(instructions, instructions[root])
            elif match := INSTRUCTION.match(line):
                instructions[match[2]] = _instruction(match[2], match[3])
                root = match[2] if match[1] else root

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

    def branches(self, conditional: Instruction) -> list[str]:
        """Names of the computations that a conditional chooses from."""
        listed = re.search(r"branch_computations=\{([^}]*)\}", conditional.attributes)
        if listed:
            return NAME.findall(listed[1])
        return [conditional.called(f"{case}_computation") for case in ("true", "false")]


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


def tuple_parts(shape: str) -> list[str]:
    """The shapes in a tuple's shape (not nested, as fusions return).

    >>> tuple_parts("(f32[3]{0}, s32[])")
    ['f32[3]{0}', 's32[]']
    """
    return [match[0] for match in SHAPE.finditer(shape)]
