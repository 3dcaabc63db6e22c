"""Schedules of the kernels of window attention, for all blocks of a config.

python -m esvit_jax.planning.schedules --topology=v5e:2x4 --batch_per_chip=32 \\
    --config=esvit_swin:variant=tiny,window=7

Cycles by bundles of instructions (`bundles`): what waits for main memory takes longer.
"""

import argparse
import sys
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from esvit_jax.config import ConfigDict, parse_config
from esvit_jax.errors import UserError
from esvit_jax.models.kernels.layout import Layout
from esvit_jax.planning.bundles import Kernel, compile_kernel
from esvit_jax.planning.topology import parse_topology


class Blocks(NamedTuple):
    """Blocks of a network whose kernels are alike.

    Attributes:
      name: for people.
      layout: of their maps.
      maps: of all views.
      forward, backward: calls of a step, without what is computed again (config.remat).
    """

    name: str
    layout: Layout
    maps: int
    forward: int
    backward: int


def all_blocks(config: ConfigDict, images: int) -> list[Blocks]:
    """The kinds of a config's blocks, of student and teacher.

    Args:
      config: see `config.default_config`.
      images: of a step, on one core.

    Raises:
      UserError: the backbone is no Swin.
    """
    from esvit_jax.models import Swin, create_backbone
    from esvit_jax.models.attention import WindowAttention

    swin, views = create_backbone(**config.backbone), config.views
    if not isinstance(swin, Swin):
        raise UserError(
            "its windows have no kernel; name a Swin", argument="config.backbone.name",
            value=config.backbone.name,
        )  # fmt: skip
    kinds = []
    for name, count, size in (
        ("global", 2, views.global_size), ("local", views.num_local, views.local_size)
    ):  # fmt: skip
        side, networks = -(-size // swin.patch_size), 1 + (name == "global")
        for stage, (depth, heads) in enumerate(zip(swin.depths, swin.num_heads, strict=True)):
            window, shift = swin.stage_window(stage)
            layouts: dict[Layout, list[int]] = {}
            for block in range(depth):
                module = WindowAttention(heads, window, shift if block % 2 else 0)
                layout = module.layout((1, side, side), swin.stages[stage].num_features)
                layouts.setdefault(layout, []).append(block)
            for layout, blocks in layouts.items():
                title = f"{stage + 1}, {name} views{', shifted' if layout.shift else ''}"
                calls = networks * len(blocks), len(blocks)
                kinds += [Blocks(title, layout, count * images, *calls)] * (count > 0)
            side = -(-side // 2)
    return kinds


def cells(kernel: Kernel | None) -> list[str]:
    """Of a row: bundles of a head of a window, in the loop and in all; spills; Mcycles; MiB."""
    if kernel is None:
        return ["no room", "", "", ""]
    loop, layout = kernel.schedule.windows, kernel.call.layout
    head_windows = layout.windows[1] * layout.heads
    return [
        f"{loop.bundles / head_windows:.0f} / {kernel.cycles / kernel.call.head_windows:.0f}",
        f"{loop.spills / head_windows:.1f}",
        f"{kernel.cycles / 1e6:.2f}",
        f"{kernel.memory / 2**20:.1f}",
    ]


def main(argv: list[str]) -> None:
    """Prints a row for each kernel, and the cycles of a step."""
    parser = argparse.ArgumentParser(description="Schedules of the kernels of window attention.")
    parser.add_argument("--topology", default="v5e:2x4", help="of TPUs, such as v5e:2x4")
    parser.add_argument("--batch_per_chip", type=int, default=32, help="images")
    config, rest = parse_config(argv)
    arguments = parser.parse_args(rest)
    topology, batch = parse_topology(arguments.topology), arguments.batch_per_chip
    if topology.chip is None:
        parser.error("--topology=cpu has no schedules; name one of TPUs, such as v5e:2x4")
    if batch < topology.chip.devices:
        parser.error(f"--batch_per_chip={batch}: each core needs an image")
    todo = [
        (row, direction, calls)
        for row in all_blocks(config, batch // topology.chip.devices)
        for direction, calls in (("forward", row.forward), ("backward", row.backward))
    ]
    table = Table(
        "stage", "kernel", title=f"a core of {topology.name}, {batch} images a chip",
        title_justify="left",
    )  # fmt: skip
    for heading in ("loop / all", "spills", "Mcycles", "MiB"):
        table.add_column(heading, justify="right")
    console, total = Console(), 0
    with console.status("compiling") as status:
        for number, (row, direction, calls) in enumerate(todo, start=1):
            message = f"compiling {number} of {len(todo)}: {row.name}, {direction}"
            status.update(message)
            if not console.is_interactive:
                console.print(message, markup=False, highlight=False)
            kernel = compile_kernel(row.layout, row.maps, direction, topology)
            total += calls * kernel.cycles if kernel else 0
            table.add_row(row.name, direction, *cells(kernel))
    console.print(table)
    console.print(f"all of a step, student and teacher: {total / 1e6:.1f} Mcycles")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(str(error))
