"""What commands share that evaluate a network on a training and a test split with labels."""

import argparse
import json
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from esvit_jax.commands.arguments import (
    add_data_dir,
    check_writable,
    data_place,
    open_network,
    path,
    quiet_libraries,
    write_json,
)
from esvit_jax.errors import UserError, renamed

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

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


def features_folder(arguments: Any) -> str:
    """Where features of splits are kept for the next command that wants them."""
    return os.path.join(arguments.workdir, "features")


class Evaluation(NamedTuple):
    """A command that evaluates a network on two splits with labels, and reports one table.

    Attributes:
      arguments: of the command.
      file: of the report, in the workdir if it is the run's own.
      first: whether this process writes and speaks.
      console: to report to, quiet in all other processes.
      out: where the report goes, if anywhere.
      loaded: the network.
    """

    arguments: Any
    file: str
    first: bool
    console: "Console"
    out: str | None
    loaded: "LoadedModel"

    def finish(self, report: Mapping[str, Any], table: "Table", *lines: str) -> None:
        """Writes the report, and prints it as JSON or as a table with some lines below it."""
        from esvit_jax.runlog.alive import say

        if not self.first:
            return
        if self.out:
            write_json(self.out, report)
        if self.arguments.json:
            print(json.dumps(report))
        else:
            self.console.print(table)
            for line in lines:
                say(self.console, line)
        for line in self._about(report):
            say(self.console, line)

    def _about(self, report: Mapping[str, Any]) -> Iterator[str]:
        """What the report is of, and where it is."""
        yield (
            f"{report['train_images']} training and {report['test_images']} test images of "
            f"{report['data']}, {report['key']} at step {report['step']}"
        )
        if unreadable := report.get("train_unreadable", 0) + report["test_unreadable"]:
            yield f"{unreadable} images could not be read and do not count"
        if self.out:
            yield f"written to {self.out}"
        else:
            yield f"not written: {self.file} is for the run's own data and network; give --out=FILE"


def open_evaluation(arguments: Any, file: str) -> Evaluation:
    """The network that the flags of `add_network` name, and where the report will go.

    Args:
      arguments: also with the flags of `add_key`, `add_splits`, `add_report` and `add_json`.
      file: of the report, in the workdir if it is the run's own.

    Raises:
      UserError: there is no such network, or the report cannot be written.
    """
    import jax
    from rich.console import Console

    quiet_libraries()
    first = jax.process_index() == 0
    named = (arguments.key, arguments.data, arguments.train_split, arguments.test_split,
             arguments.data_dir)  # fmt: skip
    out = arguments.out or (None if any(named) else os.path.join(arguments.workdir, file))
    if arguments.out and first:
        check_writable(arguments.out, "--out")
    loaded = open_network(arguments)
    if out and first and not arguments.out:
        check_writable(out, "--out")
    console = Console(stderr=arguments.json, quiet=not first)
    return Evaluation(arguments, file, first, console, out, loaded)


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

    name = arguments.data or config.data.name
    sources = []
    for field in ("train_split", "test_split"):
        place, names = data_place(arguments, config, field, field)
        with renamed(**names):
            source = open_source(*place)
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
        "key": loaded.chosen(key),
        "data": train.name,
        "train_split": train.split,
        "test_split": test.split,
        "train_images": images[0],
        "test_images": images[1],
        "train_unreadable": len(train) - images[0],
        "test_unreadable": len(test) - images[1],
    }
