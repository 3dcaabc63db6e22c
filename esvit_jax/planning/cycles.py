"""How long the compiler expects a step to take, by the cost model whose numbers it leaves behind.

Each fusion of an optimised HLO module for a TPU carries `"estimated_cycles"`. Here they count as
often as their loops turn. What has no such number is reckoned: our kernels by what the compiler
schedules for them (`kernel_rule`) or by the bytes they move, whichever takes longer, collectives
by the bytes that cross the links. What runs beside the rest (prefetches, and collectives that the
compiler has put into fusions) costs no cycles.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from esvit_jax.models.kernels.metadata import Call, ChunkCall
from esvit_jax.planning.chips import Chip
from esvit_jax.planning.hlo import ON_CHIP, Instruction, Module, shape_bytes, tuple_parts
from esvit_jax.planning.kernel_rule import CHUNK_RULES, RULES
from esvit_jax.planning.traffic import Traffic

ESTIMATE = re.compile(r'"estimated_cycles":"(\d+)"')
KERNEL_TARGET = 'custom_call_target="tpu_custom_call"'
CHANNEL = re.compile(r"channel_id=(\d+)")
# How often a byte of what a collective is about crosses a chip's links, on many chips.
CROSSINGS = {
    "all-reduce": 2, "all-gather": 1, "reduce-scatter": 1, "all-to-all": 1, "collective-permute": 1,
}  # fmt: skip

# {name of a kernel: cycles of one call of it on a v5e}.
KernelCycles = Mapping[str, Callable[[Instruction], int]]


class Cost(NamedTuple):
    """What an instruction of a program costs each time that it runs.

    Attributes:
      instruction: of the program.
      times: how often it runs in a step.
      cycles: of one of the chip's cores.
      bytes: to and from main memory.
    """

    instruction: Instruction
    times: int
    cycles: int
    bytes: int


def scheduled_cycles(instruction: Instruction) -> int:
    """Of one call of a kernel of ours on a v5e, by what it tells; 0 if it tells nothing."""
    name = kernel_name(instruction)
    if (call := Call.of(instruction.attributes)) and name in RULES:
        return RULES[name].cycles(call)
    if (chunks := ChunkCall.of(instruction.attributes)) and name in CHUNK_RULES:
        return CHUNK_RULES[name].cycles(chunks)
    return 0


KERNEL_CYCLES: KernelCycles = dict.fromkeys((*RULES, *CHUNK_RULES), scheduled_cycles)


def costs(
    module: Module, chip: Chip, chips: int, kernel_cycles: KernelCycles = KERNEL_CYCLES
) -> Iterator[Cost]:
    """All that one run of an optimised module executes on a device.

    Args:
      module: compiled for the chip.
      chip: that runs it.
      chips: that take part in collectives.
      kernel_cycles: of kernels by name; see `kernel_name`.
    """
    for instruction, times, moved in Traffic(module).executed():
        opcode = instruction.opcode.removesuffix("-start")
        estimate = ESTIMATE.search(instruction.attributes)
        if estimate:
            cycles = int(estimate[1])
        elif KERNEL_TARGET in instruction.attributes:
            on_v5e = kernel_cycles.get(kernel_name(instruction), lambda _: 0)(instruction)
            by_bytes = round(moved * chip.devices * chip.clock / chip.bandwidth)
            cycles = max(round(chip.kernel_bundles * on_v5e), by_bytes)
        elif opcode in CROSSINGS:
            cycles = round(_crossing(instruction, chips) * chip.clock / chip.link_bandwidth)
        else:
            cycles = 0
        yield Cost(instruction, times, cycles, moved)


def collective_bytes(module: Module, chips: int) -> int:
    """Bytes that cross a chip's links in one run: of all collectives, within fusions too.

    One that runs beside several fusions stands in each of them, with one channel and shape, and
    counts once. (Not all compilers give every collective a channel of its own.)

    Args:
      module: compiled for one of the devices.
      chips: that take part.
    """
    total, seen = 0, set()
    for executed in Traffic(module).executed():
        inner, beside = [executed.instruction], executed.instruction.opcode == "fusion"
        if beside:
            called = module.computations[executed.instruction.called("calls")]
            inner = list(called.instructions.values())
        for x in inner:
            channel = CHANNEL.search(x.attributes)
            key = (channel[1], x.opcode, x.shape) if beside and channel else x.name
            if x.opcode.removesuffix("-start") in CROSSINGS and key not in seen:
                seen.add(key)
                total += round(executed.times * _crossing(x, chips))
    return total


def kernel_name(instruction: Instruction) -> str:
    """The name that a kernel was given: that of its instruction without the number."""
    return re.sub(r"(\.\d+)+$", "", instruction.name)


def _crossing(instruction: Instruction, chips: int) -> float:
    """Bytes of a collective that cross a chip's links; a scatter returns a chip's part of them."""
    opcode = instruction.opcode.removesuffix("-start")
    whole = _result_bytes(instruction) * (chips if opcode == "reduce-scatter" else 1)
    return CROSSINGS[opcode] * (chips - 1) / chips * whole


def _result_bytes(instruction: Instruction) -> int:
    """Of a collective, wherever it lies; a start returns its operand as well."""
    shape = ON_CHIP.sub("", instruction.shape)
    if instruction.opcode in ("all-gather-start", "reduce-scatter-start"):
        return shape_bytes(tuple_parts(shape)[1])
    return shape_bytes(shape)
