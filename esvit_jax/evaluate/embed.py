"""`esvit_jax.embed`: features of every image of a data set, in memory or in one file.

On the way to a file, batches are written to a folder beside it as they come (`parts.py`), so that
memory does not grow with the data and a broken run goes on where it was; the file is put together
from them at the end. Of several processes, each computes batches of its own on its own devices.
"""

import functools
import os
from typing import Any, NamedTuple, overload

import jax
import numpy as np
from etils import epath
from rich.console import Console

from esvit_jax import buckets, processes
from esvit_jax.checkpoint import LoadedModel
from esvit_jax.data.sources import Source, open_source
from esvit_jax.errors import UserError, renamed
from esvit_jax.evaluate.cache import NetworkFeatures
from esvit_jax.evaluate.parts import WRITERS, Parts
from esvit_jax.interop.exported import load_network
from esvit_jax.runlog.alive import say, signs_of_life


class Embedding(NamedTuple):
    """Features of n images, in the order of the data; a file holds the same under the same names.

    Attributes:
      view_features: f32[n, d], the backbone's view features of the images' centres.
      region_features: f32[n, h, w, d], or None where they were not asked for.
      label: int32[n], or None where no image has a label.
      id: strings [n]: a file below its folder, or TFDS's shard__index.
      about: network, data, classes and sizes; "images" is n, "unreadable" the number of records
        that are no image.
    """

    view_features: np.ndarray
    region_features: np.ndarray | None
    label: np.ndarray | None
    id: np.ndarray
    about: dict[str, Any]


@overload
def embed(
    network: LoadedModel | str | os.PathLike,
    data: Source | str | None = None,
    out: None = None,
    *,
    split: str | None = None,
    data_dir: str | None = None,
    step: int | None = None,
    strict: bool = False,
    regions: bool = False,
    batch_size: int | None = None,
    console: Console | None = None,
) -> Embedding: ...


@overload
def embed(
    network: LoadedModel | str | os.PathLike,
    data: Source | str | None = None,
    *,
    out: str | os.PathLike,
    split: str | None = None,
    data_dir: str | None = None,
    step: int | None = None,
    strict: bool = False,
    regions: bool = False,
    batch_size: int | None = None,
    console: Console | None = None,
) -> dict[str, Any]: ...


@overload
def embed(
    network: LoadedModel | str | os.PathLike,
    data: Source | str | None,
    out: str | os.PathLike,
    *,
    split: str | None = None,
    data_dir: str | None = None,
    step: int | None = None,
    strict: bool = False,
    regions: bool = False,
    batch_size: int | None = None,
    console: Console | None = None,
) -> dict[str, Any]: ...


def embed(
    network: LoadedModel | str | os.PathLike,
    data: Source | str | None = None,
    out: str | os.PathLike | None = None,
    *,
    split: str | None = None,
    data_dir: str | None = None,
    step: int | None = None,
    strict: bool = False,
    regions: bool = False,
    batch_size: int | None = None,
    console: Console | None = None,
) -> Embedding | dict[str, Any]:
    """Computes the features of every image that can be read, in memory or in a file.

        found = esvit_jax.embed("runs/first", "folder:photos")
        found.view_features, found.id  # f32[n, d], n names of files
        esvit_jax.embed("runs/first", "folder:photos", "photos.parquet")

    A file has a column (a .npz file an array) for each field of `Embedding` but those that are
    None. `about` is JSON there (of a .parquet file, metadata of the schema). A .parquet file has a
    row group a batch, and its region features are flat. Several processes, which all call it alike,
    make one file between them: the one that any of them would make alone.

    Args:
      network: a workdir, a converted checkpoint or an export, or what was loaded of it.
      data: as `config.data.name`, or an open source; None is what the run trained on.
      out: .npz or .parquet file to make, local or gs://, or None to get the arrays. It appears when
        it is whole. After an interruption, the same call goes on where the last one was. Several
        processes need a place that all see.
      split: as in TFDS; None is "train", or without `data` the run's training split.
      data_dir: where TFDS data sets lie; None is the run's `config.data.data_dir`.
      step: of the checkpoint; None is the newest.
      strict: refuse a damaged newest checkpoint, in place of taking the one before it.
      regions: whether to compute region features too.
      batch_size: images a batch, over the devices of a process; None is the run's
        `config.evaluate.batch_size`, or less where that does not fit the data or the devices.
      console: a rich console to report to; None is standard output.

    Returns:
      An `Embedding`, or with `out` its `about`.

    Raises:
      UserError: `out` is there already, is of neither kind, cannot be written, or the parts of
        another embedding lie beside it; the devices cannot share `batch_size` images; there is no
        such network or data, or no record of it is an image; of several processes, there is no
        `out`, or they are called differently.
    """
    if out is None and jax.process_count() > 1:
        raise UserError(
            f"{jax.process_count()} processes have a part of the features each; name a file",
            argument="out", value=out,
        )  # fmt: skip
    if out is not None and epath.Path(out).suffix not in WRITERS:
        raise UserError(f"it must end in {' or '.join(WRITERS)}", argument="out", value=str(out))
    if out is not None and _exists(out):
        raise UserError(
            "it exists already; remove it or take another name", argument="out", value=str(out)
        )
    devices = jax.local_device_count()
    if batch_size is not None and (batch_size < 1 or batch_size % devices):
        raise UserError(
            f"{devices} devices cannot share that many",
            argument="batch_size", value=batch_size,
        )  # fmt: skip
    if isinstance(network, LoadedModel):
        loaded = network
    else:
        with renamed(workdir="network"):
            loaded = load_network(network, step, strict=strict)
    source = _open(loaded, data, split, data_dir)
    columns = ("view_features", "region_features") if regions else ("view_features",)
    work = NetworkFeatures(loaded, [source], columns, batch_size=batch_size)
    console = (console or Console()) if jax.process_index() == 0 else Console(quiet=True)
    with signs_of_life(work.describe, console):
        if out is None:
            return _in_memory(work, source)
        with buckets.reaching(out):
            return _in_file(work, source, epath.Path(out), console)


@buckets.reads_bucket
def _exists(out: str | os.PathLike) -> bool:
    return epath.Path(out).exists()


def _open(
    loaded: LoadedModel,
    data: Source | str | None,
    split: str | None,
    data_dir: str | None,
) -> Source:
    if isinstance(data, Source):
        return data
    config = loaded.config.data
    wanted = split or ("train" if data else config.train_split)
    names = {
        "name": "data" if data else "config.data.name",
        "split": "split" if split or data else "config.data.train_split",
        "data_dir": "data_dir" if data_dir else "config.data.data_dir",
    }
    with renamed(**names):
        return open_source(data or config.name, wanted, data_dir or config.data_dir or None)


def _found(source: Source, images: int) -> dict[str, Any]:
    """What is known when all is done.

    Raises:
      UserError: nothing was found.
    """
    if not images:
        raise UserError(f"{source.name} {source.split}: none of {len(source)} records is an image")
    unreadable = len(source) - images
    return {"class_names": list(source.class_names), "images": images, "unreadable": unreadable}


def _in_memory(work: NetworkFeatures, source: Source) -> Embedding:
    batches = list(work.batches(source))
    columns = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    about = work.about(source) | _found(source, len(columns["id"]))
    label = columns["label"] if (columns["label"] >= 0).any() else None
    return Embedding(
        columns["view_features"], columns.get("region_features"), label, columns["id"], about
    )


def _in_file(
    work: NetworkFeatures, source: Source, out: epath.Path, console: Console
) -> dict[str, Any]:
    about = work.about(source)
    parts = Parts(out, about, work.num_batches(source))
    work.fill(parts, source, functools.partial(say, console))
    if jax.process_index() == 0:
        try:
            about |= _found(source, parts.count_images())
        except UserError:
            parts.remove()
            raise
        parts.make_whole(about)
    return processes.from_first(about)
