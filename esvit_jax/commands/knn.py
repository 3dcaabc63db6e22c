"""`esvit knn`: classify by nearest neighbours in feature space."""

import json
import os
from typing import TYPE_CHECKING, Any

from esvit_jax.commands.arguments import (
    Parser,
    add_data_dir,
    add_json,
    add_key,
    add_network,
    add_processes,
    check_writable,
    path,
    processes,
    quiet_libraries,
)
from esvit_jax.errors import UserError, renamed

if TYPE_CHECKING:
    from rich.console import Console

    from esvit_jax.checkpoint import LoadedModel
    from esvit_jax.data.sources import Source


def main(argv: list[str]) -> None:
    """`esvit knn`."""
    parser = Parser(
        "knn", "Classifies test images by their nearest training images in feature space."
    )
    add_network(parser)
    add_key(parser)
    parser.add_argument("--data", help="data set (default: config.data.name of the run)")
    add_data_dir(parser)
    parser.add_argument("--train_split", help="default: config.data.train_split")
    parser.add_argument("--test_split", help="default: config.data.test_split")
    parser.add_argument(
        "--out", type=path,
        help="JSON file to write (default: knn.json in the workdir, if network, data and splits "
        "are the run's own; else none)",
    )  # fmt: skip
    add_json(parser)
    add_processes(parser)
    arguments = parser.parse_args(argv)
    with processes(arguments, "knn"):
        run(arguments)


def run(arguments: Any) -> None:
    """Evaluates; of several processes, one writes and speaks."""
    own = not any(
        (arguments.key, arguments.data, arguments.train_split, arguments.test_split,
         arguments.data_dir)
    )  # fmt: skip
    out = arguments.out or (os.path.join(arguments.workdir, "knn.json") if own else None)

    import jax
    from rich.console import Console

    from esvit_jax.checkpoint import load_model
    from esvit_jax.evaluate.knn import knn_table

    quiet_libraries()
    first = jax.process_index() == 0
    console = Console(stderr=arguments.json, quiet=not first)
    if arguments.out and first:
        check_writable(arguments.out, "--out")
    loaded = load_model(arguments.workdir, arguments.step)
    if out and first and not arguments.out:
        check_writable(out, "--out")
    sources = open_sources(arguments, loaded)
    values, images = evaluate(loaded, arguments.key, sources, console)

    train, test = sources
    report = {
        "step": loaded.step,
        "key": arguments.key or loaded.origin.get("key", "teacher"),
        "data": train.name,
        "train_split": train.split,
        "test_split": test.split,
        "train_images": images[0],
        "test_images": images[1],
        "train_unreadable": len(train) - images[0],
        "test_unreadable": len(test) - images[1],
    }
    if not first:
        return
    if out:
        with open(out, "w") as file:
            file.write(json.dumps(report | values, indent=1) + "\n")
    if arguments.json:
        print(json.dumps(report | values))
    else:
        console.print(knn_table(values))
    say(console, loaded, report, out)


def open_sources(arguments: Any, loaded: "LoadedModel") -> list["Source"]:
    """The training and the test split.

    Raises:
      UserError: there is no such data, it has no labels, or the splits have other classes.
    """
    from esvit_jax.data.sources import open_source

    data = loaded.config.data
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
                f"{source.split} has no labels; k-NN needs them",
                argument=names["name"], value=name,
            )  # fmt: skip
        sources.append(source)
    if sources[0].class_names != sources[1].class_names:
        raise UserError(
            f"splits {sources[0].split} and {sources[1].split} have other classes",
            argument=names["name"], value=name,
        )  # fmt: skip
    return sources


def evaluate(
    loaded: "LoadedModel",
    key: str | None,
    sources: list["Source"],
    console: "Console",
) -> tuple[dict[str, float], list[int]]:
    """The accuracies, and how many images of each source could be read."""
    from esvit_jax import parallel
    from esvit_jax.evaluate.features import FeatureExtractor, view_features
    from esvit_jax.evaluate.knn import check_split, knn_accuracy
    from esvit_jax.runlog.alive import signs_of_life

    params = parallel.replicate(loaded.network(key)["backbone"], loaded.config.parallel)
    extract = view_features(loaded.model.backbone, loaded.config)
    extractor = FeatureExtractor(extract, loaded.config, sources)
    found = []
    with signs_of_life(extractor.describe, console):
        for source in sources:
            features, labels = extractor.arrays(params, source)
            check_split(source, features, labels)
            found.append((features, labels))
    train, test = found
    images = [len(labels) for _, labels in found]
    ks = loaded.config.evaluate.k
    with (
        signs_of_life(lambda: f"comparing {images[1]} images with {images[0]}", console),
        renamed(ks="config.evaluate.k"),
    ):
        values = knn_accuracy(*train, *test, ks=ks, num_classes=sources[0].num_classes)
    if max(ks) > images[0]:
        console.print(
            f"there are only {images[0]} training images: where k is more, all of them vote",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    return values, images


def say(console: "Console", loaded: "LoadedModel", report: dict[str, Any], out: str | None) -> None:
    """Says what was compared, and where the numbers are."""
    lines = [
        f"{report['train_images']} training and {report['test_images']} test images of "
        f"{report['data']}, {report['key']} at step {loaded.step}"
    ]
    if unreadable := report["train_unreadable"] + report["test_unreadable"]:
        lines.append(f"{unreadable} images could not be read and do not count")
    if out:
        lines.append(f"written to {out}")
    else:
        lines.append("not written: knn.json is for the run's own data and network; give --out=FILE")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
