"""`esvit plan`: say what a run needs on a TPU that is not here."""

import argparse
import dataclasses
import json

from rich.console import Console
from rich.table import Table

from esvit_jax.config import ConfigDict, flatten, parse_config, unflatten
from esvit_jax.errors import renamed
from esvit_jax.planning.chips import CHIPS, GIB
from esvit_jax.planning.plan import IMAGENET_IMAGES, Plan, plan
from esvit_jax.planning.search import Found, search

# How plans call their arguments, and how this command calls them.
FLAGS = {name: f"--{name}" for name in ("topology", "batch_per_chip", "num_images")}


def main(argv: list[str]) -> None:
    """`esvit plan`."""
    parser = argument_parser()
    if "-h" in argv or "--help" in argv:
        parser.parse_args(argv)
    config, rest = parse_config(argv)
    arguments = parser.parse_args(rest)
    console = Console(stderr=arguments.json)
    with renamed(**FLAGS):
        result = run(config, arguments, console, arguments.batch_per_chip)
    found = search_batches(config, arguments, console, result) if arguments.search else []
    if arguments.json:
        print(json.dumps(as_json(result, found if arguments.search else None)))
        return
    console.print(table(result))
    for row in found:
        for name, best in (("largest", row.largest), ("recipe", row.recipe)):
            console.print(f"remat={row.remat}, {name} batch:{'' if best else ' none fits'}")
            if best:
                console.print(table(best))


def argument_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="esvit plan",
        description="Compiles the training step for a TPU that is not here: does it fit, and how "
        "fast can it be at best.",
        epilog="--config=FILE[:arguments] and --config.field=value describe the run.",
    )
    parser.add_argument(
        "--topology", required=True,
        help=f"cpu (this machine), or the chips along each axis of a {', '.join(CHIPS)}: v5e:2x4",
    )  # fmt: skip
    parser.add_argument(
        "--batch_per_chip", type=int, help="images, in place of config.batch_size / chips"
    )
    parser.add_argument(
        "--quick", action="store_true",
        help="let the TPU compiler try less hard: half the time, and somewhat more memory",
    )  # fmt: skip
    parser.add_argument(
        "--num_images", type=int, default=IMAGENET_IMAGES, help="of the data set; ImageNet's"
    )
    parser.add_argument(
        "--search", action="store_true",
        help="the largest batch a chip for each config.remat (a dozen compilations, minutes each)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object, no table")
    return parser


def run(
    config: ConfigDict, arguments: argparse.Namespace, console: Console, batch: int | None
) -> Plan:
    """The plan that the flags ask for, for `batch` images a chip."""
    return plan(
        config,
        arguments.topology,
        num_images=arguments.num_images,
        batch_per_chip=batch,
        quick=arguments.quick,
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
    answer = dataclasses.asdict(result)
    if found is not None:
        answer["search"] = [
            {
                "remat": row.remat,
                "largest": row.largest and dataclasses.asdict(row.largest),
                "recipe": row.recipe and dataclasses.asdict(row.recipe),
            }
            for row in found
        ]
    return answer


def table(result: Plan) -> Table:
    """A plan for reading."""

    def number(value: int | float | None, unit: int | float, decimals: int) -> str:
        return "-" if value is None else f"{value / unit:,.{decimals}f}"

    mib = 2**20
    rows = {
        "images": result.per_chip_batch,
        "remat, accum_steps": f"{result.remat}, {result.accum_steps}",
        "student's parameters, MiB": number(result.parameter_bytes, mib, 1),
        "optimiser, MiB": number(result.optimizer_bytes, mib, 1),
        "teacher's parameters, MiB": number(result.teacher_bytes, mib, 1),
        "state and batch as laid out, MiB": number(result.argument_bytes, mib, 1),
        "temporaries, MiB": number(result.temp_bytes, mib, 1),
        "peak, MiB": number(result.peak_bytes, mib, 1),
        "memory, MiB": number(result.hbm_bytes, mib, 1),
        "fits": "yes" if result.fits else "NO",
        "matrix products, GFLOP a step": number(result.flops, 1e9, 3),
        "read and written, GB a step": number(result.bytes_accessed, 1e9, 3),
        "floor of a step, ms": number(result.floor_seconds, 1e-3, 2),
        "images/s at the floor, all chips": number(result.floor_images_per_second, 1, 0),
        "hours of the whole run at the floor": number(result.floor_hours, 1, 1),
    }
    lines = Table(title=f"{result.topology}, {result.chips} chips", title_justify="left")
    lines.add_column("a chip")
    lines.add_column("", justify="right")
    for name, value in rows.items():
        lines.add_row(name, str(value))
    return lines
