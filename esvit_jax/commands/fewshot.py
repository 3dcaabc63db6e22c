"""`esvit fewshot`: probes on a few images a class, or a share of all labels."""

from typing import TYPE_CHECKING, Any

from esvit_jax.commands.arguments import (
    Parser,
    above_zero,
    add_json,
    add_key,
    add_network,
    add_processes,
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
from esvit_jax.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from esvit_jax.evaluate.fewshot import Labels

FILE = "fewshot.json"


def main(argv: list[str]) -> None:
    """`esvit fewshot`."""
    parser = Parser(
        "fewshot",
        "Trains linear classifiers on a few labels, several times with others, and tests them.",
    )
    add_network(parser)
    add_key(parser)
    add_splits(parser)
    parser.add_argument(
        "--shots", type=several(positive), metavar="N,…",
        help="images a class with labels (default: 1,2,5,10,20,50, as far as there are so many)",
    )  # fmt: skip
    parser.add_argument(
        "--percents", type=several(above_zero), metavar="P,…",
        help="of each class's images with labels (default: 1,10)",
    )  # fmt: skip
    parser.add_argument(
        "--seeds", type=positive, default=3, metavar="N",
        help="choices of images, over which mean and spread are taken (default: 3)",
    )  # fmt: skip
    add_report(parser, FILE)
    add_json(parser)
    add_processes(parser)
    arguments = parser.parse_args(argv)
    if any(percent > 100 for percent in arguments.percents or ()):
        raise UserError(
            "there are no more than 100", argument="--percents",
            value=",".join(f"{percent:g}" for percent in arguments.percents),
        )  # fmt: skip
    with processes(arguments, "fewshot"):
        run(arguments)


def run(arguments: Any) -> None:
    """Evaluates; of several processes, one writes and speaks."""
    from esvit_jax.evaluate.blocks import targets_of
    from esvit_jax.evaluate.cache import labelled_blocks
    from esvit_jax.evaluate.fewshot import few_shot, few_shot_result, few_shot_table
    from esvit_jax.runlog.alive import signs_of_life

    evaluation = open_evaluation(arguments, FILE)
    loaded, console = evaluation.loaded, evaluation.console
    sources = open_splits(arguments, loaded.config, "a probe")
    num_classes = sources[0].num_classes
    if num_classes < 2:
        raise UserError(f"{sources[0].name} has one class; a probe needs two to tell apart")
    train, test = labelled_blocks(
        loaded, sources, "a probe", key=arguments.key, keep=features_folder(arguments),
        console=console,
    )  # fmt: skip
    amounts = amounts_of(arguments, targets_of(train), num_classes, console)
    doing = ["probes"]
    with signs_of_life(lambda: doing[-1], console):
        found = few_shot(
            train, test, num_classes, amounts,
            seeds=range(arguments.seeds), progress=doing.append,
        )  # fmt: skip
    head = describe_splits(loaded, arguments.key, sources, (len(train), len(test)))
    result = few_shot_result(found, loaded.step)
    amounts_found = [
        {"labels": str(one.labels), "images": one.images, "l2": one.l2, **one.values}
        for one in found
    ]
    report = head | {"seeds": arguments.seeds, "amounts": amounts_found, **result.values}
    evaluation.finish(report, few_shot_table(found))


def amounts_of(
    arguments: Any, labels: "np.ndarray", num_classes: int, console: "Console"
) -> list["Labels"]:
    """What is asked for; of the default shots, those for which there are images.

    Raises:
      UserError: a class has fewer images than the shots that a flag asks for.
    """
    from esvit_jax.evaluate.fewshot import PERCENTS, SHOTS, Labels, too_few
    from esvit_jax.runlog.alive import say

    given = arguments.shots or arguments.percents
    shots, percents = arguments.shots or (), arguments.percents or ()
    if not given:
        shots, percents = SHOTS, PERCENTS
    amounts = []
    for count in shots:
        why = too_few(labels, num_classes, count)
        if why and given:
            raise UserError(why, argument="--shots", value=",".join(map(str, shots)))
        if why:
            say(console, f"{count} shots are left out: {why}")
        else:
            amounts.append(Labels(shots=count))
    return amounts + [Labels(percent=percent) for percent in percents]
