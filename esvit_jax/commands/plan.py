"""`esvit plan`: say what a run needs on a TPU that is not here."""

import argparse
import json
from typing import Any

from rich.console import Console
from rich.table import Table

from esvit_jax.config import flatten, parse_config, unflatten
from esvit_jax.planning.chips import CHIPS, GIB
from esvit_jax.planning.search import IMAGENET_IMAGES, plan, search


def show(facts: dict[str, Any], console: Console) -> None:
    """Prints a plan for reading."""

    def number(name: str, unit: int | float, decimals: int) -> str:
        return "-" if facts[name] is None else f"{facts[name] / unit:,.{decimals}f}"

    table = Table(title=f"{facts['topology']}, {facts['chips']} chips", title_justify="left")
    table.add_column("a chip")
    table.add_column("", justify="right")
    rows = {
        "images": facts["per_chip_batch"],
        "remat, accum_steps": f"{facts['remat']}, {facts['accum_steps']}",
        "student's parameters, MiB": number("parameter_bytes", 2**20, 1),
        "optimiser, MiB": number("optimizer_bytes", 2**20, 1),
        "teacher's parameters, MiB": number("teacher_bytes", 2**20, 1),
        "state and batch as laid out, MiB": number("argument_bytes", 2**20, 1),
        "temporaries, MiB": number("temp_bytes", 2**20, 1),
        "peak, MiB": number("peak_bytes", 2**20, 1),
        "memory, MiB": number("hbm_bytes", 2**20, 1),
        "fits": "yes" if facts["fits"] else "NO",
        "matrix products, GFLOP a step": number("flops", 1e9, 3),
        "read and written, GB a step": number("bytes_accessed", 1e9, 3),
        "floor of a step, ms": number("floor_seconds", 1e-3, 2),
        "images/s at the floor, all chips": number("floor_images_per_second", 1, 0),
        "hours of the whole run at the floor": number("floor_hours", 1, 1),
    }
    for name, value in rows.items():
        table.add_row(name, str(value))
    console.print(table)


def main(argv: list[str]) -> None:
    """`esvit plan`."""
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
    if "-h" in argv or "--help" in argv:
        parser.parse_args(argv)
    config, rest = parse_config(argv)
    arguments = parser.parse_args(rest)
    fields = {
        "topology": arguments.topology,
        "num_images": arguments.num_images,
        "quick": arguments.quick,
    }
    console = Console(stderr=arguments.json)

    facts = plan(config, **fields, batch_per_chip=arguments.batch_per_chip)
    if arguments.search:
        known = {(facts["per_chip_batch"], facts["remat"], facts["accum_steps"]): facts}

        def attempt(batch: int, *, remat: str, accum_steps: int) -> dict[str, Any]:
            key = batch, remat, accum_steps
            if key not in known:
                changes = {"remat": remat, "accum_steps": accum_steps}
                changed = unflatten(flatten(config) | changes)
                result = known[key] = plan(changed, **fields, batch_per_chip=batch)
                console.print(
                    f"{batch} images a chip, remat={remat}, accum_steps={accum_steps}: "
                    f"{result['peak_bytes'] / GIB:.2f} of {result['hbm_bytes'] / GIB:.2f} GiB, "
                    f"{'fits' if result['fits'] else 'does not fit'}"
                )
            return known[key]

        facts["search"] = search(facts, attempt)
    if arguments.json:
        print(json.dumps(facts))
        return
    show(facts, console)
    for row in facts.get("search", []):
        for name in ("largest", "recipe"):
            console.print(f"remat={row['remat']}, {name} batch:{'' if row[name] else ' none fits'}")
            if row[name]:
                show(row[name], console)
