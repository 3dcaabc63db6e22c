"""`esvit knn`: classify by nearest neighbours in feature space."""

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
from esvit_jax.errors import renamed

if TYPE_CHECKING:
    from rich.console import Console

    from esvit_jax.checkpoint import LoadedModel
    from esvit_jax.data.sources import Source

FILE = "knn.json"


def main(argv: list[str]) -> None:
    """`esvit knn`."""
    parser = Parser(
        "knn", "Classifies test images by their nearest training images in feature space."
    )
    add_network(parser)
    add_key(parser)
    add_splits(parser)
    parser.add_argument(
        "--k", type=several(positive), metavar="N,…",
        help="neighbours that vote (default: config.evaluate.k)",
    )  # fmt: skip
    parser.add_argument(
        "--temperature", type=several(above_zero), metavar="T,…",
        help="of the votes; results at another than 0.07 are named after it (default: 0.07)",
    )  # fmt: skip
    add_report(parser, FILE)
    add_json(parser)
    add_processes(parser)
    arguments = parser.parse_args(argv)
    with processes(arguments, "knn"):
        run(arguments)


def run(arguments: Any) -> None:
    """Evaluates; of several processes, one writes and speaks."""
    from esvit_jax.evaluate.knn import knn_table

    evaluation = open_evaluation(arguments, FILE)
    loaded = evaluation.loaded
    sources = open_splits(arguments, loaded.config, "k-NN")
    values, images = evaluate(arguments, loaded, sources, evaluation.console)

    report = describe_splits(loaded, arguments.key, sources, images) | values
    evaluation.finish(report, knn_table(values))


def evaluate(
    arguments: Any,
    loaded: "LoadedModel",
    sources: tuple["Source", "Source"],
    console: "Console",
) -> tuple[dict[str, float], tuple[int, int]]:
    """The accuracies, and how many images of each source could be read."""
    from esvit_jax.evaluate.blocks import in_memory
    from esvit_jax.evaluate.cache import labelled_blocks
    from esvit_jax.evaluate.knn import TEMPERATURE, knn_accuracy
    from esvit_jax.runlog.alive import signs_of_life

    splits = labelled_blocks(
        loaded, sources, "k-NN", key=arguments.key, keep=features_folder(arguments), console=console
    )
    train, test = map(in_memory, splits)
    images = len(train), len(test)
    ks = arguments.k or loaded.config.evaluate.k
    with (
        signs_of_life(lambda: f"comparing {images[1]} images with {images[0]}", console),
        renamed(ks="config.evaluate.k"),
    ):
        values = knn_accuracy(
            train.features, train.targets, test.features, test.targets, ks=ks,
            temperature=arguments.temperature or TEMPERATURE, num_classes=sources[0].num_classes,
        )  # fmt: skip
    if max(ks) > images[0]:
        console.print(
            f"there are only {images[0]} training images: where k is more, all of them vote",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    return values, images
