"""Where a step's time and bytes go: the parts of the network, and the costliest instructions.

A compiled instruction keeps the name of the operation that it comes from, with the path of modules
in it: jit(step)/transpose(jvp(…))/backbone/layers_0/blocks_1/attn/qkv/dot_general is of the
student's backward pass.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from esvit_jax.planning.cycles import Cost
from esvit_jax.planning.hlo import Module

ATTENTION = {
    "backward": "window attention, student backward",
    "forward": "window attention, student forward",
    "teacher": "window attention, teacher",
}
OTHER = "other"
# The first pattern that the name of an operation has in it says which part it is of.
PARTS = (
    (r"/mlp(/|$)|/layers_\d+_1/fn(/|$)", "MLPs"),
    (r"/blocks_\d+(/|$)|/layers_\d+_\d(/|$)|/layer\d+_[1-9]\d*(/|$)", "norms of blocks"),
    (r"/downsample(/|$)|/stage[1-9]\d*_0(/|$)", "patch merging"),
    (r"prototypes|last_layer|losses|kd->", "prototypes"),
    (
        r"patch_embed|norm_embed|layer\d+_0/proj|/stage0_0(/|$)|/backbone/(norm|[^/]*$)|_head(/|$)"
        r"|views|vmap\(|threefry",
        "patch embedding, views, heads",
    ),
    (r"jvp\(", "prototypes"),  # of what has gradients only the losses have no module
    # What has no module is of the optimiser and the teacher, or of the compiler's making.
    (r"optimizer|^((jit\(\w+\)|shard_map)/)*[^/()]*$", "optimiser, teacher, copies, prefetches"),
)
NAMES = (*ATTENTION.values(), *dict.fromkeys(name for _, name in PARTS), OTHER)


class Part(NamedTuple):
    """A row of the table: cycles and bytes of a step that belong to a part of the network."""

    part: str
    cycles: int
    bytes: int


class Costliest(NamedTuple):
    """One of the instructions that take most cycles.

    Attributes:
      cycles: of a step, however often it runs.
      times: how often.
      bytes: of a step.
      instruction: its name in the program.
      opcode: fusion, copy and so on.
      shape: of its result.
      origin: name of the operation that it comes from.
    """

    cycles: int
    times: int
    bytes: int
    instruction: str
    opcode: str
    shape: str
    origin: str


def part_of(origin: str) -> str:
    """The part of the network that an operation belongs to.

    >>> part_of("jit(step)/jvp(EsViT.forward)/backbone/layers_0/blocks_1/attn/qkv/dot_general")
    'window attention, student forward'
    """
    if re.search(r"/attn(/|$)|/layers_\d+_0/fn(/|$)", origin):
        student = "backward" if "transpose(" in origin else "forward"
        return ATTENTION[student if "jvp(" in origin else "teacher"]
    first = origin.partition(";")[0]  # of several that were made one
    return next((name for pattern, name in PARTS if re.search(pattern, first)), OTHER)


def origin_of(cost: Cost, module: Module) -> str:
    """The name of the operation; of a nameless fusion that of what it ends with."""
    x = cost.instruction
    if x.op_name or x.opcode != "fusion":
        return x.op_name
    return module.computations[x.called("calls")].root.op_name


def breakdown(costs: Iterable[Cost], module: Module) -> list[Part]:
    """Cycles and bytes by part: each cost is in one row, and rows are there even if empty."""
    cycles, moved = dict.fromkeys(NAMES, 0), dict.fromkeys(NAMES, 0)
    for cost in costs:
        part = part_of(origin_of(cost, module))
        cycles[part] += cost.times * cost.cycles
        moved[part] += cost.times * cost.bytes
    return [Part(name, cycles[name], moved[name]) for name in NAMES]


def costliest(costs: Iterable[Cost], module: Module, count: int) -> list[Costliest]:
    """The `count` instructions that take most cycles of a step, the first the most."""
    ordered = sorted(costs, key=lambda x: x.times * x.cycles, reverse=True)
    return [
        Costliest(
            cycles=x.times * x.cycles,
            times=x.times,
            bytes=x.times * x.bytes,
            instruction=x.instruction.name,
            opcode=x.instruction.opcode,
            shape=x.instruction.shape,
            origin=origin_of(x, module),
        )
        for x in ordered[:count]
    ]
