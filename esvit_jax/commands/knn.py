"""`esvit knn`: classify by nearest neighbours in feature space."""

import argparse
import json
from pathlib import Path

from rich.console import Console

from esvit_jax.checkpoint import load_model
from esvit_jax.data.sources import open_source
from esvit_jax.errors import UserError
from esvit_jax.evaluate.features import FeatureExtractor, view_features
from esvit_jax.evaluate.knn import knn_accuracy, knn_table


def main(argv: list[str]) -> None:
    """`esvit knn`."""
    parser = argparse.ArgumentParser(
        prog="esvit knn",
        description="Classifies test images by their nearest training images in feature space.",
    )
    parser.add_argument("--workdir", required=True, help="of a run, or a converted checkpoint")
    parser.add_argument("--step", type=int, help="of the checkpoint (default: the newest)")
    parser.add_argument("--key", choices=("teacher", "student"), help="default: teacher")
    parser.add_argument("--data", help="data set (default: config.data.name of the run)")
    parser.add_argument("--train_split", help="default: config.data.train_split")
    parser.add_argument("--test_split", help="default: config.data.test_split")
    parser.add_argument("--out", help="JSON file (default: knn.json in the workdir)")
    arguments = parser.parse_args(argv)

    loaded = load_model(arguments.workdir, arguments.step)
    data = loaded.config.data
    splits = arguments.train_split or data.train_split, arguments.test_split or data.test_split
    name = arguments.data or data.name
    train, test = (open_source(name, split, data.data_dir or None) for split in splits)
    if train.class_names != test.class_names:
        raise UserError(f"--data={name}: splits {splits[0]} and {splits[1]} have other classes")
    for source in (train, test):
        if not source.num_classes:
            raise UserError(f"--data={name}: split {source.split} has no labels; k-NN needs them")

    extractor = FeatureExtractor(view_features(loaded.model.backbone, loaded.config), loaded.config)
    params = getattr(loaded, arguments.key or "params")["backbone"]
    result = knn_accuracy(
        *extractor.arrays(params, train),
        *extractor.arrays(params, test),
        ks=loaded.config.evaluate.k,
        num_classes=train.num_classes,
    )
    report = {
        "step": loaded.step,
        "key": arguments.key or loaded.facts.get("key", "teacher"),
        "data": name,
        "train_split": splits[0],
        "test_split": splits[1],
        "train_images": len(train),
        "test_images": len(test),
    }
    out = Path(arguments.out or Path(arguments.workdir) / "knn.json")
    out.write_text(json.dumps(report | result, indent=1) + "\n")
    Console().print(knn_table(result))
    print(
        f"{len(train)} training and {len(test)} test images of {name}, {report['key']} at step "
        f"{loaded.step}; written to {out}"
    )
