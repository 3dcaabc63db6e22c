"""`esvit train`: train a backbone, or go on with an interrupted run."""

import os
import sys

from esvit_jax.commands.arguments import (
    ConfigParser,
    add_processes,
    path,
    processes,
    quiet_libraries,
)
from esvit_jax.errors import RUN_ERROR, renamed


def main(argv: list[str]) -> None:
    """`esvit train`."""
    parser = ConfigParser("train", "Trains a backbone, or goes on with a run that was interrupted.")
    parser.add_argument("--workdir", required=True, type=path, help="where the run is kept")
    add_processes(parser)
    config, arguments = parser.parse(argv)

    import jax
    from rich.console import Console

    from esvit_jax.analyze.summary import summarize
    from esvit_jax.loop import train
    from esvit_jax.runlog.signals import Interrupted

    quiet_libraries()
    try:
        with processes(arguments, "train"), renamed(workdir="--workdir"):
            result = train(config, arguments.workdir)
            if jax.process_index() == 0:
                summarize(config, result.workdir, Console())
    except Interrupted as error:  # perhaps while compiling, which an ordinary exit waits for
        print(f"esvit train: {error}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(RUN_ERROR)
