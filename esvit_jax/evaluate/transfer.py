"""How a backbone does on other data sets: a probe and k-NN on each, judged as the set asks."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from esvit_jax import parallel
from esvit_jax.checkpoint import LoadedModel
from esvit_jax.data.multilabel import open_multilabel
from esvit_jax.data.sources import Source, open_source
from esvit_jax.errors import UserError
from esvit_jax.evaluate.blocks import ArrayBlocks, in_memory
from esvit_jax.evaluate.cache import labelled_blocks
from esvit_jax.evaluate.fast import L2_GRID, fast_probe, of_each_class
from esvit_jax.evaluate.features import (
    FeatureExtractor,
    check_split,
    view_features,
)
from esvit_jax.evaluate.fewshot import too_few
from esvit_jax.evaluate.knn import knn_ranks
from esvit_jax.evaluate.linear import linear_probe
from esvit_jax.evaluate.metrics import METRICS, rank_of_truth, spread
from esvit_jax.evaluate.result import Result
from esvit_jax.evaluate.sets import TransferSet
from esvit_jax.runlog.alive import signs_of_life

NEIGHBOURS = 20


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How the probe of a set is trained.

    Attributes:
      l2: to choose from; see `fast_probe`.
      seeds: of the images that have labels and of those that are held out; results are means.
      shots: images of each class that have labels, or None for all.
      published: the probe is `linear_probe`, and none of the above.
    """

    l2: tuple[float, ...] = L2_GRID
    seeds: tuple[int, ...] = (0,)
    shots: int | None = None
    published: bool = False


# The benchmark (ELEVATER) trains its probe by SGD, and chooses learning rate and ℓ2. Ours is solved
# to its optimum, which no learning rate changes; of the two ℓ2 is left to choose, on their range.
PROTOCOLS = {
    "fast": Protocol(),
    "benchmark": Protocol(tuple(10.0**power for power in range(-6, 7)), (0, 1, 2)),
    "linear": Protocol(published=True),
}


class Split(NamedTuple):
    """Features f32[n, d] and targets (int32[n], or int32[n, c] of several classes an image)."""

    features: np.ndarray
    targets: np.ndarray


class SetSources(NamedTuple):
    """The two splits of a set, opened.

    Attributes:
      name: of the set.
      about: the set.
      sources: training and test split.
      num_classes: there are.
      targets: of the records of both by their ids, where images have several classes.
    """

    name: str
    about: TransferSet
    sources: tuple[Source, Source]
    num_classes: int
    targets: tuple[dict[str, np.ndarray], dict[str, np.ndarray]] | None


class SetScores(NamedTuple):
    """How a network does on a set, in percent of the set's metric.

    Attributes:
      name: of the set.
      metric: of `METRICS`.
      images: that could be read, of the training and the test split.
      probe: of each seed.
      l2: that each chose; of the published protocol nothing.
      knn: of the `NEIGHBOURS` nearest of all training images; None where the metric needs scores,
        which votes are not.
    """

    name: str
    metric: str
    images: tuple[int, int]
    probe: list[float]
    l2: list[float]
    knn: float | None


def open_set(name: str, about: TransferSet, data_dir: str | None) -> SetSources:
    """Opens both splits.

    Raises:
      UserError: the set is not on disk, has no labels, or other classes than the table says.
    """
    if about.place is None:
        raise UserError(f"TFDS does not have it; name a folder of it: {name}=folder:PATH")
    targets = None
    if METRICS[about.metric].multilabel:
        opened = [open_multilabel(about.place, x, data_dir) for x in (about.train, about.test)]
        sources = opened[0].source, opened[1].source
        targets = opened[0].targets, opened[1].targets
        classes = [split.class_names for split in opened]
    else:
        sources = (
            open_source(about.place, about.train, data_dir),
            open_source(about.place, about.test, data_dir),
        )
        classes = [source.class_names for source in sources]
    if not classes[0]:
        raise UserError("it has no labels")
    if classes[0] != classes[1]:
        raise UserError(f"splits {about.train} and {about.test} have other classes")
    count = len(classes[0])
    if about.num_classes not in (None, count):
        raise UserError(f"it has {count} classes, and {about.title} has {about.num_classes}")
    if count < 2:
        raise UserError("it has one class; there is nothing to tell apart")
    return SetSources(name, about, sources, count, targets)


def transfer(
    loaded: LoadedModel,
    opened: SetSources,
    protocol: Protocol,
    *,
    keep_in: str,
    key: str | None = None,
    console: Console | None = None,
) -> SetScores:
    """Probes a network on one set.

    The features are the view features of the images' centres; all of them are in memory. A probe by
    the published protocol computes its own.

    Args:
      loaded: the network.
      opened: see `open_set`.
      protocol: of the probe.
      keep_in: folder for what it computes, in `features/` and `linear/`.
      key: "teacher" or "student"; see `LoadedModel.network`.
      console: for signs of life; None is standard output.

    Raises:
      UserError: a class has fewer images than shots; the published protocol, which gives top-1,
        does not give the set's metric; see `fast_probe` and `check_split`.
      RunError: features are not finite.
    """
    console = console or Console()
    metric = opened.about.metric
    if protocol.published and metric != "top1":
        raise UserError(
            f"it asks for {METRICS[metric].title}, and the published protocol gives top-1; take "
            "another protocol"
        )
    if opened.targets is None:
        splits = labelled_blocks(
            loaded, opened.sources, "a probe", key=key, keep=os.path.join(keep_in, "features"),
            console=console,
        )  # fmt: skip
        train, test = (Split(x.features, x.targets) for x in map(in_memory, splits))
    else:
        train, test = _multilabel_features(loaded, opened, key, console)
    doing = [f"probe of {opened.name}"]
    if protocol.published:
        found = linear_probe(
            loaded, *opened.sources, keep_in=os.path.join(keep_in, "linear"), key=key,
            console=console,
        )  # fmt: skip
        probe, l2 = [found.result.values[metric]], []
    else:
        with signs_of_life(lambda: doing[-1], console):
            probe, l2 = _probes(train, test, opened, protocol, doing.append)
    knn = None
    if METRICS[metric].keep is rank_of_truth:
        with signs_of_life(lambda: f"k-NN of {opened.name}", console):
            (ranks,) = knn_ranks(
                *train, *test, ks=(NEIGHBOURS,), num_classes=opened.num_classes
            ).values()
        knn = METRICS[metric].value(ranks, test.targets)
    images = len(train.targets), len(test.targets)
    return SetScores(opened.name, metric, images, probe, l2, knn)


def _probes(
    train: Split,
    test: Split,
    opened: SetSources,
    protocol: Protocol,
    progress: Callable[[str], None],
) -> tuple[list[float], list[float]]:
    """What the probe of each seed reaches, and its ℓ2."""
    metric, shots, count = opened.about.metric, protocol.shots, opened.num_classes
    if shots and train.targets.ndim > 1:
        raise UserError("images have several classes; shots are of one class an image")
    if shots and (why := too_few(train.targets, count, shots)):
        raise UserError(why)
    reached, chosen = [], []
    for seed in protocol.seeds:
        progress(f"probe of {opened.name}, seed {seed}")
        own = train
        if shots:
            keep = of_each_class(train.targets, lambda _: shots, seed)
            own = Split(train.features[keep], train.targets[keep])
        probe = fast_probe(
            ArrayBlocks(*own), ArrayBlocks(*test), count, metrics=(metric,), l2=protocol.l2,
            seed=seed,
        )  # fmt: skip
        reached.append(probe.values[metric])
        chosen.append(probe.l2)
    return reached, chosen


def _multilabel_features(
    loaded: LoadedModel, opened: SetSources, key: str | None, console: Console
) -> list[Split]:
    """As `labelled_blocks`, with the targets of each image by its id."""
    assert opened.targets is not None
    params = parallel.replicate(loaded.network(key)["backbone"], loaded.config.parallel)
    extract = view_features(loaded.model.backbone, loaded.config)
    extractor = FeatureExtractor(extract, loaded.config, opened.sources)
    found = []
    with signs_of_life(extractor.describe, console):
        for source, targets in zip(opened.sources, opened.targets, strict=True):
            batches = list(extractor.batches(params, source))
            if not batches:
                raise UserError(f"{source.name} {source.split}: no image can be read")
            features = np.concatenate([batch["features"] for batch in batches])
            ids = [i for batch in batches for i in batch["id"]]
            check_split(source, features, np.zeros(len(ids), np.int32), "a probe")
            found.append(Split(features, np.stack([targets[i] for i in ids])))
    return found


def transfer_results(scores: Sequence[SetScores], step: int | None) -> list[Result]:
    """Of the probe and of k-NN: {"top1/cifar10": …}, means over seeds."""
    probe = {f"{one.metric}/{one.name}": spread(one.probe)[0] for one in scores}
    knn = {f"{one.metric}/{one.name}": one.knn for one in scores if one.knn is not None}
    found = [("transfer", probe), ("transfer_knn", knn)]
    return [Result(name, values, step=step) for name, values in found if values]


def wins(scores: Sequence[SetScores], others: Sequence[SetScores]) -> dict[str, tuple[int, int]]:
    """On how many sets the first network is better than the second, and of how many.

    Args:
      scores, others: of the same sets, in one order.

    Returns:
      {"probe": (3, 4), "knn": (2, 3)}.
    """
    pairs = {
        "probe": [
            (spread(a.probe)[0], spread(b.probe)[0]) for a, b in zip(scores, others, strict=True)
        ],
        "knn": [
            (a.knn, b.knn) for a, b in zip(scores, others, strict=True)
            if a.knn is not None and b.knn is not None
        ],
    }  # fmt: skip
    return {name: (sum(a > b for a, b in both), len(both)) for name, both in pairs.items()}


def transfer_table(scores: Sequence[SetScores], others: Sequence[SetScores] | None = None) -> Table:
    """A row a set: its metric, the probe and k-NN, and those of another network beside them."""
    against = ["probe, other", "k-NN, other"] if others else []
    table = Table("set", "metric", "probe %", "k-NN %", *against, title="transfer")
    for column in table.columns[2:]:
        column.justify = "right"
    for i, one in enumerate(scores):
        networks = [one, others[i]] if others else [one]
        cells = [cell for network in networks for cell in _cells(network)]
        table.add_row(one.name, METRICS[one.metric].title, *cells)
    return table


def _cells(one: SetScores) -> list[str]:
    mean, deviation = spread(one.probe)
    probe = f"{mean:.2f} ± {deviation:.2f}" if len(one.probe) > 1 else f"{mean:.2f}"
    return [probe, "–" if one.knn is None else f"{one.knn:.2f}"]


def scores_json(one: SetScores) -> dict[str, Any]:
    """One row, as JSON holds it."""
    mean, deviation = spread(one.probe)
    return {
        "metric": one.metric, "train_images": one.images[0], "test_images": one.images[1],
        "probe": mean, "probe_spread": deviation, "probe_seeds": one.probe, "l2": one.l2,
        "knn": one.knn,
    }  # fmt: skip
