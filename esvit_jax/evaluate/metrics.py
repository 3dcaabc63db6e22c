"""How good predictions are: the numbers that data sets are judged by, in percent.

Of scores, only their order counts, so logits do.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from esvit_jax.errors import UserError


def rank_of_truth(
    scores: Float[np.ndarray, "*heads b c"], labels: Int[np.ndarray, " b"]
) -> Int[np.ndarray, "*heads b"]:
    """How many classes are predicted before the true one; of equal scores, the lower class is."""
    own = np.take_along_axis(scores, np.broadcast_to(labels[:, None], (*scores.shape[:-1], 1)), -1)
    lower = np.arange(scores.shape[-1]) < labels[:, None]
    return ((scores > own) | ((scores == own) & lower)).sum(axis=-1)


def top(k: int, ranks: Int[np.ndarray, " n"]) -> float:
    """Share of images whose class is among the first k, in percent."""
    return 100.0 * int(np.sum(ranks < k)) / len(ranks)


def mean_per_class(ranks: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"]) -> float:
    """Mean over classes of the top-1 accuracy of their images, in percent.

    A class without images does not count.
    """
    images = np.bincount(labels)
    hits = np.bincount(labels[ranks == 0], minlength=len(images))
    return 100.0 * float(np.mean(hits[images > 0] / images[images > 0]))


def average_precision(scores: Float[np.ndarray, " n"], positives: Bool[np.ndarray, " n"]) -> float:
    """11-point average precision in percent, as of PASCAL VOC 2007.

    The mean over recalls 0, 0.1, …, 1 of the best precision at that recall or a higher one
    (Everingham et al. 2010, "The PASCAL visual object classes challenge", section 4.2). Images of
    one score are retrieved together.

    Raises:
      UserError: none is positive.
    """
    if not positives.any():
        raise UserError("positives: none of the images is one; there is no precision to measure")
    order = np.argsort(-scores, kind="stable")
    scores, hits = scores[order], np.cumsum(positives[order])
    last = np.append(scores[1:] != scores[:-1], True)  # of those with the same score
    hits, retrieved = hits[last], np.arange(1, len(scores) + 1)[last]
    best = np.maximum.accumulate((hits / retrieved)[::-1])[::-1]
    # In whole numbers, as 3 of 10 are a recall of 0.3.
    first = np.searchsorted(10 * hits, np.arange(11) * int(hits[-1]))
    return 100.0 * float(np.mean(best[first]))


def mean_average_precision(
    scores: Float[np.ndarray, "n c"], targets: Int[np.ndarray, "n c"]
) -> float:
    """Mean over classes of `average_precision`.

    Args:
      scores: of each image and class.
      targets: 1 (is), 0 (is not), -1 (does not count, as VOC's difficult objects).

    Raises:
      UserError: a class has no positive image.
    """
    empty = [c for c in range(targets.shape[1]) if not (targets[:, c] == 1).any()]
    if empty:
        raise UserError(f"targets: of class {empty[0]} there is no image")
    counts = targets >= 0
    return float(
        np.mean([
            average_precision(scores[counts[:, c], c], targets[counts[:, c], c] == 1)
            for c in range(targets.shape[1])
        ])
    )  # fmt: skip


def roc_auc(scores: Float[np.ndarray, " n"], positives: Bool[np.ndarray, " n"]) -> float:
    """Area under the ROC curve in percent.

    The share of pairs of a positive and a negative image in which the positive has the higher
    score; equal scores are half a pair.

    Raises:
      UserError: all images, or none, are positive.
    """
    count = int(positives.sum())
    if count in (0, len(positives)):
        raise UserError("positives: there must be some that are and some that are not")
    _, place, equal = np.unique(scores, return_inverse=True, return_counts=True)
    middle = np.cumsum(equal) - (equal - 1) / 2  # of the places, from 1, of equal scores
    above = middle[place][positives].sum() - count * (count + 1) / 2
    return 100.0 * float(above / (count * (len(positives) - count)))


def confusion(
    predicted: Int[np.ndarray, "*pixels"],
    truth: Int[np.ndarray, "*pixels"],
    num_classes: int,
) -> Int[np.ndarray, "c c"]:
    """Pixels of each true class (rows) by predicted class; those of no class (-1) do not count."""
    counts = truth >= 0
    cells = truth[counts].astype(np.int64) * num_classes + predicted[counts]
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def mean_iou(confusions: Int[np.ndarray, "c c"]) -> float:
    """Mean over classes of intersection over union, in percent.

    A class that neither occurs nor was predicted does not count.
    """
    both = np.diag(confusions)
    either = confusions.sum(axis=0) + confusions.sum(axis=1) - both
    return 100.0 * float(np.mean(both[either > 0] / either[either > 0]))


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation of a sample (n - 1; 0 of one value)."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


@dataclasses.dataclass(frozen=True)
class Metric:
    """One number for a split, in two steps, so that scores of large splits need not be kept.

    Attributes:
      title: for tables.
      keep: (scores f32[..., b, c], targets [b, ...]) -> what is kept of a block, [..., b, ...].
      value: (what was kept of all blocks, their targets) -> percent.
      multilabel: whether targets are int[b, c], as an image may have several classes.
    """

    title: str
    keep: Callable[[np.ndarray, np.ndarray], np.ndarray]
    value: Callable[[np.ndarray, np.ndarray], float]
    multilabel: bool = False


METRICS = {
    "top1": Metric("top-1", rank_of_truth, lambda ranks, _: top(1, ranks)),
    "top5": Metric("top-5", rank_of_truth, lambda ranks, _: top(5, ranks)),
    "mean_per_class": Metric("mean per class", rank_of_truth, mean_per_class),
    "map11": Metric(
        "11-point mAP", lambda scores, _: scores, mean_average_precision, multilabel=True
    ),
    "roc_auc": Metric(
        "ROC-AUC",
        lambda scores, _: scores[..., 1] - scores[..., 0],
        lambda scores, labels: roc_auc(scores, labels == 1),
    ),
}
