"""`esvit doctor`: whether this machine, or slice, can do a run."""

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING

from esvit_jax.commands.arguments import (
    ConfigParser,
    add_json,
    add_processes,
    path,
    processes,
    quiet_libraries,
)
from esvit_jax.errors import RUN_ERROR, RunError

if TYPE_CHECKING:
    from esvit_jax.config import ConfigDict
    from esvit_jax.doctor import Finding


def main(argv: list[str]) -> None:
    """`esvit doctor`.

    Raises:
      RunError: a check failed.
    """
    parser = ConfigParser(
        "doctor",
        "Checks, in about a minute, versions, devices, the sum over all of them, clocks; with "
        "--workdir also a checkpoint's way there and back; with --config also the data set's speed "
        "and what the run needs of memory and disk. Status 3 if a check fails.",
    )
    parser.add_argument("--workdir", type=path, help="of the run")
    add_json(parser)
    add_processes(parser)
    if any(word.split("=")[0] == "--config" for word in argv):
        config, arguments = parser.parse(argv)
    else:
        config, arguments = None, parser.parse_args(argv)

    with processes(arguments, "doctor"):
        examine(config, arguments)


def examine(config: "ConfigDict | None", arguments: argparse.Namespace) -> None:
    """Makes the checks and says what they found.

    Raises:
      RunError: a check failed.
    """
    import jax

    from esvit_jax import doctor

    quiet_libraries()
    first, findings = jax.process_index() == 0, []
    for finding in doctor.examine(arguments.workdir, config):
        findings.append(finding)
        if not arguments.json and (first or not finding.ok):
            show(finding, jax.process_index())
    if arguments.json and first:
        print(json.dumps({"ok": all(x.ok for x in findings), "checks": [
            finding._asdict() for finding in findings
        ]}))  # fmt: skip
    failed = [finding for finding in findings if not finding.ok]
    if not failed:
        return
    message = f"{len(failed)} of {len(findings)} checks failed: " + ", ".join(
        finding.check for finding in failed
    )
    if any(finding.hangs for finding in failed):  # an ordinary exit might wait for it
        print(f"esvit doctor: {message}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(RUN_ERROR)
    raise RunError(message)


def show(finding: "Finding", process: int) -> None:
    """Prints a line: green or red, and in words."""
    from rich.console import Console
    from rich.text import Text

    word, style = ("ok", "green") if finding.ok else ("FAILED", "bold red")
    where = f"process {process}: " if process else ""
    line = Text.assemble(
        (f"{word:6}  ", style), (f"{finding.check:15}  ", "bold"), where + finding.text
    )
    Console(soft_wrap=True, stderr=bool(process)).print(line)
