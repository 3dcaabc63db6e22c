"""`esvit linear`: train linear classifiers on a frozen backbone."""

import os
from typing import Any

from esvit_jax.commands.arguments import (
    Parser,
    add_json,
    add_key,
    add_network,
    add_processes,
    ending_at_once,
    number,
    positive,
    processes,
    several,
)
from esvit_jax.commands.labelled import (
    add_report,
    add_splits,
    describe_splits,
    features_folder,
    open_evaluation,
    open_splits,
)
from esvit_jax.errors import renamed

FILE, FAST_FILE = "linear.json", "linear_fast.json"


def main(argv: list[str]) -> None:
    """`esvit linear`."""
    parser = Parser(
        "linear",
        "Trains linear classifiers on a frozen backbone, picks one on a held-out part of the "
        "training split, and tests it.",
    )
    add_network(parser)
    add_key(parser)
    add_splits(parser)
    parser.add_argument("--epochs", type=number, default=100, help="of training (default: 100)")
    parser.add_argument(
        "--batch_size", type=positive, default=1024,
        help="images a step, over all devices (default: 1024, or less if the data are less)",
    )  # fmt: skip
    parser.add_argument(
        "--learning_rates", type=several(number), metavar="X,…",
        help="that are tried, for 256 images a step (default: 13, from 0.0003 to 10)",
    )  # fmt: skip
    parser.add_argument(
        "--blocks", type=several(positive), metavar="N,…",
        help="last blocks whose mean maps a classifier sees (default: 1,4)",
    )  # fmt: skip
    parser.add_argument(
        "--fast", action="store_true",
        help="in minutes, and close to it: logistic regression on features of the images' centres, "
        f"ℓ2 chosen; nothing of the four flags above, and {FAST_FILE} in place of {FILE}",
    )  # fmt: skip
    add_report(parser, FILE)
    add_json(parser)
    add_processes(parser)
    arguments = parser.parse_args(argv)
    with ending_at_once("linear"), processes(arguments, "linear"):
        (run_fast if arguments.fast else run)(arguments)


def run(arguments: Any) -> None:
    """Evaluates; of several processes, one writes and speaks."""
    from esvit_jax.evaluate.linear import linear_probe, linear_table
    from esvit_jax.evaluate.sweep import BLOCKS, LEARNING_RATES, Sweep

    evaluation = open_evaluation(arguments, FILE)
    loaded = evaluation.loaded
    sources = open_splits(arguments, loaded.config, "a linear probe")
    sweep = Sweep(arguments.blocks or BLOCKS, arguments.learning_rates or LEARNING_RATES)
    flags = {name: f"--{name}" for name in ("blocks", "learning_rates", "epochs", "batch_size")}
    with renamed(keep_in="--workdir", **flags):
        probe = linear_probe(
            loaded, *sources, key=arguments.key, sweep=sweep, epochs=arguments.epochs,
            batch_size=arguments.batch_size, keep_in=os.path.join(arguments.workdir, "linear"),
            console=evaluation.console,
        )  # fmt: skip

    trained, held_out, tested = probe.images
    report = describe_splits(loaded, arguments.key, sources, (trained + held_out, tested))
    del report["train_unreadable"]  # the log names them, and others took their places
    report |= {"epochs": arguments.epochs} | probe.json()
    lines = [f"picked: {probe.picked}", f"test: {probe.result}"]
    if probe.picked.learning_rate in (min(sweep.learning_rates), max(sweep.learning_rates)):
        lines.append("that is at the end of the --learning_rates tried; others may do better")
    evaluation.finish(report, linear_table(probe), *lines)


def run_fast(arguments: Any) -> None:
    """Evaluates as --fast asks; of several processes, one writes and speaks."""
    from esvit_jax.evaluate.fast import fast_linear, fast_table

    evaluation = open_evaluation(arguments, FAST_FILE)
    loaded = evaluation.loaded
    sources = open_splits(arguments, loaded.config, "a linear probe")
    found = fast_linear(
        loaded, *sources, key=arguments.key, keep=features_folder(arguments),
        console=evaluation.console,
    )  # fmt: skip
    report = describe_splits(loaded, arguments.key, sources, found.images) | found.json()
    evaluation.finish(report, fast_table(found), f"test: {found.result}")
