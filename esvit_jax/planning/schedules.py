"""Schedules of the kernels of attention, for all blocks of a config: of a Swin, or a ViL.

python -m esvit_jax.planning.schedules --topology=v5e:2x4 --batch_per_chip=32 --windows=7,14 \\
    --config=esvit_swin:variant=tiny

Cycles by bundles of instructions (`bundles`): what waits for main memory takes longer. The rule
that `esvit plan` counts kernels by is compared with them, and fitted to them anew.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Collection
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from esvit_jax.config import ConfigDict, parse_config
from esvit_jax.errors import UserError
from esvit_jax.models import Swin, ViL, create_backbone
from esvit_jax.models.attention import WindowAttention
from esvit_jax.models.kernels.chunk_layout import ChunkLayout
from esvit_jax.models.kernels.layout import Layout
from esvit_jax.models.kernels.metadata import Call, ChunkCall
from esvit_jax.planning.bundles import Kernel, compile_kernel
from esvit_jax.planning.chips import Chip
from esvit_jax.planning.kernel_rule import (
    CHUNK_RULES,
    RULES,
    ChunkRule,
    Rule,
    program_registers,
    window_registers,
)
from esvit_jax.planning.topology import Topology, parse_topology


class Blocks(NamedTuple):
    """Blocks of a network whose kernels are alike.

    Attributes:
      name: for people.
      layout: of their maps.
      maps: of all views.
      forward, backward: calls of a step, without what is computed again (config.remat).
    """

    name: str
    layout: Layout | ChunkLayout
    maps: int
    forward: int
    backward: int


def backbone_of(config: ConfigDict) -> Swin | ViL:
    """A config's backbone.

    Raises:
      UserError: it has no kernels.
    """
    backbone = create_backbone(**config.backbone)
    if not isinstance(backbone, Swin | ViL):
        raise UserError(
            "it has no kernel; name a Swin or a ViL", argument="config.backbone.name",
            value=config.backbone.name,
        )  # fmt: skip
    return backbone


def all_blocks(backbone: Swin | ViL, views: ConfigDict, images: int) -> list[Blocks]:
    """The kinds of a network's blocks, of student and teacher.

    Args:
      backbone: the network.
      views: config.views.
      images: of a step, on one core.
    """
    kinds = []
    for name, count, size in (
        ("global", 2, views.global_size), ("local", views.num_local, views.local_size)
    ):  # fmt: skip
        networks = 1 + (name == "global")
        for stage, layouts in enumerate(_layouts_of(backbone, size)):
            for layout, blocks in layouts.items():
                shifted = ", shifted" if isinstance(layout, Layout) and layout.shift else ""
                title = f"{stage + 1}, {name} views{shifted}"
                calls = networks * blocks, blocks
                kinds += [Blocks(title, layout, count * images, *calls)] * (count > 0)
    return kinds


def _layouts_of(backbone: Swin | ViL, size: int) -> list[Counter[Layout | ChunkLayout]]:
    """For each stage with kernels, how many blocks have maps of a layout, for views of a size."""
    found, side = [], -(-size // backbone.stages[0].stride)
    for stage, (depth, heads) in enumerate(zip(backbone.depths, backbone.num_heads, strict=True)):
        layouts: Counter[Layout | ChunkLayout] = Counter()
        features = backbone.stages[stage].num_features
        if isinstance(backbone, Swin):
            window, shift = backbone.stage_window(stage)
            for block in range(depth):
                module = WindowAttention(heads, window, shift if block % 2 else 0)
                layouts[module.layout((1, side, side), features)] += 1
            side = -(-side // 2)
        elif window := backbone.stage_window(stage):
            side = size // backbone.stages[stage].stride
            num_global = backbone.num_global[stage]
            layouts[ChunkLayout(side, side, window, heads, features // heads, num_global)] = depth
        found.append(layouts)
    return found


def fitted(kernels: Collection[Kernel]) -> Rule | ChunkRule:
    """The rule with the least squares of relative errors; of windows, of loops and of copies."""
    of_chunks = [(x.call, x.cycles) for x in kernels if isinstance(x.call, ChunkCall)]
    if of_chunks:
        shares = np.asarray([(*call.registers, call.programs) for call, _ in of_chunks])
        shares /= np.asarray([cycles for _, cycles in of_chunks])[:, None]
        return ChunkRule(*np.linalg.lstsq(shares, np.ones(len(shares)))[0].tolist())
    of_windows = [(x.call, x.schedule) for x in kernels if isinstance(x.call, Call)]
    windows = [s.windows.bundles / call.layout.windows[1] for call, s in of_windows]
    copies = [s.copies for _, s in of_windows]
    by_window = [window_registers(call.layout) for call, _ in of_windows]
    by_program = [[program_registers(call)] for call, _ in of_windows]
    bundles = []
    for of, registers in ((windows, by_window), (copies, by_program)):
        shares = np.asarray(registers) / np.asarray(of)[:, None]
        bundles += np.linalg.lstsq(shares, np.ones(len(of)))[0].tolist()
    return Rule(*bundles)


def cycles_by_rule(kernel: Kernel, direction: str, chip: Chip) -> float:
    """What `esvit plan` counts of a kernel, if its bytes take less."""
    if isinstance(kernel.call, ChunkCall):
        cycles = CHUNK_RULES[f"chunk_{direction}_kernel"].cycles(kernel.call)
    else:
        cycles = RULES[f"{direction}_kernel"].cycles(kernel.call)
    return chip.kernel_bundles * cycles


def cells(kernel: Kernel, by_rule: float) -> list[str]:
    """Bundles and spills of a head of a window; cycles; MiB."""
    call = kernel.call
    if isinstance(call, ChunkCall):
        loop = max(kernel.schedule.loops, key=lambda loop: loop.bundles)
        head_windows = call.layout.groups * call.layout.together
    else:
        loop = kernel.schedule.windows
        head_windows = call.layout.windows[1] * call.layout.heads
    return [
        f"{loop.bundles / head_windows:.0f} / {kernel.cycles / call.head_windows:.0f}",
        f"{loop.spills / head_windows:.0f}",
        f"{kernel.cycles / 1e6:.2f}",
        f"{by_rule / 1e6:.2f}",
        f"{kernel.memory / 2**20:.1f}",
    ]


def report(title: str, blocks: list[Blocks], topology: Topology) -> dict[str, list[Kernel]]:
    """Compiles the kernels of all blocks and prints a row for each; returns them by direction."""
    assert topology.chip
    console, total, total_by_rule = Console(), 0, 0.0
    found: dict[str, list[Kernel]] = {"forward": [], "backward": []}
    table = Table(
        "stage", "kernel", title=f"{title}, a core of {topology.name}",
        title_justify="left",
    )  # fmt: skip
    for heading in ("loop / all", "spills", "Mcycles", "by rule", "MiB"):
        table.add_column(heading, justify="right")
    todo = [(row, direction) for row in blocks for direction in found]
    with console.status("compiling") as status:
        for number, (row, direction) in enumerate(todo, start=1):
            message = f"compiling {number} of {len(todo)}: {row.name}, {direction}"
            status.update(message)
            if not console.is_interactive:
                console.print(message, markup=False, highlight=False)
            kernel = compile_kernel(row.layout, row.maps, direction, topology)
            if not kernel:
                table.add_row(row.name, direction, "no room")
                continue
            by_rule = cycles_by_rule(kernel, direction, topology.chip)
            table.add_row(row.name, direction, *cells(kernel, by_rule))
            calls = row.forward if direction == "forward" else row.backward
            total += calls * kernel.cycles
            total_by_rule += calls * by_rule
            found[direction].append(kernel)
    console.print(table)
    totals = f"{total / 1e6:.1f} Mcycles, {total_by_rule / 1e6:.1f} by rule"
    console.print(f"a step, student and teacher: {totals}")
    return found


def numbers(text: str) -> list[int]:
    """Of a flag, with commas between them."""
    return [int(x) for x in text.split(",")]


def main(argv: list[str]) -> None:
    """Prints a table for each window, and the rule that fits all of them."""
    parser = argparse.ArgumentParser(description="Schedules of the kernels of window attention.")
    parser.add_argument("--topology", default="v5e:2x4", help="of TPUs, such as v5e:2x4")
    parser.add_argument("--batch_per_chip", type=int, default=32, help="images")
    parser.add_argument(
        "--windows", type=numbers, help="such as 7,14: in place of config.backbone.window_size"
    )
    config, rest = parse_config(argv)
    arguments = parser.parse_args(rest)
    topology, batch = parse_topology(arguments.topology), arguments.batch_per_chip
    if topology.chip is None:
        parser.error("--topology=cpu has no schedules; name one of TPUs, such as v5e:2x4")
    if batch < topology.chip.devices:
        parser.error(f"--batch_per_chip={batch}: each core needs an image")
    kernels: dict[str, dict[Layout | ChunkLayout, Kernel]] = {}
    for window in arguments.windows or [None]:
        config.backbone.window_size = window or config.backbone.window_size
        backbone = backbone_of(config)
        blocks = all_blocks(backbone, config.views, batch // topology.chip.devices)
        title = f"window {backbone.window_size}" if isinstance(backbone, Swin) else "chunks"
        for direction, found in report(title, blocks, topology).items():
            kernels.setdefault(direction, {}).update({x.call.layout: x for x in found})
    for direction, found in kernels.items():
        if not found:
            continue
        rule = ", ".join(f"{k} {v:.1f}" for k, v in fitted(found.values())._asdict().items())
        print(f"the rule that fits these, {direction}: {rule}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(str(error))
