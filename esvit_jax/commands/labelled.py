"""What commands share that evaluate a network on a training and a test split with labels."""

import argparse
import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from esvit_jax.commands.arguments import add_data_dir, check_writable, path
from esvit_jax.errors import UserError, renamed

if TYPE_CHECKING:
    from rich.console import Console

    from esvit_jax.checkpoint import LoadedModel
    from esvit_jax.config import ConfigDict
    from esvit_jax.data.sources import Source


def add_splits(parser: argparse.ArgumentParser) -> None:
    """--data, --data_dir, --train_split, --test_split: two splits of a data set with labels."""
    parser.add_argument("--data", help="data set (default: config.data.name of the run)")
    add_data_dir(parser)
    parser.add_argument("--train_split", help="default: config.data.train_split")
    parser.add_argument("--test_split", help="default: config.data.test_split")


def add_report(parser: argparse.ArgumentParser, name: str) -> None:
    """--out: the file for the numbers, by default `name` in the workdir."""
    parser.add_argument(
        "--out", type=path,
        help=f"JSON file to write (default: {name} in the workdir, if network, data and splits "
        "are the run's own; else none)",
    )  # fmt: skip


def report_file(arguments: Any, name: str) -> str | None:
    """Where the numbers go: --out, or `name` in the workdir if they are the run's own."""
    own = not any(
        (arguments.key, arguments.data, arguments.train_split, arguments.test_split,
         arguments.data_dir)
    )  # fmt: skip
    return arguments.out or (os.path.join(arguments.workdir, name) if own else None)


def features_folder(arguments: Any) -> str:
    """Where features of splits are kept for the next command that wants them."""
    return os.path.join(arguments.workdir, "features")


def load_network(arguments: Any, out: str | None, first: bool) -> "LoadedModel":
    """The network that the flags of `add_network` name.

    Args:
      arguments: also with the --out of `add_report`.
      out: file to write later, which is tried first.
      first: whether this process will write it.

    Raises:
      UserError: there is no such network, or `out` cannot be written.
    """
    from esvit_jax.checkpoint import load_model

    if arguments.out and first:
        check_writable(arguments.out, "--out")
    loaded = load_model(arguments.workdir, arguments.step, strict=arguments.strict)
    if out and first and not arguments.out:
        check_writable(out, "--out")
    return loaded


def open_splits(arguments: Any, config: "ConfigDict", what: str) -> tuple["Source", "Source"]:
    """The training and the test split that the flags of `add_splits` name.

    Args:
      arguments: of the command.
      config: of the run, which fills in.
      what: needs the labels, such as "k-NN".

    Raises:
      UserError: there is no such data, it has no labels, or the splits have other classes.
    """
    from esvit_jax.data.sources import open_source

    data = config.data
    name = arguments.data or data.name
    sources = []
    for field in ("train_split", "test_split"):
        split = getattr(arguments, field)
        names = {
            "name": "--data" if arguments.data else "config.data.name",
            "split": f"--{field}" if split else f"config.data.{field}",
            "data_dir": "--data_dir" if arguments.data_dir else "config.data.data_dir",
        }
        with renamed(**names):
            source = open_source(
                name, split or data[field], arguments.data_dir or data.data_dir or None
            )
        if not source.num_classes:
            raise UserError(
                f"{source.split} has no labels; {what} needs them",
                argument=names["name"], value=name,
            )  # fmt: skip
        sources.append(source)
    train, test = sources
    if train.class_names != test.class_names:
        raise UserError(
            f"splits {train.split} and {test.split} have other classes",
            argument=names["name"], value=name,
        )  # fmt: skip
    return train, test


def describe_splits(
    loaded: "LoadedModel",
    key: str | None,
    sources: tuple["Source", "Source"],
    images: tuple[int, int],
) -> dict[str, Any]:
    """The head of a report: which network, which data, and how many images could be read."""
    train, test = sources
    return {
        "step": loaded.step,
        "key": key or loaded.origin.get("key", "teacher"),
        "data": train.name,
        "train_split": train.split,
        "test_split": test.split,
        "train_images": images[0],
        "test_images": images[1],
        "train_unreadable": len(train) - images[0],
        "test_unreadable": len(test) - images[1],
    }


def write_report(out: str | None, report: Mapping[str, Any]) -> None:
    """Writes the numbers to a file, local or in a bucket, if there is one for them."""
    from etils import epath

    from esvit_jax.buckets import reaching

    if out:
        with reaching(out):
            epath.Path(out).write_text(json.dumps(report, indent=1) + "\n")


def say_splits(
    console: "Console", report: Mapping[str, Any], out: str | None, default: str
) -> None:
    """Says what a report is of, and where it is.

    Args:
      console: to print to.
      report: see `describe_splits`.
      out: the file it was written to, if any.
      default: the file that the run's own numbers are written to.
    """
    lines = [
        f"{report['train_images']} training and {report['test_images']} test images of "
        f"{report['data']}, {report['key']} at step {report['step']}"
    ]
    if unreadable := report.get("train_unreadable", 0) + report["test_unreadable"]:
        lines.append(f"{unreadable} images could not be read and do not count")
    if out:
        lines.append(f"written to {out}")
    else:
        lines.append(
            f"not written: {default} is for the run's own data and network; give --out=FILE"
        )
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
