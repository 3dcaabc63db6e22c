"""Features that are read in blocks, again and again, so that all of them need not fit anywhere.

What learns from features takes `Blocks`: every `iter` of it is one pass over a split, in one order.
A list of blocks is one, and so is `ArrayBlocks` of arrays (or of memory-mapped files).
"""

import dataclasses
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int

from esvit_jax.errors import UserError

# Features f32[b, d] and what each image is: a class int[b], or int[b, c] of 1 (is), 0 (is not) and
# -1 (does not count) for several classes an image.
Block = tuple[np.ndarray, np.ndarray]


@runtime_checkable
class Blocks(Protocol):
    """A split in blocks."""

    def __iter__(self) -> Iterator[Block]: ...


@dataclasses.dataclass(frozen=True)
class ArrayBlocks:
    """Arrays as blocks of `size` rows; of memory-mapped ones, only a block is in memory."""

    features: Float[np.ndarray, "n d"]
    targets: Int[np.ndarray, "n ..."]
    size: int = 4096

    def __iter__(self) -> Iterator[Block]:
        for start in range(0, len(self.features), self.size):
            rows = slice(start, start + self.size)
            yield np.asarray(self.features[rows]), np.asarray(self.targets[rows])

    def __len__(self) -> int:
        return len(self.features)


@dataclasses.dataclass(frozen=True)
class SelectedBlocks:
    """The rows of `blocks` that `keep` names, in order."""

    blocks: Blocks
    keep: Bool[np.ndarray, " n"]

    def __iter__(self) -> Iterator[Block]:
        start = 0
        for features, targets in self.blocks:
            rows = self.keep[start : start + len(features)]
            start += len(features)
            if rows.any():
                yield features[rows], targets[rows]


def in_memory(blocks: Blocks, size: int = 4096) -> ArrayBlocks:
    """The same rows, read once."""
    features, targets = zip(*blocks, strict=True)
    return ArrayBlocks(np.concatenate(features), np.concatenate(targets), size)


def targets_of(blocks: Blocks) -> np.ndarray:
    """The targets of all rows."""
    return np.concatenate([targets for _, targets in blocks])


@dataclasses.dataclass(frozen=True)
class Summary:
    """What one pass over a split tells.

    Attributes:
      rows: there are.
      largest: rows of the largest block.
      mean: f64[d], of each feature.
      deviation: f64[d], its standard deviation; 1 where it is constant.
    """

    rows: int
    largest: int
    mean: np.ndarray
    deviation: np.ndarray


def summarize(blocks: Blocks, name: str) -> Summary:
    """Reads a split once, in float64.

    Args:
      blocks: of the split.
      name: of the argument that they were, for errors.

    Raises:
      UserError: it can be read only once, has no rows, or features that are not finite.
    """
    if iter(blocks) is blocks:
        raise UserError(f"{name}: it can be read only once; a list of blocks can be read again")
    rows, largest, bad = 0, 0, 0
    total, squares = np.zeros(1), np.zeros(1)
    for features, _ in blocks:
        rows, largest = rows + len(features), max(largest, len(features))
        bad += int(np.sum(~np.isfinite(features).all(axis=1)))
        wide = features.astype(np.float64)
        total, squares = total + wide.sum(axis=0), squares + (wide**2).sum(axis=0)
    if rows == 0:
        raise UserError(f"{name}: no images; there must be at least one")
    if bad:
        raise UserError(f"{name}: {bad} of {rows} feature vectors are not finite")
    mean = total / rows
    variance = squares / rows - mean**2
    # What rounding leaves of the variance of a constant is none.
    constant = variance <= 1e-12 * (squares / rows) + 1e-30
    return Summary(rows, largest, mean, np.sqrt(np.where(constant, 1.0, variance)))
