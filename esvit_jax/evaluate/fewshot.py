"""How few labels a backbone needs: probes on a few images a class, or a share of all labels."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from rich.table import Table

from esvit_jax.errors import UserError
from esvit_jax.evaluate.blocks import Blocks, SelectedBlocks, in_memory, targets_of
from esvit_jax.evaluate.fast import L2_GRID, fast_probe, of_each_class
from esvit_jax.evaluate.metrics import spread
from esvit_jax.evaluate.result import Result

SHOTS = (1, 2, 5, 10, 20, 50)
PERCENTS = (1.0, 10.0)


class Labels(NamedTuple):
    """Which images have labels.

    Attributes:
      shots: of each class so many, or None:
      percent: of each class that share, rounded, but at least one image.
    """

    shots: int | None = None
    percent: float | None = None

    def __str__(self) -> str:
        return f"{self.shots}_shots" if self.shots else f"{self.percent:g}_percent"

    def count(self, images: int) -> int:
        """Of a class of so many."""
        if self.shots:
            return self.shots
        assert self.percent is not None
        return max(1, round(images * self.percent / 100))


class FewShot(NamedTuple):
    """Probes of one amount of labels.

    Attributes:
      labels: the amount.
      images: with labels.
      values: {metric: percent of each seed}.
      l2: chosen for each seed.
    """

    labels: Labels
    images: int
    values: dict[str, list[float]]
    l2: list[float]


def too_few(labels: Int[np.ndarray, " n"], num_classes: int, shots: int) -> str:
    """Why there cannot be so many shots, in words; "" if there can."""
    images = np.bincount(labels, minlength=num_classes)
    if images.min() >= shots:
        return ""
    short = int(np.sum(images < shots))
    return (
        f"{short} of {num_classes} classes have fewer than {shots} images, class "
        f"{images.argmin()} only {images.min()}"
    )


def few_shot(
    train: Blocks,
    test: Blocks,
    num_classes: int,
    amounts: Sequence[Labels],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    metrics: Sequence[str] = ("top1", "top5"),
    l2: Sequence[float] = L2_GRID,
    progress: Callable[[str], None] = lambda text: None,
) -> list[FewShot]:
    """Trains and tests a `fast_probe` for each amount of labels and each seed.

    A seed chooses the images, class by class. Those of one amount and seed are in memory at a time;
    the test split is read again for each. From five shots up a fifth of the images with labels
    chooses ℓ2; with fewer it is `fast.DEFAULT_L2`. No image without a label is used.

    Args:
      train: of the training split; targets are classes int[b].
      test: of the test split.
      num_classes: of both.
      amounts: of labels.
      seeds: of the choices.
      metrics: see `fast_probe`.
      l2: see `fast_probe`.
      progress: told what is next.

    Raises:
      UserError: a class has fewer images than shots; see `fast_probe`.
    """
    labels = targets_of(train)
    for amount in amounts:
        if amount.shots and (why := too_few(labels, num_classes, amount.shots)):
            raise UserError(why, argument="amounts", value=str(amount))
    found = []
    for amount in amounts:
        images, values, chosen = 0, {name: [] for name in metrics}, []
        for seed in seeds:
            progress(f"{str(amount).replace('_', ' ')}, seed {seed}")
            keep = of_each_class(labels, amount.count, seed)
            own = in_memory(SelectedBlocks(train, keep))
            probe = fast_probe(own, test, num_classes, metrics=metrics, l2=l2, seed=seed)
            for name in metrics:
                values[name].append(probe.values[name])
            images = int(keep.sum())
            chosen.append(probe.l2)
        found.append(FewShot(amount, images, values, chosen))
    return found


def few_shot_result(found: Sequence[FewShot], step: int | None) -> Result:
    """Means over seeds, and their spread."""
    values = {}
    for one in found:
        for name, percents in one.values.items():
            mean, deviation = spread(percents)
            values |= {f"{name}/{one.labels}": mean, f"{name}_spread/{one.labels}": deviation}
    return Result("fewshot", values, step=step)


def few_shot_table(found: Sequence[FewShot]) -> Table:
    """A row an amount: images, mean and spread of each metric, the ℓ2 of each seed."""
    names = list(found[0].values)
    table = Table("labels", "images", *(f"{name} %" for name in names), "ℓ2", title="few labels")
    for column in table.columns[1:]:
        column.justify = "right"
    for one in found:
        cells = ["{:.2f} ± {:.2f}".format(*spread(one.values[name])) for name in names]
        l2 = ", ".join(f"{x:g}" for x in one.l2)
        label = str(one.labels).replace("_", " ") if one.labels.shots != 1 else "1 shot"
        table.add_row(label, str(one.images), *cells, l2)
    return table
