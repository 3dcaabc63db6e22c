"""`esvit bench`: time the training step on this machine."""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Iterator
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from esvit_jax.bench.inputs import InputSpeed, bench_input
from esvit_jax.bench.losses import LossCosts, bench_losses
from esvit_jax.bench.step import StepSpeed, bench_split, bench_step, workload
from esvit_jax.bench.timing import Timing
from esvit_jax.commands.arguments import ConfigParser, add_json, path
from esvit_jax.config import ConfigDict
from esvit_jax.errors import UserError, renamed
from esvit_jax.models import PRESETS, Swin
from esvit_jax.planning.plan import IMAGENET_IMAGES

PARTS = ("step", "split", "losses", "input")
PACKAGES = ("jax", "jaxlib", "flax", "torch", "transformers", "opencv-python-headless")


def main(argv: list[str]) -> None:
    """`esvit bench`."""
    parser = argument_parser()
    config, arguments = parser.parse(argv)
    parts = [part for part in arguments.parts.split(",") if part]
    check_arguments(config, arguments, parts)
    console = Console(stderr=arguments.json)
    result = measure(config, arguments, parts, console)
    if arguments.json:
        print(json.dumps(as_json(result)))
        return
    for name, value in (result["where"] | result.get("what", {})).items():
        console.print(f"{name}: {value}", highlight=False)
    for table in tables(result):
        console.print(table)


def argument_parser() -> ConfigParser:
    """The flags."""
    parser = ConfigParser(
        "bench", "Times the training step of a config on this machine, with random data."
    )
    parser.add_argument(
        "--parts", default="step,split",
        help=f"of {', '.join(PARTS)}, with commas between; '' with --peer times only that",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=7, help="timings; medians are given")
    parser.add_argument(
        "--peer", choices=["torch", "torch-compiled"],
        help="also time the step in PyTorch with Hugging Face's SwinModel (extra torch)",
    )  # fmt: skip
    parser.add_argument(
        "--alone", action="store_true",
        help="with --peer: its step by itself, not in turns with ours; leaves it all the memory",
    )  # fmt: skip
    parser.add_argument("--photos", type=path, help="folder of photos, for --parts=input")
    parser.add_argument(
        "--loss_batches", default="8,32", help="images, for --parts=losses: one row each"
    )
    add_json(parser)
    return parser


def measure(
    config: ConfigDict, arguments: argparse.Namespace, parts: list[str], console: Console
) -> dict[str, Any]:
    """All that the flags ask for, by name; says on the console what it is at."""

    def at_work(task: str) -> None:
        console.print(f"timing {task}, which is compiled first", highlight=False)

    result: dict[str, Any] = {"where": where()}
    if {"step", "split"} & set(parts) or arguments.peer:
        work = workload(config, IMAGENET_IMAGES)
        result["what"] = {
            "backbone": config.backbone.name, "batch_size": config.batch_size,
            "dtype": config.dtype, "remat": config.remat, "accum_steps": config.accum_steps,
            "devices": jax.device_count(),
        }  # fmt: skip
        if "step" in parts:
            at_work("the step")
            result["step"] = bench_step(work, arguments.rounds)
        if "split" in parts:
            at_work("its parts")
            result["split"] = bench_split(work, arguments.rounds)
        if arguments.peer:
            from esvit_jax.bench.peer import bench_peer, bench_peer_alone

            at_work("the peer")
            bench_it = bench_peer_alone if arguments.alone else bench_peer
            result["peer_alone" if arguments.alone else "peer"] = bench_it(
                work, arguments.rounds, compiled=arguments.peer == "torch-compiled"
            )
    if "losses" in parts:
        at_work("the losses")
        batches = [int(batch) for batch in arguments.loss_batches.split(",")]
        result["losses"] = bench_losses(config, batches, arguments.rounds)
    if "input" in parts:
        at_work("the input")
        with renamed(photos="--photos"):
            result["input"] = bench_input(config, arguments.photos, arguments.rounds)
    return result


def as_json(value: Any) -> Any:
    """Named tuples as objects, but for a `Timing`, which is a list."""
    if hasattr(value, "_asdict") and not isinstance(value, Timing):
        value = value._asdict()
    if isinstance(value, dict):
        return {name: as_json(x) for name, x in value.items()}
    return [as_json(x) for x in value] if isinstance(value, list) else value


def check_arguments(config: ConfigDict, arguments: argparse.Namespace, parts: list[str]) -> None:
    """Refuses what cannot be timed, before anything is compiled.

    Raises:
      UserError: names the flag.
    """
    for part in parts:
        if part not in PARTS:
            message = f"{part!r} is unknown; known are {', '.join(PARTS)}"
            raise UserError(message, argument="--parts", value=arguments.parts)
    if arguments.rounds < 1:
        raise UserError("it must be at least 1", argument="--rounds", value=arguments.rounds)
    if "input" in parts and not arguments.photos:
        raise UserError("--parts=input needs --photos=FOLDER, a folder of photos")
    if arguments.alone and not arguments.peer:
        raise UserError("--alone needs --peer=torch or --peer=torch-compiled")
    if arguments.peer and PRESETS[config.backbone.name][0] is not Swin:
        message = f"the peer is a Swin, and config.backbone.name is {config.backbone.name}"
        raise UserError(message, argument="--peer", value=arguments.peer)
    batches = arguments.loss_batches.split(",")
    if not all(batch.isdigit() and int(batch) for batch in batches):
        message = "whole numbers from 1, with commas between"
        raise UserError(message, argument="--loss_batches", value=arguments.loss_batches)
    for package in ("torch", "transformers") if arguments.peer else ():
        if importlib.util.find_spec(package) is None:
            message = f"it needs {package}: pip install 'esvit_jax[torch]'"
            raise UserError(message, argument="--peer", value=arguments.peer)


def where() -> dict[str, Any]:
    """Date, device and versions: what a number means nothing without."""
    versions = {
        name: importlib.metadata.version(name)
        for name in PACKAGES
        if importlib.util.find_spec(name) or name.startswith("opencv")
    }
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "versions": versions,
    }


def tables(result: dict[str, Any]) -> Iterator[Table]:
    """The measurements for reading."""
    if "step" in result:
        yield step_table(result["step"])
    if split := result.get("split"):
        total = sum(split.values())
        yield two_columns(
            "its parts, each on its own",
            {name: f"{x:.3f} s  {x / total:4.0%}" for name, x in split.items()},
        )
    if peer := result.get("peer"):
        table = Table("task", "ours, s", "peer, s", "ours / peer", title="beside PyTorch")
        for task, x in peer.items():
            table.add_row(task, f"{x.ours:.2f}", f"{x.peer:.2f}", f"{x.ratio:.2f}")
        yield table
    if alone := result.get("peer_alone"):
        yield two_columns("PyTorch's step, alone", {
            "a step, median (range)": seconds(alone.step),
            "images/s": f"{alone.images_per_second:.2f}",
            "most memory in use": mebibytes(alone.peak_bytes),
        })  # fmt: skip
    if "losses" in result:
        yield losses_table(result["losses"])
    if "input" in result:
        yield from input_tables(result["input"])


def step_table(step: StepSpeed) -> Table:
    """The whole step."""
    return two_columns("the step", {
        "compilation": f"{step.compile_seconds:.1f} s",
        "a step, median (range)": seconds(step.step),
        "images/s": f"{step.images_per_second:.2f}",
        "TFLOP/s of its matrix products": f"{step.tflops:.3f}",
        "TFLOP/s of one large product": f"{step.product_tflops:.3f}",
        "share of that": f"{step.product_share:.0%}",
        "share of the peak": "unknown of this device" if step.mfu is None else f"{step.mfu:.1%}",
        "temporaries": f"{step.temp_bytes / 2**20:,.0f} MiB a device",
        "state and batch": f"{step.argument_bytes / 2**20:,.0f} MiB a device",
        "most memory in use": mebibytes(step.peak_bytes),
    })  # fmt: skip


def seconds(timing: Timing) -> str:
    """Median and range."""
    return f"{timing.median:.3f} s ({timing.low:.3f} to {timing.high:.3f})"


def mebibytes(count: int | None) -> str:
    """Bytes of a device; None where it does not say."""
    return "not reported by this device" if count is None else f"{count / 2**20:,.0f} MiB"


def losses_table(rows: list[LossCosts]) -> Table:
    """Both ways to compute the losses."""
    table = Table(
        "images", "chunked", "plain", "share", "chunked", "plain", "ratio", "differ by",
        title="the losses, value and gradients: MiB of temporaries, then seconds",
    )  # fmt: skip
    for images, ours, plain in rows:
        table.add_row(
            str(images),
            *(f"{x.temp_bytes / 2**20:,.0f}" for x in (ours, plain)),
            f"{ours.temp_bytes / plain.temp_bytes:.2f}",
            *(f"{x.seconds:.2f}" for x in (ours, plain)),
            f"{ours.seconds / plain.seconds:.2f}",
            f"{abs(ours.loss - plain.loss) / plain.loss:.0e}",
        )
    return table


def input_tables(speed: InputSpeed) -> Iterator[Table]:
    """How fast photos become canvases, and what those lose."""
    rates = {f"decode, {name}": rate for name, rate in speed.decode.items()}
    rates |= {f"loader, {how}": rate / speed.cores for how, rate in speed.loader.items()}
    rates["all views with Pillow"] = speed.pillow_views
    yield two_columns(
        "photos of 500 × 375 to canvases, images/s a core",
        {name: f"{rate:6,.0f}  {rate / speed.pillow_views:5.1f} ×" for name, rate in rates.items()},
    )
    yield two_columns(
        "mean absolute error of crops from a canvas, levels of 255",
        {
            f"canvas {side}": ", ".join(f"{kind} {error:.2f}" for kind, error in errors.items())
            for side, errors in speed.fidelity.items()
        },
    )


def two_columns(title: str, rows: dict[str, str]) -> Table:
    """Names and values."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in rows.items():
        table.add_row(name, value)
    return table
