"""Features of splits, computed once and kept in batches on disk, local or in a bucket.

What is kept is found again by all that it depends on: network, data, how images are prepared. Where
any of it changes, it is computed anew, and what was of the same split before goes.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Bool, Int, PyTree
from rich.console import Console

from esvit_jax import buckets, parallel, processes
from esvit_jax.checkpoint import LoadedModel
from esvit_jax.config import flatten
from esvit_jax.data.sources import Source
from esvit_jax.errors import renamed
from esvit_jax.evaluate.blocks import ArrayBlocks, Block
from esvit_jax.evaluate.features import (
    FeatureExtractor,
    check_finite,
    check_labels,
    evaluation_images,
    labelled_features,
    params_sha1,
)
from esvit_jax.evaluate.parts import Parts
from esvit_jax.models.backbone import BackboneOutput
from esvit_jax.runlog.alive import signs_of_life

# Of the linear probe: the means of so many blocks side by side.
LAST_BLOCKS = 4


def _block_means(out: BackboneOutput) -> Array:
    return jnp.concatenate(out.block_means[-LAST_BLOCKS:], axis=-1)


COLUMNS: dict[str, Callable[[BackboneOutput], Array]] = {
    "view_features": lambda out: out.view_features,
    "region_features": lambda out: out.region_features,
    "block_means": _block_means,
}


class NetworkFeatures:
    """What a network makes of the images of some splits; compiled once.

    Args:
      loaded: the network.
      sources: that will be asked for.
      columns: of `COLUMNS`, what is wanted.
      key: "teacher" or "student"; None as in `LoadedModel.network`.
      batch_size: over the devices of a process; None is the config's, or less.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        sources: Sequence[Source],
        columns: Sequence[str],
        *,
        key: str | None = None,
        batch_size: int | None = None,
    ):
        config, backbone = loaded.config.copy_and_resolve_references(), loaded.model.backbone
        config.evaluate.batch_size = batch_size or config.evaluate.batch_size
        self._loaded, self._config, self._columns = loaded, config, tuple(columns)
        self._key = loaded.chosen(key)

        def extract(params: PyTree, batch: dict[str, Array]) -> dict[str, Array]:
            out = backbone.forward(params, evaluation_images(config, batch))
            return {name: COLUMNS[name](out) for name in columns}

        self._extractor = FeatureExtractor(extract, config, sources, own_devices=True)
        self.describe = self._extractor.describe
        # "pmap" is where each process has its own replicas, which any mode takes.
        self._params = parallel.replicate(loaded.network(key)["backbone"], "pmap")
        self._digest = params_sha1(self._params)

    def num_batches(self, source: Source) -> int:
        """Of a split."""
        return -(-len(source) // self._extractor.batch_size)

    def batches(self, source: Source, first: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """The columns, "label" int32[b] (-1 for none) and "id" of the batches from `first` on."""
        for batch in self._extractor.batches(self._params, source, first):
            yield batch["features"] | {"label": batch["label"], "id": np.array(batch["id"], str)}

    def about(self, source: Source) -> dict[str, Any]:
        """What features depend on: parts of an earlier start must agree in all of it."""
        config = self._config
        return {
            "network": self._key,
            "params_sha1": self._digest,
            "step": self._loaded.step,
            "backbone": {name: x for name, x in flatten(config.backbone).items() if x is not None},
            "data": source.name,
            "split": source.split,
            "records": len(source),
            "data_sha1": source.fingerprint(),
            "batch_size": self._extractor.batch_size,
            "image_size": config.evaluate.size or config.views.global_size,
            "crop": config.evaluate.crop,
            "mean_std": [*config.views.mean, *config.views.std],
            "canvas_size": config.data.canvas_size,
            "dtype": config.dtype,
            "columns": [*self._columns],
        }

    def fill(self, parts: Parts, source: Source, report: Callable[[str], None]) -> None:
        """Computes the batches that are missing; several processes share them.

        Args:
          parts: where they are kept.
          source: whose they are.
          report: is told what was there.

        Raises:
          UserError: see `Parts.begin`.
        """
        first = jax.process_index() == 0
        processes.check_same(self.about(source) | {"out": os.fspath(parts.folder)})
        missing = processes.from_first(parts.begin(report) if first else None)
        mine = np.array_split(missing, jax.process_count())[jax.process_index()].tolist()
        for start, stop in _runs(mine):
            for i, batch in zip(range(start, stop), self.batches(source, start), strict=False):
                parts.write(i, batch)
        processes.meet()


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Rising numbers as [first, stop) of each run of them.

    >>> _runs([0, 3, 4, 6])
    [(0, 1), (3, 5), (6, 7)]
    """
    there = set(numbers)
    firsts = [i for i in numbers if i - 1 not in there]
    stops = [i + 1 for i in numbers if i + 1 not in there]
    return list(zip(firsts, stops, strict=True))


@dataclass(frozen=True)
class KeptFeatures:
    """One column of a split on disk, as `blocks.Blocks`: every `iter` reads it once more.

    Attributes:
      parts: where it is.
      column: its name.
      labels: int32[n], of the images that could be read; -1 for none.
      ids: their names.
    """

    parts: Parts
    column: str
    labels: Int[np.ndarray, " n"]
    ids: np.ndarray

    def __iter__(self) -> Iterator[Block]:
        for part in self.parts:
            if len(part["label"]):
                yield part[self.column], part["label"]

    def __len__(self) -> int:
        return len(self.labels)

    def finite(self) -> Bool[np.ndarray, " n"]:
        """Whether all features of an image are finite."""
        found = [np.isfinite(x).reshape(len(x), -1).all(axis=1) for x, _ in self]
        return np.concatenate([np.zeros(0, bool), *found])

    def array(self) -> np.ndarray:
        """All of it in memory, [n, ...]."""
        return np.concatenate([features for features, _ in self])


def kept_features(
    loaded: LoadedModel,
    sources: Sequence[Source],
    folder: str | os.PathLike[str],
    *,
    column: str = "view_features",
    key: str | None = None,
    console: Console | None = None,
) -> list[KeptFeatures]:
    """Features of splits, from a folder or, what is missing there, computed.

    Args:
      loaded: the network.
      sources: the splits.
      folder: made if it is not there; local or gs://. Each split has a folder of its own in it.
      column: of `COLUMNS`.
      key: "teacher" or "student"; None as in `LoadedModel.network`.
      console: for signs of life; None is standard output.

    Raises:
      UserError: nothing can be written there.
      RunError: what was there went meanwhile.
    """
    console = console or Console()
    work = NetworkFeatures(loaded, sources, [column], key=key)
    found = []
    with (
        signs_of_life(work.describe, console), buckets.reaching(folder), renamed(out="features")
    ):  # fmt: skip
        for source in sources:
            parts = _parts_of(epath.Path(folder), work.about(source), work.num_batches(source))
            work.fill(parts, source, report=lambda line: None)
            labels, ids = zip(*((part["label"], part["id"]) for part in parts), strict=True)
            found.append(KeptFeatures(parts, column, np.concatenate(labels), np.concatenate(ids)))
    return found


def can_keep(folder: str | os.PathLike[str]) -> bool:
    """Whether features can be kept in a folder, which need not be there yet.

    A converted checkpoint may lie where nobody may write. Of a bucket only trying tells.
    """
    if buckets.is_remote(folder):
        return True
    there = folder if os.path.isdir(folder) else os.path.dirname(os.path.abspath(folder))
    return os.access(there, os.W_OK)


def labelled_blocks(
    loaded: LoadedModel,
    sources: Sequence[Source],
    what: str,
    *,
    key: str | None = None,
    keep: str | os.PathLike[str] | None = None,
    console: Console | None = None,
) -> list[KeptFeatures | ArrayBlocks]:
    """View features and labels of splits.

    Args:
      loaded: the network.
      sources: of the splits; images that cannot be read are left out.
      what: needs the labels, such as "k-NN".
      key: "teacher" or "student"; None as in `LoadedModel.network`.
      keep: the folder of `kept_features`; None, or one where nothing can be written, keeps
        nothing, and has all in memory.
      console: for signs of life; None is standard output.

    Raises:
      UserError, RunError: see `kept_features`, `check_labels` and `check_finite`.
    """
    if keep is None or not can_keep(keep):
        arrays = labelled_features(loaded, sources, what, key=key, console=console)
        return [ArrayBlocks(*split) for split in arrays]
    found = kept_features(loaded, sources, keep, key=key, console=console)
    for source, split in zip(sources, found, strict=True):
        check_labels(source, split.labels, what)
        check_finite(source, split.finite())
    return list(found)


def _parts_of(folder: epath.Path, about: dict[str, Any], count: int) -> Parts:
    """Where the features of one split are, by all that they depend on.

    Those of the same split and column that depend on something else are of no more use.
    """
    place = [about[name] for name in ("data", "split", "columns", "network")]
    split, whole = (_digest(x) for x in (place, about))
    own = folder / split
    parts = Parts(own / whole, about, count)
    if jax.process_index() == 0:
        with parts.writing():
            own.mkdir(parents=True, exist_ok=True)
            # A folder of a bucket is there when something is in it.
            for other in own.iterdir() if own.exists() else ():
                if other.name != parts.folder.name:
                    other.rmtree()
    return parts


def _digest(value: object) -> str:
    return hashlib.sha1(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
