"""Parts of a training split: one that is held out to choose by, one to look at beside a test."""

import dataclasses

import numpy as np

from esvit_jax.data.sources import IndexedSource, Record, Source
from esvit_jax.errors import UserError

# One record in so many is held out, but of large splits no more than this number.
EVERY, LARGEST = 10, 10_000


@dataclasses.dataclass(frozen=True)
class _Chosen:
    """Some of the records of a source, in its order."""

    source: IndexedSource
    indices: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Record:
        return self.source[self.indices[index]]

    def facts(self) -> object:
        return [self.source.fingerprint(), self.indices]


def hold_out(source: Source) -> tuple[IndexedSource, IndexedSource]:
    """Splits a source in two: what is left to train on, and what is held out.

    A tenth is held out, or 10,000 records where that is less, at least one. Which ones depends on
    their number alone: those whose index has the smallest hash. So it is the same in every run,
    and does not follow the order of classes.

    Args:
      source: a training split.

    Raises:
      UserError: it has fewer than two records, or they cannot be read by index (TFRecord files).
    """
    records = _by_index(source)
    count = len(records)
    if count < 2:
        raise UserError(
            f"{source.name} {source.split} has {count} record; one to train on and one to choose "
            "by are two"
        )
    held = max(1, min(count // EVERY, LARGEST))
    chosen = np.sort(np.argsort(_hashes(count), kind="stable")[:held])
    rest = np.setdiff1d(np.arange(count), chosen)
    left = _part(records, rest, "all but the held-out part")
    return left, _part(records, chosen, "held-out part")


def sample(source: Source, count: int) -> IndexedSource:
    """So many records of a source, or all if it has fewer; the same in every run.

    Raises:
      UserError: they cannot be read by index.
    """
    records = _by_index(source)
    chosen = np.sort(np.argsort(_hashes(len(records)), kind="stable")[-count:])
    return _part(records, chosen, "a sample")


def _by_index(source: Source) -> IndexedSource:
    if not isinstance(source, IndexedSource):
        raise UserError(
            f"{source.name} {source.split} is stored as TFRecord files, of which no part can be "
            "chosen; prepare it again with `tfds build --file_format=array_record`"
        )
    return source


def _part(source: IndexedSource, indices: np.ndarray, what: str) -> IndexedSource:
    records = _Chosen(source, tuple(indices.tolist()))
    return IndexedSource(source.name, f"{source.split} ({what})", source.class_names, records)


def _hashes(count: int) -> np.ndarray:
    """uint64[count]: the mixing function of SplitMix64 on 1 … count."""
    x = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
