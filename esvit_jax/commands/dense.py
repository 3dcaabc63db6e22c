"""`esvit dense`: a linear layer on region features, for masks or depths."""

from typing import TYPE_CHECKING, Any

from esvit_jax.commands.arguments import (
    Parser,
    above_zero,
    add_json,
    add_key,
    add_network,
    data_place,
    positive,
    several,
    whole_number,
)
from esvit_jax.commands.labelled import (
    add_report,
    add_splits,
    describe_splits,
    open_evaluation,
)
from esvit_jax.errors import renamed

if TYPE_CHECKING:
    from esvit_jax.checkpoint import LoadedModel
    from esvit_jax.data.dense import DenseTargets

FILE = "dense.json"


def main(argv: list[str]) -> None:
    """`esvit dense`."""
    parser = Parser(
        "dense", "Trains a linear layer on frozen region features to tell classes or depths of "
        "pixels, and tests it.",
    )  # fmt: skip
    add_network(parser)
    add_key(parser)
    add_splits(parser)
    parser.add_argument(
        "--target", required=True, metavar="FEATURE",
        help="of a TFDS data set: a mask, such as segmentation_mask, or a depth",
    )  # fmt: skip
    parser.add_argument(
        "--classes", type=positive, metavar="N",
        help="numbers in a mask, from 0 (default: the feature is a depth)",
    )  # fmt: skip
    parser.add_argument(
        "--ignore", type=several(whole_number), default=(), metavar="N,…",
        help="numbers in a mask that are no class, such as 255",
    )  # fmt: skip
    parser.add_argument(
        "--learning_rates", type=several(above_zero), metavar="X,…",
        help="to choose from (default: 0.0001,0.001,0.01,0.1)",
    )  # fmt: skip
    parser.add_argument("--epochs", type=positive, default=20, help="of training (default: 20)")
    add_report(parser, FILE)
    add_json(parser)
    run(parser.parse_args(argv))


def run(arguments: Any) -> None:
    """Evaluates."""
    from esvit_jax.evaluate.dense import LEARNING_RATES, dense_probe, dense_split, dense_table
    from esvit_jax.runlog.alive import signs_of_life

    evaluation = open_evaluation(arguments, FILE)
    loaded, console = evaluation.loaded, evaluation.console
    data = open_targets(arguments, loaded)
    with renamed(num_classes="--classes"):
        train, test = (
            dense_split(
                loaded, one, arguments.classes, ignore=arguments.ignore, key=arguments.key,
                console=console,
            )
            for one in data
        )  # fmt: skip
    with signs_of_life(lambda: "training layers", console):
        probe = dense_probe(
            train, test, arguments.classes, epochs=arguments.epochs,
            learning_rates=arguments.learning_rates or LEARNING_RATES, step=loaded.step,
        )  # fmt: skip

    images = len(train.targets), len(test.targets)
    report = describe_splits(loaded, arguments.key, (data[0].source, data[1].source), images)
    sweep = [{"learning_rate": rate, "value": x} for rate, x in probe.held_out.items()]
    report |= {
        "target": arguments.target, "classes": arguments.classes, "epochs": arguments.epochs,
        "held_out_images": probe.images[1], "sweep": sweep,
        "picked": {"learning_rate": probe.learning_rate}, **probe.result.values,
    }  # fmt: skip
    evaluation.finish(report, dense_table(probe), f"test: {probe.result}")


def open_targets(arguments: Any, loaded: "LoadedModel") -> list["DenseTargets"]:
    """The training and the test split.

    Raises:
      UserError: there is no such data, or it has no such feature.
    """
    from esvit_jax.data.dense import DenseTargets

    opened = []
    for field in ("train_split", "test_split"):
        place, names = data_place(arguments, loaded.config, field, field)
        with renamed(key="--target", **names):
            opened.append(DenseTargets(*place, arguments.target))
    return opened
