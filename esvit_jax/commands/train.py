"""`esvit train`: train a backbone, or go on with an interrupted run."""

import argparse
import os
import sys

import jax
from absl import logging
from rich.console import Console

from esvit_jax import parallel
from esvit_jax.analyze.summary import summarize
from esvit_jax.config import parse_config
from esvit_jax.errors import RUN_ERROR, renamed
from esvit_jax.loop import train
from esvit_jax.runlog.signals import Interrupted


def main(argv: list[str]) -> None:
    """`esvit train`."""
    parser = argparse.ArgumentParser(
        prog="esvit train",
        description="Trains a backbone, or goes on with a run that was interrupted.",
        epilog="--config=FILE[:arguments] and --config.field=value describe the run.",
    )
    parser.add_argument("--workdir", required=True, help="where the run is kept")
    parser.add_argument(
        "--distributed", action="store_true", help="connect the processes of several hosts first"
    )
    if "-h" in argv or "--help" in argv:
        parser.parse_args(argv)
    config, rest = parse_config(argv)
    arguments = parser.parse_args(rest)
    logging.set_verbosity(logging.WARNING)
    if arguments.distributed:
        parallel.start_distributed()
    try:
        with renamed(workdir="--workdir"):
            result = train(config, arguments.workdir)
    except Interrupted as error:  # perhaps while compiling, which an ordinary exit waits for
        print(f"esvit train: {error}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(RUN_ERROR)
    if jax.process_index() == 0:
        summarize(config, result.workdir, Console())
