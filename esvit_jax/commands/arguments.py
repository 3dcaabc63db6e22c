"""What the commands share: flags that several have, and how they are read.

A command stands on this and imports what it runs only after its flags are read, so that `--help`
and a wrong flag are answered at once.
"""

import argparse
import difflib
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from esvit_jax.errors import RUN_ERROR, DiskFull, RunError, UserError, renamed

if TYPE_CHECKING:
    from esvit_jax.checkpoint import LoadedModel
    from esvit_jax.config import ConfigDict
    from esvit_jax.data.sources import Source

Value = TypeVar("Value")


class Parser(argparse.ArgumentParser):
    """The flags of `esvit NAME`; what is wrong with them is a UserError of one line.

    Args:
      name: of the command.
      description: what it does, for --help.
      fields: of `argparse.ArgumentParser`.
    """

    def __init__(self, name: str, description: str | None, **fields: Any):
        super().__init__(
            prog=f"esvit {name}", description=description, allow_abbrev=False, **fields
        )

    def error(self, message: str) -> NoReturn:
        if unknown := re.match("unrecognized arguments: (.*)", message):
            raise UserError(self._unknown(unknown[1]))
        if wrong := re.match("argument (?:-., )?(.*?): (.*)", message):
            raise UserError(f"{wrong[1]}: {wrong[2]}")
        raise UserError(f"{message}; {self.prog} --help lists the flags")

    def print_help(self, file: Any = None) -> None:
        from rich.console import Console
        from rich.text import Text

        text = Text.from_ansi(self.format_help())
        text.highlight_regex(r"--[\w.]+", "bold")
        Console(file=file, soft_wrap=True).print(text)

    def _unknown(self, words: str) -> str:
        flag = words.split("=")[0].split()[0]
        if not flag.startswith("-"):
            return f"{flag!r} is no flag; flags are written --name=value"
        known = [option for action in self._actions for option in action.option_strings]
        similar = difflib.get_close_matches(flag, known, n=1)
        advice = f"did you mean {similar[0]}?" if similar else f"{self.prog} --help lists the flags"
        return f"{flag} is no flag; {advice}"


class ConfigParser(Parser):
    """The flags of a command that is given a config, too."""

    def __init__(self, name: str, description: str | None, **fields: Any):
        epilog = "--config=FILE[:arguments] and --config.field=value describe the run."
        super().__init__(name, description, epilog=epilog, **fields)

    def parse(self, argv: list[str]) -> tuple["ConfigDict", argparse.Namespace]:
        """The config, and the flags that are not of the config.

        Raises:
          UserError: no config, or a wrong flag or field.
        """
        if "-h" in argv or "--help" in argv:
            self.parse_args(["--help"])
        from esvit_jax.config import parse_config

        config, rest = parse_config(argv)
        return config, self.parse_args(rest)


def path(text: str) -> str:
    """A path in a flag, for `add_argument(type=path)`; `~` is the home folder.

    Raises:
      ArgumentTypeError: it is empty.
    """
    if not text:
        raise argparse.ArgumentTypeError("it is empty; name a file or folder")
    return text if "://" in text else os.path.expanduser(text)


def positive(text: str) -> int:
    """A whole number from 1 in a flag, for `add_argument(type=positive)`.

    Raises:
      ArgumentTypeError: it is none.
    """
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 up")
    return int(text)


def whole_number(text: str) -> int:
    """A whole number from 0 in a flag.

    Raises:
      ArgumentTypeError: it is none.
    """
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 up")
    return int(text)


def number(text: str) -> float:
    """A number in a flag, for `add_argument(type=number)`.

    Raises:
      ArgumentTypeError: it is none.
    """
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from error


def above_zero(text: str) -> float:
    """A number above 0 in a flag.

    Raises:
      ArgumentTypeError: it is none.
    """
    value = number(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


def several(kind: Callable[[str], Value]) -> Callable[[str], tuple[Value, ...]]:
    """Values with commas between them in a flag, for `add_argument(type=several(positive))`."""
    return lambda text: tuple(kind(part) for part in text.split(","))


def add_network(parser: argparse.ArgumentParser) -> None:
    """--workdir, --step and --strict: a trained network on disk."""
    parser.add_argument(
        "--workdir", required=True, type=path,
        help="of a run, a converted checkpoint, or an export",
    )  # fmt: skip
    parser.add_argument("--step", type=int, help="of the checkpoint (default: the newest)")
    add_strict(parser)


def open_network(arguments: argparse.Namespace) -> "LoadedModel":
    """The network that the flags of `add_network`, and those of `add_key` if there are, name.

    Raises:
      UserError: there is no such network.
    """
    from esvit_jax.interop.exported import load_network

    with renamed(workdir="--workdir", key="--key"):
        loaded = load_network(arguments.workdir, arguments.step, strict=arguments.strict)
        loaded.network(getattr(arguments, "key", None))
    return loaded


def add_strict(parser: argparse.ArgumentParser) -> None:
    """--strict: damaged checkpoints are not passed over."""
    parser.add_argument(
        "--strict", action="store_true",
        help="refuse a damaged newest checkpoint (default: name it, and take the one before it)",
    )  # fmt: skip


def add_data_dir(parser: argparse.ArgumentParser) -> None:
    """--data_dir: where TFDS data sets lie."""
    parser.add_argument(
        "--data_dir", type=path, help="as config.data.data_dir (default: the run's)"
    )


def add_split(parser: argparse.ArgumentParser) -> None:
    """--data, --data_dir and --split: images to look at, which need no labels."""
    parser.add_argument("--data", help="data set (default: config.data.name of the run)")
    add_data_dir(parser)
    parser.add_argument(
        "--split", help="as in TFDS (default: config.data.test_split; with --data, train)"
    )


def open_split(arguments: argparse.Namespace, loaded: "LoadedModel") -> "Source":
    """The images that the flags of `add_split` name.

    Raises:
      UserError: there is no such data.
    """
    from esvit_jax.data.sources import open_source

    default = "train" if arguments.data else None
    place, names = data_place(arguments, loaded.config, "split", "test_split", default)
    with renamed(**names):
        return open_source(*place)


def data_place(
    arguments: argparse.Namespace,
    config: "ConfigDict",
    flag: str,
    field: str,
    default: str | None = None,
) -> tuple[tuple[str, str, str | None], dict[str, str]]:
    """What `open_source` takes of the data that flags name, and what users call each of it.

    Args:
      arguments: with `data`, `data_dir` and `flag`.
      config: of the run, which fills in.
      flag, field: of the split, in `arguments` and in `config.data`.
      default: split where there is no such flag; None is the config's.
    """
    data, split = config.data, getattr(arguments, flag) or default
    names = {
        "name": "--data" if arguments.data else "config.data.name",
        "split": f"--{flag}" if split else f"config.data.{field}",
        "data_dir": "--data_dir" if arguments.data_dir else "config.data.data_dir",
    }
    directory = arguments.data_dir or data.data_dir or None
    return (arguments.data or data.name, split or data[field], directory), names


def add_key(parser: argparse.ArgumentParser) -> None:
    """--key: which of the two networks of a run."""
    parser.add_argument(
        "--key", choices=("teacher", "student"),
        help="whose weights (default: the teacher's, or as the checkpoint was converted)",
    )  # fmt: skip


def add_json(parser: argparse.ArgumentParser) -> None:
    """--json: for programs that read the output."""
    parser.add_argument("--json", action="store_true", help="print one JSON object, no table")


def add_processes(parser: argparse.ArgumentParser) -> None:
    """--distributed, --coordinator, …: the processes that share the work."""
    parser.add_argument(
        "--distributed", action="store_true",
        help="one of several processes, as Cloud TPU, GKE, Slurm or Open MPI tell",
    )  # fmt: skip
    parser.add_argument("--coordinator", help="host:port of process 0, where nothing tells")
    parser.add_argument("--process_id", type=int, help="of this process, from 0")
    parser.add_argument("--num_processes", type=int, help="over all hosts")
    parser.add_argument(
        "--heartbeat_seconds", type=positive, metavar="N",
        help="without a sign of life from one process, after which all end (default: 30)",
    )  # fmt: skip


@contextmanager
def processes(arguments: argparse.Namespace, command: str) -> Iterator[None]:
    """Connects the processes that flags or the environment ask for; a failure of one ends all.

    Args:
      arguments: with the flags of `add_processes`.
      command: the name to complain under.

    Raises:
      UserError: the flags do not fit.
    """
    names = ("coordinator", "process_id", "num_processes", "heartbeat_seconds")
    given = {name: getattr(arguments, name) for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    if not (given or arguments.distributed or "JAX_COORDINATOR_ADDRESS" in os.environ):
        yield
        return

    from esvit_jax.cluster import connect
    from esvit_jax.processes import failing_together

    with renamed(**{name: f"--{name}" for name in names}):
        connect(**given)
    keep_standard_output()
    with failing_together(lambda line: print(f"esvit {command}: {line}", file=sys.stderr)):
        yield


def keep_standard_output() -> None:
    """Leaves standard output to Python, and sends there nothing else.

    What native code writes to its descriptor (gloo, a line for each connection) goes to standard
    error, so that who reads JSON finds JSON.
    """
    sys.stdout.flush()
    own = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = open(  # noqa: SIM115 - for as long as the process lives
        own, "w", buffering=1, encoding=sys.stdout.encoding, errors=sys.stdout.errors
    )


@contextmanager
def ending_at_once(command: str) -> Iterator[None]:
    """Ends the process, with one line, where a signal has stopped the work or a disk is full.

    An ordinary exit would wait for the compiler, or flush files that have no room.

    Args:
      command: the name to complain under.
    """
    try:
        yield
    except RunError as error:
        from esvit_jax.runlog.signals import Interrupted

        if not isinstance(error, Interrupted | DiskFull):
            raise
        print(f"esvit {command}: {error}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(RUN_ERROR)


def check_writable(file: str, flag: str) -> None:
    """Refuses a file that cannot be written, before anything is computed for it.

    What is there is left as it is. A remote path (gs://…) is taken on trust.

    Args:
      file: to write later.
      flag: that named it.

    Raises:
      UserError: says why.
    """
    if "://" in file:
        return
    folder = os.path.dirname(file) or "."
    if not os.path.isdir(folder):
        raise UserError(f"there is no folder {folder}; make it first", argument=flag, value=file)
    new = not os.path.lexists(file)
    try:
        with open(file, "ab"):
            pass
    except OSError as error:
        raise UserError(
            f"it cannot be written: {error.strerror}", argument=flag, value=file
        ) from error
    if new:
        os.unlink(file)


def output_folder(arguments: argparse.Namespace, own: bool = True) -> str | None:
    """Where a command with several files puts them: --out, or the workdir for what is its own.

    Args:
      arguments: with those of `add_network`, `add_key`, `add_split` and --out.
      own: whether what is looked at may be the run's own; it is where no flag names other data.

    Returns:
      A folder, which `write_json` and `write_figure` make if it is not there; None if there is none
      for it.

    Raises:
      UserError: it cannot be written.
    """
    named = (arguments.key, arguments.data, arguments.split, arguments.data_dir)
    folder = arguments.out or (arguments.workdir if own and not any(named) else None)
    if folder:
        check_folder(folder, "--out")
    return folder


def check_folder(folder: str, flag: str) -> None:
    """Refuses a folder in which no file can be written, before anything is computed for it.

    It may be one that is not there yet, and then it still is not. A remote path is taken on trust.

    Args:
      folder: to write into later.
      flag: that named it.

    Raises:
      UserError: says why.
    """
    if "://" in folder:
        return
    made, above = [], os.path.abspath(folder)
    while not os.path.lexists(above):
        made.append(above)
        above = os.path.dirname(above)
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(
            f"no file can be written there: {error.strerror}", argument=flag, value=folder
        ) from error
    finally:
        for path in filter(os.path.isdir, made):
            os.rmdir(path)


def write_json(file: str, value: Any) -> None:
    """Writes JSON to a file, local or in a bucket, whose folder is made if it is not there."""
    from etils import epath

    from esvit_jax.buckets import reaching

    with reaching(file):
        epath.Path(file).parent.mkdir(parents=True, exist_ok=True)
        epath.Path(file).write_text(json.dumps(value, indent=1) + "\n")


def quiet_libraries() -> None:
    """Leaves of what libraries log the warnings.

    Of a save that fails, Orbax logs several tracebacks beside raising the error: those are not.
    """
    from absl import logging

    logging.set_verbosity(logging.WARNING)
    logging.get_absl_logger().addFilter(
        lambda record: not (record.exc_info and "orbax" in record.pathname)
    )
