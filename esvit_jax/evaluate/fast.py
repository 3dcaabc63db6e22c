"""A linear probe in minutes: logistic regression on frozen features, ℓ2 chosen on held-out ones.

Features are those of the centres of images, computed once; nothing is augmented, so results are not
those of the published protocol (`linear.py`), only close to them.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int
from rich.console import Console
from rich.table import Table

from esvit_jax.checkpoint import LoadedModel
from esvit_jax.data.sources import Source
from esvit_jax.errors import UserError
from esvit_jax.evaluate.blocks import Blocks, SelectedBlocks, targets_of
from esvit_jax.evaluate.cache import labelled_blocks
from esvit_jax.evaluate.logistic import Logistic, fit_logistic
from esvit_jax.evaluate.metrics import METRICS
from esvit_jax.evaluate.result import Result
from esvit_jax.runlog.alive import signs_of_life

L2_GRID = tuple(10.0**power for power in range(-6, 2))
# What is taken where no image can be held out to choose on.
DEFAULT_L2 = 1e-2
HELD_OUT = 0.2


class FastProbe(NamedTuple):
    """A probe that was chosen, trained and tested.

    Attributes:
      values: of the test split in percent, {"top1": 71.2, "top5": 90.1}, or what was asked for.
      l2: that was chosen.
      choices: {l2: percent on the held-out images}; empty where there were none.
      held_out: their number.
      model: one head, trained on the whole training split.
    """

    values: dict[str, float]
    l2: float
    choices: dict[float, float]
    held_out: int
    model: Logistic


class FastLinear(NamedTuple):
    """A probe of a network.

    Attributes:
      result: of the test split: top1, top5.
      probe: see `FastProbe`.
      images: that could be read, of the training and the test split.
    """

    result: Result
    probe: FastProbe
    images: tuple[int, int]

    def json(self) -> dict[str, Any]:
        """All of it but the weights, as JSON holds it."""
        sweep = [{"l2": l2, "top1": percent} for l2, percent in self.probe.choices.items()]
        return {
            "held_out_images": self.probe.held_out,
            "sweep": sweep,
            "picked": {"l2": self.probe.l2},
            **self.result.values,
        }


def fast_linear(
    loaded: LoadedModel,
    train: Source,
    test: Source,
    *,
    key: str | None = None,
    l2: Sequence[float] = L2_GRID,
    keep: str | os.PathLike[str] | None = None,
    console: Console | None = None,
) -> FastLinear:
    """`fast_probe` of a network's view features.

    Args:
      loaded: the network.
      train, test: splits of the same classes.
      key: "teacher" or "student"; see `LoadedModel.network`.
      l2: to choose from.
      keep: folder for the features; see `labelled_blocks`.
      console: for signs of life; None is standard output.

    Raises:
      UserError: one class; see `check_split` and `fit_logistic`.
      RunError: features are not finite.
    """
    if train.num_classes < 2:
        raise UserError(f"{train.name} has one class; a probe needs two to tell apart")
    console = console or Console()
    first, second = labelled_blocks(
        loaded, (train, test), "a probe", key=key, keep=keep, console=console
    )
    with signs_of_life(lambda: f"logistic regression, {len(l2)} strengths of ℓ2", console):
        probe = fast_probe(first, second, train.num_classes, l2=l2)
    result = Result("linear_fast", probe.values, step=loaded.step)
    return FastLinear(result, probe, (len(first), len(second)))


def fast_table(found: FastLinear) -> Table:
    """A row for each ℓ2: top-1 in percent on the held-out images, the pick marked."""
    table = Table("ℓ2", "held out, top-1 %", title="fast linear probe")
    for column in table.columns:
        column.justify = "right"
    for l2, percent in found.probe.choices.items():
        mark = " ←" if l2 == found.probe.l2 else ""
        table.add_row(f"{l2:g}", f"{percent:.2f}{mark}")
    return table


def fast_probe(
    train: Blocks,
    test: Blocks,
    num_classes: int,
    *,
    metrics: Sequence[str] = ("top1", "top5"),
    l2: Sequence[float] = L2_GRID,
    seed: int = 0,
) -> FastProbe:
    """Chooses ℓ2 on a fifth of each class of the training split, trains on all of it, and tests.

    The fifth is rounded down; where no class has five images, ℓ2 is `DEFAULT_L2`. Of equally good
    choices the strongest is taken. The test split chooses nothing.

    Args:
      train: of the training split; see `fit_logistic`.
      test: of the test split.
      num_classes: of both.
      metrics: of `METRICS`, the first of which chooses.
      l2: to choose from.
      seed: of the images that are held out.

    Raises:
      UserError: see `fit_logistic`; or of one class there is no image where a metric needs some.
    """
    multilabel = METRICS[metrics[0]].multilabel
    held = held_out(targets_of(train), seed)
    choices: dict[float, float] = {}
    if held.any() and len(l2) > 1:
        part = SelectedBlocks(train, ~held)
        heads = fit_logistic(part, l2, num_classes, multilabel=multilabel)
        found = measure(heads, SelectedBlocks(train, held), metrics[:1])
        choices = dict(zip(l2, (values[metrics[0]] for values in found), strict=True))
        chosen = max(choices, key=lambda x: (choices[x], x))
    else:
        chosen = l2[0] if len(l2) == 1 else DEFAULT_L2
    model = fit_logistic(train, [chosen], num_classes, multilabel=multilabel)
    return FastProbe(
        measure(model, test, metrics)[0], chosen, choices, int(held.sum()) if choices else 0, model
    )


def measure(model: Logistic, blocks: Blocks, metrics: Sequence[str]) -> list[dict[str, float]]:
    """Each head's metrics on a split, read once.

    Raises:
      UserError: it has no images, or of one class none where a metric needs some.
    """
    kept: dict[str, list[np.ndarray]] = {name: [] for name in metrics}
    every: list[np.ndarray] = []
    for features, targets in blocks:
        if not np.isfinite(features).all():
            raise UserError("blocks: some feature vectors are not finite")
        scores = model.scores(features)
        every.append(targets)
        for name in metrics:
            kept[name].append(METRICS[name].keep(scores, targets))
    if not every:
        raise UserError("blocks: no images; there must be at least one")
    targets = np.concatenate(every)
    whole = {name: np.concatenate(parts, axis=1) for name, parts in kept.items()}
    return [
        {name: METRICS[name].value(whole[name][head], targets) for name in metrics}
        for head in range(len(model.l2))
    ]


def held_out(targets: Int[np.ndarray, "n ..."], seed: int) -> Bool[np.ndarray, " n"]:
    """The images to choose on: of each class `HELD_OUT`, rounded down; see `of_each_class`.

    Of images with several classes, that share of all.
    """
    if targets.ndim > 1:
        targets = np.zeros(len(targets), int)
    return of_each_class(targets, lambda images: int(images * HELD_OUT), seed)


def of_each_class(
    labels: Int[np.ndarray, " n"], count: Callable[[int], int], seed: int
) -> Bool[np.ndarray, " n"]:
    """Chooses count(images there are) images of each class.

    The order in which images of a class are taken depends on the seed, the class and their order in
    the split only, so that of one seed a smaller choice is part of a larger one.
    """
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        order = np.random.default_rng((seed, int(label))).permutation(own)
        chosen[order[: count(len(own))]] = True
    return chosen
