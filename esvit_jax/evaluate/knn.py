"""Weighted k-nearest-neighbour classification of features, exact and in bounded memory.

The devices find the neighbours, block by block; the host counts the votes in float64, so that
neither the order of a parallel sum nor its rounding decides which class wins.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from rich.table import Table

from esvit_jax.data.sources import Source, TFRecordSource
from esvit_jax.errors import RunError, UserError
from esvit_jax.evaluate.result import Result


def knn_accuracy(
    train_features: Float[np.ndarray, "n d"],
    train_labels: Int[np.ndarray, " n"],
    test_features: Float[np.ndarray, "m d"],
    test_labels: Int[np.ndarray, " m"],
    *,
    ks: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
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

    Memory on the device: test features, `max(ks)` neighbours of each test image, one block of
    train features and one [test_block, train_block] block of similarities. Nothing grows with
    n × m, and the train features cross to the device once.

    Args:
      train_features: f32[n, d] on the host, not normalised.
      train_labels: int[n], classes from 0.
      test_features: f32[m, d], likewise.
      test_labels: int[m]; a class that no train image has is legal.
      ks: numbers of neighbours, each at least 1.
      temperature: of the votes.
      num_classes: classes there are; None takes the largest label plus 1.
      train_block: train images compared at a time.
      test_block: test images compared at a time.

    Returns:
      `{"top1/10": percent, "top5/10": percent, ...}`, two entries for each k in the order of `ks`.

    Raises:
      UserError: no images, another number of labels than of images, images without a label (-1),
        labels ≥ `num_classes`, features of two lengths or not finite (they would count as hits), a
        k that is no whole number from 1, or a temperature that is not positive.
    """
    _check_arguments(ks, temperature, num_classes, train_features, test_features)
    largest = max(train_labels.max(initial=-1), test_labels.max(initial=-1))
    num_classes = int(largest) + 1 if num_classes is None else num_classes
    _check_images("train", train_features, train_labels, num_classes)
    _check_images("test", test_features, test_labels, num_classes)

    ks = tuple(dict.fromkeys(min(int(k), len(train_labels)) for k in ks))
    hits = {f"top{top}/{k}": 0 for k in ks for top in (1, 5)}
    neighbours = _nearest(
        train_features, train_labels, test_features, max(ks), train_block, test_block
    )
    start = 0
    for similarity, labels in neighbours:
        truth = test_labels[start : start + len(labels)]
        start += len(labels)
        for k in ks:
            rank = _rank_of_truth(similarity[:, :k], labels[:, :k], truth, temperature, num_classes)
            hits[f"top1/{k}"] += int(np.sum(rank < 1))
            hits[f"top5/{k}"] += int(np.sum(rank < 5))
    return {name: 100.0 * count / len(test_labels) for name, count in hits.items()}


def knn_table(values: Mapping[str, float]) -> Table:
    """What `knn_accuracy` returned, as a table: a row for each k, top-1 and top-5 in percent."""
    table = Table("k", "top-1 %", "top-5 %", title="k-NN")
    for column in table.columns:
        column.justify = "right"
    result = Result("knn", values)
    top5 = result.quantity("top5")
    for k, top1 in result.quantity("top1").items():
        table.add_row(k, f"{top1:.2f}", f"{top5[k]:.2f}")
    return table


def check_split(
    source: Source | TFRecordSource,
    features: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"],
) -> None:
    """Refuses what `knn_accuracy` would refuse of a split, by the names of data set and split.

    Raises:
      UserError: no image could be read, or some have no label.
      RunError: features are not finite.
    """
    where = f"{source.name} {source.split}"
    if len(labels) == 0:
        raise UserError(f"{where}: none of {len(source)} images can be read; k-NN needs some")
    if unlabelled := int(np.sum(labels < 0)):
        raise UserError(
            f"{where}: {unlabelled} of {len(labels)} images have no label; k-NN needs all of them"
        )
    if bad := int(np.sum(~np.isfinite(features).all(axis=1))):
        raise RunError(
            f"{where}: the features of {bad} of {len(features)} images are not finite; the network "
            "diverged, evaluate an earlier checkpoint"
        )


def _check_arguments(
    ks: Sequence[int | float],
    temperature: float,
    num_classes: int | None,
    train_features: np.ndarray,
    test_features: np.ndarray,
) -> None:
    if not ks or not all(isinstance(k, int | np.integer) and k >= 1 for k in ks):
        raise UserError("it must be whole numbers from 1 up", argument="ks", value=tuple(ks))
    if not 0 < temperature < float("inf"):
        raise UserError("it must be more than 0", argument="temperature", value=temperature)
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
    tests = [jnp.asarray(block) for block in _blocks(test_features, test_block, fill=0)]
    nearest = [(jnp.full((test_block, k), -jnp.inf), jnp.full((test_block, k), -1)) for _ in tests]

    train_block = min(train_block, len(train_features))
    trains = _blocks(train_features, train_block, fill=0)
    labels = _blocks(train_labels.astype(np.int32), train_block, fill=-1)
    # Train blocks are the outer loop: they are what may not fit on the device all at once.
    for train, label in zip(trains, labels, strict=True):
        train, label = jnp.asarray(train), jnp.asarray(label)
        nearest = [
            _merge(*found, test, train, label) for found, test in zip(nearest, tests, strict=True)
        ]

    remaining = len(test_features)
    for similarity, label in nearest:
        yield np.asarray(similarity)[:remaining], np.asarray(label)[:remaining]
        remaining -= test_block


def _blocks(array: np.ndarray, size: int, fill: int) -> Iterator[np.ndarray]:
    """Cuts the rows into blocks of one size, so that there is one compilation; `fill` pads."""
    for start in range(0, len(array), size):
        block = array[start : start + size]
        padding = [(0, size - len(block))] + [(0, 0)] * (array.ndim - 1)
        yield np.pad(block, padding, constant_values=fill)


@partial(jax.jit, donate_argnums=(0, 1))
def _merge(
    similarity: Float[Array, "b k"],
    labels: Int[Array, "b k"],
    test: Float[Array, "b d"],
    train: Float[Array, "t d"],
    train_labels: Int[Array, " t"],
) -> tuple[Float[Array, "b k"], Int[Array, "b k"]]:
    """The k nearest among those found so far and one more train block (label -1 is padding)."""
    # HIGHEST, because accelerators otherwise multiply in bfloat16 or TF32 and reorder neighbours.
    new = jnp.einsum(
        "b d, t d -> b t", _normalize(test), _normalize(train), precision=jax.lax.Precision.HIGHEST
    )
    new = jnp.where(train_labels >= 0, new, -jnp.inf)
    # top_k prefers the lower index among equals: what was found earlier comes first.
    both = jnp.concatenate([similarity, new], axis=1)
    both_labels = jnp.concatenate([labels, jnp.broadcast_to(train_labels, new.shape)], axis=1)
    similarity, index = jax.lax.top_k(both, similarity.shape[1])
    return similarity, jnp.take_along_axis(both_labels, index, axis=1)


def _normalize(features: Float[Array, "n d"]) -> Float[Array, "n d"]:
    return features / jnp.maximum(jnp.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def _rank_of_truth(
    similarity: Float[np.ndarray, "b k"],
    labels: Int[np.ndarray, "b k"],
    truth: Int[np.ndarray, " b"],
    temperature: float,
    num_classes: int,
) -> Int[np.ndarray, " b"]:
    """Number of classes predicted before the true one."""
    # Relative to the nearest neighbour, so that a small temperature cannot overflow.
    weights = np.exp((similarity - similarity[:, :1]).astype(np.float64) / temperature)
    rows = np.arange(len(truth))
    cells = rows[:, None] * num_classes + labels
    votes = np.bincount(cells.ravel(), weights.ravel(), minlength=len(truth) * num_classes)
    votes = votes.reshape(len(truth), num_classes)
    own = votes[rows, truth][:, None]
    lower = np.arange(num_classes) < truth[:, None]
    ahead = (votes > own) | ((votes == own) & lower)
    return ahead.sum(axis=1)
