"""`esvit plan`: say what a run needs on a TPU that is not here."""

import argparse
import json
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from esvit_jax.config import ConfigDict, flatten, parse_config, unflatten
from esvit_jax.errors import renamed
from esvit_jax.planning.breakdown import Costliest, Part
from esvit_jax.planning.chips import CHIPS, GIB
from esvit_jax.planning.depth import plan_by_depth
from esvit_jax.planning.measure import account_again
from esvit_jax.planning.plan import IMAGENET_IMAGES, Plan, plan
from esvit_jax.planning.search import Found, search

# How plans call their arguments, and how this command calls them.
FLAGS = {
    name: f"--{name}" for name in ("topology", "batch_per_chip", "num_images", "top", "dump_hlo")
} | {"path": "--hlo"}


def main(argv: list[str]) -> None:
    """`esvit plan`."""
    parser = argument_parser()
    arguments, _ = parser.parse_known_args(argv)
    console = Console(stderr=arguments.json)
    found: list[Found] | None = None
    if arguments.hlo:
        with renamed(**FLAGS):
            result = account_again(arguments.hlo, arguments.top)
    else:
        config, rest = parse_config(argv)
        arguments = parser.parse_args(rest)
        if not arguments.topology:
            parser.error("--topology is missing, such as --topology=v5e:2x4")
        if arguments.shallow and (arguments.top or arguments.dump_hlo):
            parser.error("--shallow compiles no program of this network for --top or --dump_hlo")
        with renamed(**FLAGS):
            result = run(config, arguments, console, arguments.batch_per_chip)
        if arguments.search:
            found = search_batches(config, arguments, console, result)
    if arguments.json:
        print(json.dumps(as_json(result, found)))
        return
    for table in tables(result, arguments.breakdown):
        console.print(table)
    for row in found or []:
        for name, best in (("largest", row.largest), ("recipe", row.recipe)):
            console.print(f"remat={row.remat}, {name} batch:{'' if best else ' none fits'}")
            if best:
                console.print(cost_table(best))


def argument_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="esvit plan",
        description="Compiles the training step for a TPU that is not here: does it fit, and how "
        "fast can it be at best.",
        epilog="--config=FILE[:arguments] and --config.field=value describe the run.",
    )
    parser.add_argument(
        "--topology",
        help=f"cpu (this machine), or the chips along each axis of a {', '.join(CHIPS)}: v5e:2x4",
    )  # fmt: skip
    parser.add_argument(
        "--batch_per_chip", type=int, help="images, in place of config.batch_size / chips"
    )
    parser.add_argument(
        "--quick", action="store_true",
        help="let the TPU compiler try less hard: says sooner what memory suffices",
    )  # fmt: skip
    parser.add_argument(
        "--shallow", action="store_true",
        help="compile two networks with fewer blocks in the deepest stage, and reckon from them",
    )  # fmt: skip
    parser.add_argument(
        "--num_images", type=int, default=IMAGENET_IMAGES, help="of the data set; ImageNet's"
    )
    parser.add_argument(
        "--search", action="store_true",
        help="the largest batch a chip for each config.remat (a dozen compilations, minutes each)",
    )  # fmt: skip
    parser.add_argument(
        "--breakdown", action="store_true",
        help="also which parts of the network take the cycles and the bytes",
    )  # fmt: skip
    parser.add_argument(
        "--top", type=int, default=0, help="name as many of the costliest instructions"
    )
    parser.add_argument("--dump_hlo", metavar="FILE", help="keep the compiled program")
    parser.add_argument(
        "--hlo", metavar="FILE", help="account for a kept program again; compiles nothing"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, no table")
    return parser


def run(
    config: ConfigDict, arguments: argparse.Namespace, console: Console, batch: int | None
) -> Plan:
    """The plan that the flags ask for, for `batch` images a chip."""
    if arguments.shallow:
        return plan_by_depth(
            config,
            arguments.topology,
            num_images=arguments.num_images,
            batch_per_chip=batch,
            quick=arguments.quick,
            console=console,
        )
    return plan(
        config,
        arguments.topology,
        num_images=arguments.num_images,
        batch_per_chip=batch,
        quick=arguments.quick,
        top=arguments.top,
        dump_hlo=arguments.dump_hlo if batch == arguments.batch_per_chip else None,
        console=console,
    )


def search_batches(
    config: ConfigDict, arguments: argparse.Namespace, console: Console, first: Plan
) -> list[Found]:
    """Searches, and says what each compilation found; `first` is the config's own plan."""
    known = {(first.per_chip_batch, first.remat, first.accum_steps): first}

    def attempt(batch: int, remat: str, accum_steps: int) -> Plan:
        key = batch, remat, accum_steps
        if key not in known:
            changed = unflatten(flatten(config) | {"remat": remat, "accum_steps": accum_steps})
            result = known[key] = run(changed, arguments, console, batch)
            console.print(
                f"{batch} images a chip, remat={remat}, accum_steps={accum_steps}: "
                f"{result.peak_bytes / GIB:.2f} of {result.hbm_bytes / GIB:.2f} GiB, "
                f"{'fits' if result.fits else 'does not fit'}"
            )
        return known[key]

    return search(first.per_chip_batch, attempt)


def as_json(result: Plan, found: list[Found] | None) -> dict[str, object]:
    """A plan, and under "search" what was found, of what JSON knows."""
    answer = result.as_json()
    if found is not None:
        answer["search"] = [
            {
                "remat": row.remat,
                "largest": row.largest and row.largest.as_json(),
                "recipe": row.recipe and row.recipe.as_json(),
            }
            for row in found
        ]
    return answer


def tables(result: Plan, with_breakdown: bool) -> Iterator[Table | str]:
    """A plan for reading."""
    yield cost_table(result)
    if result.quick:
        yield (
            "Memory only: a quick program is not the one that would run. Swin-T's takes 3.4 times "
            "the cycles and moves 1.7 times the bytes."
        )
    if result.compiled_depths:
        yield (
            "Reckoned from two networks of depths "
            + " and ".join(",".join(map(str, depths)) for depths in result.compiled_depths)
            + ", as every two more blocks of a stage cost the same again."
        )
    if with_breakdown and result.breakdown:
        yield breakdown_table(result.breakdown)
    if result.costliest:
        yield costliest_table(result.costliest)


def cost_table(result: Plan) -> Table:
    """What a step costs; floors and estimates side by side."""

    def number(value: int | float | None, unit: int | float, decimals: int) -> str:
        return "-" if value is None else f"{value / unit:,.{decimals}f}"

    mib = 2**20
    rows: dict[str, object] = {
        "images": result.per_chip_batch,
        "parallel, remat, accum_steps": f"{result.parallel}, {result.remat}, {result.accum_steps}",
        "student's parameters, MiB": number(result.parameter_bytes, mib, 1),
        "optimiser, MiB": number(result.optimizer_bytes, mib, 1),
        "teacher's parameters, MiB": number(result.teacher_bytes, mib, 1),
        "state and batch as laid out, MiB": number(result.argument_bytes, mib, 1),
        "temporaries, MiB": number(result.temp_bytes, mib, 1),
        "peak, MiB": number(result.peak_bytes, mib, 1),
        "memory, MiB": number(result.hbm_bytes, mib, 1),
        "fits": "yes" if result.fits else "NO",
        "matrix products, GFLOP a step": number(result.flops, 1e9, 3),
    }
    if not result.quick:
        rows |= {
            "read and written, GB a step": number(result.bytes_accessed, 1e9, 3),
            "over the links, GB a step": number(result.collective_bytes, 1e9, 3),
            "that the links take, ms": number(result.collective_seconds, 1e-3, 2),
            "floor of a step, ms": number(result.floor_seconds, 1e-3, 2),
            "images/s at the floor, all chips": number(result.floor_images_per_second, 1, 0),
            "hours of the whole run at the floor": number(result.floor_hours, 1, 1),
        }
    if result.estimated_cycles is not None:
        rows |= {
            "estimated by the compiler, Mcycles a step": number(result.estimated_cycles, 1e6, 1),
            "estimated step, ms": number(result.estimated_seconds, 1e-3, 2),
            "estimated images/s, all chips": number(result.estimated_images_per_second, 1, 0),
            "estimated hours of the whole run": number(result.estimated_hours, 1, 1),
            "estimated share of the peak, %": number(result.estimated_mfu, 0.01, 1),
        }
    lines = Table(title=f"{result.topology}, {result.chips} chips", title_justify="left")
    lines.add_column("a chip")
    lines.add_column("", justify="right")
    for name, value in rows.items():
        lines.add_row(name, str(value))
    return lines


def breakdown_table(parts: list[Part]) -> Table:
    """Cycles and bytes by part, and their sums."""
    lines = Table("part", title="where they go, a step", title_justify="left")
    for heading in ("estimated Mcycles", "%", "GB", "%"):
        lines.add_column(heading, justify="right")
    cycles, moved = sum(row.cycles for row in parts), sum(row.bytes for row in parts)
    for part, own_cycles, own_bytes in [*parts, Part("all", cycles, moved)]:
        lines.add_row(
            part,
            f"{own_cycles / 1e6:,.1f}", f"{100 * own_cycles / max(cycles, 1):.1f}",
            f"{own_bytes / 1e9:,.2f}", f"{100 * own_bytes / max(moved, 1):.1f}",
            end_section=part == parts[-1].part,
        )  # fmt: skip
    return lines


def costliest_table(rows: list[Costliest]) -> Table:
    """Instructions by cycles."""
    lines = Table(title="costliest instructions, a step", title_justify="left")
    for heading in ("Mcycles", "times", "MB"):
        lines.add_column(heading, justify="right")
    for heading in ("instruction", "result", "origin"):
        lines.add_column(heading, overflow="fold")
    for row in rows:
        numbers = f"{row.cycles / 1e6:,.2f}", str(row.times), f"{row.bytes / 1e6:,.1f}"
        lines.add_row(*numbers, row.instruction, row.shape, row.origin)
    return lines
