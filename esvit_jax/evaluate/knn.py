"""Weighted k-nearest-neighbour classification of features, exact and in bounded memory.

The devices find the neighbours, block by block; the host counts the votes in float64, so that
neither the order of a parallel sum nor its rounding decides which class wins.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree
from rich.table import Table

from esvit_jax import parallel
from esvit_jax.errors import UserError
from esvit_jax.evaluate.metrics import top
from esvit_jax.evaluate.result import Result
from esvit_jax.steps import AXIS

# Of the published protocol; results at this temperature are not named after it.
TEMPERATURE = 0.07


def knn_accuracy(
    train_features: Float[np.ndarray, "n d"],
    train_labels: Int[np.ndarray, " n"],
    test_features: Float[np.ndarray, "m d"],
    test_labels: Int[np.ndarray, " m"],
    *,
    ks: Sequence[int] = (10, 20, 100, 200),
    temperature: float | Sequence[float] = TEMPERATURE,
    num_classes: int | None = None,
    train_block: int = 8192,
    test_block: int = 512,
) -> dict[str, float]:
    """Accuracy in percent of classifying each test image by its k most similar train images.

    Similarity is the cosine s (float32), a neighbour's vote weighs exp(s / temperature), and the
    class with the largest sum wins (Wu et al. 2018, "Instance discrimination", section 3.4; the
    protocol of DINO and EsViT). A feature vector of zeros has similarity 0 to everything.

    - Of equally similar train images the one with the lower index is the nearer neighbour; of
      classes with equal votes the one with the lower number wins.
    - Top-5 counts a test image whose class is among the five with the most votes. Where fewer than
      five classes got a vote, the lowest-numbered others fill up, as in the public implementation;
      with five classes or fewer top-5 is therefore 100.
    - With fewer than k train images all of them vote, and the result is named after their number:
      of 160 train images and ks (20, 200) come "top1/20" and "top1/160".
    - At another temperature than 0.07 the result is named after it, too: "top1/20/0.04".

    Each device compares a share of the train images, and what they find is merged at the end; on
    any number of devices the result is the same. Memory on each: test features, `max(ks)`
    neighbours of each test image, one block of train features and one [test_block, train_block]
    block of similarities. Nothing grows with n × m or with the number of classes, and the train
    features cross to the devices once.

    Args:
      train_features: f32[n, d] on the host, not normalised.
      train_labels: int[n], classes from 0.
      test_features: f32[m, d], likewise.
      test_labels: int[m]; a class that no train image has is legal.
      ks: numbers of neighbours, each at least 1.
      temperature: of the votes, or several.
      num_classes: classes there are; None takes the largest label plus 1.
      train_block: train images that a device compares at a time.
      test_block: test images compared at a time.

    Returns:
      `{"top1/10": percent, "top5/10": percent, ...}`, two entries for each k in the order of `ks`,
      for one temperature after another.

    Raises:
      UserError: no images, another number of labels than of images, images without a label (-1),
        labels ≥ `num_classes`, features of two lengths or not finite (they would count as hits), a
        k that is no whole number from 1, or a temperature that is not positive.
    """
    ranks = knn_ranks(
        train_features, train_labels, test_features, test_labels, ks=ks, temperature=temperature,
        num_classes=num_classes, train_block=train_block, test_block=test_block,
    )  # fmt: skip
    return {f"top{k}/{name}": top(k, rank) for name, rank in ranks.items() for k in (1, 5)}


def knn_ranks(
    train_features: Float[np.ndarray, "n d"],
    train_labels: Int[np.ndarray, " n"],
    test_features: Float[np.ndarray, "m d"],
    test_labels: Int[np.ndarray, " m"],
    *,
    ks: Sequence[int],
    temperature: float | Sequence[float] = TEMPERATURE,
    num_classes: int | None = None,
    train_block: int = 8192,
    test_block: int = 512,
) -> dict[str, Int[np.ndarray, " m"]]:
    """How many classes come before each test image's own; all else is as of `knn_accuracy`.

    Returns:
      {"10": int[m], "10/0.04": …}, by k and temperature.

    Raises:
      UserError: see `knn_accuracy`.
    """
    several = not isinstance(temperature, int | float)
    temperatures = tuple(dict.fromkeys(temperature)) if several else (temperature,)
    _check_arguments(ks, temperatures, num_classes, train_features, test_features)
    largest = max(train_labels.max(initial=-1), test_labels.max(initial=-1))
    num_classes = int(largest) + 1 if num_classes is None else num_classes
    _check_images("train", train_features, train_labels, num_classes)
    _check_images("test", test_features, test_labels, num_classes)

    ks = tuple(dict.fromkeys(min(int(k), len(train_labels)) for k in ks))
    names = {(t, k): str(k) if t == TEMPERATURE else f"{k}/{t:g}" for t in temperatures for k in ks}
    found: dict[str, list[np.ndarray]] = {name: [] for name in names.values()}
    neighbours = _nearest(
        train_features, train_labels, test_features, max(ks), train_block, test_block
    )
    start = 0
    for similarity, labels in neighbours:
        truth = test_labels[start : start + len(labels)]
        start += len(labels)
        for (t, k), name in names.items():
            found[name].append(_rank_of_truth(similarity[:, :k], labels[:, :k], truth, t))
    return {name: np.concatenate(ranks) for name, ranks in found.items()}


def knn_table(values: Mapping[str, float]) -> Table:
    """What `knn_accuracy` returned, as a table: a row for each k, top-1 and top-5 in percent."""
    result = Result("knn", values)
    top1, top5 = result.quantity("top1"), result.quantity("top5")
    several = any("/" in which for which in top1)
    columns = ("k", "temperature") if several else ("k",)
    table = Table(*columns, "top-1 %", "top-5 %", title="k-NN")
    for column in table.columns:
        column.justify = "right"
    for which, percent in top1.items():
        k, _, temperature = which.partition("/")
        own = (k, temperature or f"{TEMPERATURE:g}") if several else (k,)
        table.add_row(*own, f"{percent:.2f}", f"{top5[which]:.2f}")
    return table


def _check_arguments(
    ks: Sequence[int | float],
    temperatures: Sequence[float],
    num_classes: int | None,
    train_features: np.ndarray,
    test_features: np.ndarray,
) -> None:
    if not ks or not all(isinstance(k, int | np.integer) and k >= 1 for k in ks):
        raise UserError("it must be whole numbers from 1 up", argument="ks", value=tuple(ks))
    wrong = [x for x in temperatures if not 0 < x < float("inf")]
    if wrong or not temperatures:
        value = wrong[0] if wrong else temperatures
        raise UserError("it must be more than 0", argument="temperature", value=value)
    if num_classes is not None and num_classes < 1:
        raise UserError("it must be at least 1", argument="num_classes", value=num_classes)
    if train_features.shape[1] != test_features.shape[1]:
        raise UserError(
            f"train_features have {train_features.shape[1]} columns, test_features have "
            f"{test_features.shape[1]}; both must come from one network"
        )


def _check_images(split: str, features: np.ndarray, labels: np.ndarray, num_classes: int) -> None:
    if len(labels) == 0:
        raise UserError(f"{split}_labels: no images; there must be at least one")
    if len(labels) != len(features):
        raise UserError(f"{split}_labels: {len(labels)} labels of {len(features)} images")
    if unlabelled := int(np.sum(labels < 0)):
        raise UserError(
            f"{split}_labels: {unlabelled} of {len(labels)} images have no label (-1); leave such "
            "images out"
        )
    if labels.max() >= num_classes:
        raise UserError(
            f"it must be at least {labels.max() + 1}: {split}_labels hold a {labels.max()}",
            argument="num_classes", value=num_classes,
        )  # fmt: skip
    if bad := int(np.sum(~np.isfinite(features).all(axis=1))):
        raise UserError(f"{split}_features: {bad} of {len(features)} vectors are not finite")


class _Nearest(NamedTuple):
    """The k nearest train images found so far of each test image of a block, the nearest first."""

    similarity: Array | np.ndarray  # f32[b, k]
    labels: Array | np.ndarray  # int32[b, k]


def _nearest(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    k: int,
    train_block: int,
    test_block: int,
) -> Iterator[tuple[Float[np.ndarray, "b k"], Int[np.ndarray, "b k"]]]:
    """Yields similarities and labels of the min(k, n) nearest, for one test block after another."""
    k = min(k, len(train_features))
    test_block = min(test_block, len(test_features))
    tests = [jnp.asarray(block) for block in _blocks(test_features, test_block)]
    tests = parallel.replicate(tests, "shard_map")
    shape = (jax.device_count() * test_block, k)
    nothing = _Nearest(np.full(shape, -np.inf, np.float32), np.full(shape, -1, np.int32))
    nearest = [jax.tree.map(parallel.spread_rows, nothing) for _ in tests]
    merge, gather = _on_own_rows()
    # Train blocks are the outer loop: they are what may not fit on the devices all at once.
    for train, labels in _shares(train_features, train_labels, train_block):
        own = {"train": parallel.spread_rows(train), "labels": parallel.spread_rows(labels)}
        nearest = [
            merge(own | {"nearest": found}, test)
            for found, test in zip(nearest, tests, strict=True)
        ]

    remaining = len(test_features)
    for found in nearest:
        similarity, labels = (np.asarray(x) for x in gather(found, ()))
        yield similarity[:remaining], labels[:remaining]
        remaining -= test_block


def _shares(
    features: np.ndarray, labels: np.ndarray, size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of `size` rows of each device's share of the train images, device after device.

    A device has the images that follow those of the device before. Label -1 is padding.
    """
    n, devices = len(labels), jax.device_count()
    share = -(-n // devices)
    size = min(size, share)
    for start in range(0, share, size):
        place = start + np.arange(size)
        rows = share * np.arange(devices)[:, None] + place
        real = (place < share) & (rows < n)
        rows = np.minimum(rows, n - 1).ravel()
        yield features[rows], np.where(real.ravel(), labels[rows], -1).astype(np.int32)


def _blocks(array: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Cuts the rows into blocks of one size, so that there is one compilation; zeros pad."""
    for start in range(0, len(array), size):
        block = array[start : start + size]
        yield np.pad(block, [(0, size - len(block)), (0, 0)])


@cache
def _on_own_rows() -> tuple[Callable[..., _Nearest], Callable[..., _Nearest]]:
    """`_merge` and `_gather` on all devices, compiled once a process."""
    return parallel.on_own_rows(_merge), parallel.on_own_rows(_gather, gathers=True)


def _merge(own: dict[str, PyTree[Array]], test: Float[Array, "b d"]) -> _Nearest:
    """The k nearest on this device among those found so far and one more train block.

    Args:
      own: what was found so far in "nearest", and features f32[t, d] in "train", with "labels"
        int32[t] (-1 is padding).
      test: features of the test block.
    """
    found, train, labels = own["nearest"], own["train"], own["labels"]
    # HIGHEST, because accelerators otherwise multiply in bfloat16 or TF32 and reorder neighbours.
    new = jnp.einsum(
        "b d, t d -> b t", _normalize(test), _normalize(train), precision=jax.lax.Precision.HIGHEST
    )
    new = jnp.where(labels >= 0, new, -jnp.inf)
    both = _Nearest(
        jnp.concatenate([found.similarity, new], axis=1),
        jnp.concatenate([found.labels, jnp.broadcast_to(labels, new.shape)], axis=1),
    )
    return _first(both, found.similarity.shape[1])


def _gather(own: _Nearest, _: tuple[()]) -> _Nearest:
    """The k nearest among those of all devices."""
    every = jax.lax.all_gather(own, AXIS, axis=1, tiled=True)
    return _first(every, own.similarity.shape[1])


def _first(nearest: _Nearest, k: int) -> _Nearest:
    """The k nearest of some, in order."""
    # top_k prefers the lower index among equals: what was found earlier comes first, and of two
    # devices, the images of the first come before those of the second.
    similarity, index = jax.lax.top_k(nearest.similarity, k)
    return _Nearest(similarity, jnp.take_along_axis(nearest.labels, index, axis=1))


def _normalize(features: Float[Array, "n d"]) -> Float[Array, "n d"]:
    return features / jnp.maximum(jnp.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def _rank_of_truth(
    similarity: Float[np.ndarray, "b k"],
    labels: Int[np.ndarray, "b k"],
    truth: Int[np.ndarray, " b"],
    temperature: float,
) -> Int[np.ndarray, " b"]:
    """Number of classes predicted before the true one.

    Only classes that got votes are held: a row has at most k of them, however many there are.
    """
    # Relative to the nearest neighbour, so that a small temperature cannot overflow.
    weights = np.exp((similarity - similarity[:, :1]).astype(np.float64) / temperature)
    size = 1 + max(int(labels.max()), int(truth.max()))
    rows = np.arange(len(truth))
    cells, where = np.unique(rows[:, None] * size + labels, return_inverse=True)
    votes = np.bincount(where.ravel(), weights.ravel(), minlength=len(cells))
    row, label = np.divmod(cells, size)

    at = np.minimum(np.searchsorted(cells, rows * size + truth), len(cells) - 1)
    own = np.where(cells[at] == rows * size + truth, votes[at], 0.0)
    lower = label < truth[row]
    ahead = (votes > own[row]) | ((votes == own[row]) & lower)
    rank = np.bincount(row[ahead], minlength=len(truth))
    # Without a vote, the true class comes after all lower ones that have none either.
    unnamed = truth - np.bincount(row[lower], minlength=len(truth))
    return rank + np.where(own == 0, unnamed, 0)
