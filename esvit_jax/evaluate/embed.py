"""`esvit embed`: features of every image of a data set, in one file.

Batches are written to a folder beside the file as they come, so that memory does not grow with the
data and a broken run goes on where it was; the file is put together from them at the end.
"""

import hashlib
import itertools
import json
import os
import shutil
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from esvit_jax.checkpoint import LoadedModel
from esvit_jax.data.sources import Source, TFRecordSource
from esvit_jax.errors import UserError
from esvit_jax.evaluate.features import FeatureExtractor, evaluation_images


def embed(
    loaded: LoadedModel, source: Source | TFRecordSource, out: str | os.PathLike, *, regions: bool
) -> int:
    """Writes the features of every image that can be decoded.

    The columns (arrays of a .npz file) are `view` f32[n, d], the backbone's view features of the
    images' centres; with `regions` also `regions` f32[n, h, w, d]; `label` int32[n], where there
    are labels; `id`, strings: the file below its folder, or TFDS's shard__index; in the order of
    the source. `about` (in a .parquet file the schema's metadata) is JSON: network, data, classes
    and shapes. A .parquet file has a row group a batch, and its regions are flat.

    Args:
      loaded: the network, and the config of the batch and image size.
      source: the images.
      out: .npz or .parquet file; it appears when it is whole.
      regions: whether to write the region features too.

    Returns:
      The number of images written.

    Raises:
      UserError: the file is there already, is of neither kind, or the parts of another embedding
        lie beside it; no image can be decoded.
    """
    out = Path(out)
    writers = {".npz": _write_npz, ".parquet": _write_parquet}
    if out.suffix not in writers:
        raise UserError(f"--out={out}: it must end in {' or '.join(writers)}")
    if out.exists():
        raise UserError(f"--out={out} exists already; remove it or take another name")
    about = _about(loaded, source, regions)
    parts = _Parts(out.with_name(out.name + ".parts"), about)
    _compute(loaded, source, parts, regions)

    about |= {"class_names": list(source.class_names), "images": parts.count_images()}
    if not about["images"]:
        shutil.rmtree(parts.folder)
        raise UserError(f"{source.name} {source.split}: none of {len(source)} records is an image")
    whole = parts.folder / "whole.tmp"
    writers[out.suffix](whole, parts, about)
    whole.rename(out)
    shutil.rmtree(parts.folder)
    return about["images"]


def _about(loaded: LoadedModel, source: Source | TFRecordSource, regions: bool) -> dict[str, Any]:
    """What features depend on: parts of an earlier start must agree in all of it."""
    config = loaded.config
    params = hashlib.sha1()
    for array in jax.tree.leaves(loaded.params["backbone"]):
        params.update(np.asarray(array).tobytes())
    return {
        "network": loaded.facts.get("key", "teacher"),
        "params_sha1": params.hexdigest(),
        "step": loaded.step,
        "backbone": {name: x for name, x in config.backbone.items() if x is not None},
        "data": source.name,
        "split": source.split,
        "records": len(source),
        "batch_size": config.evaluate.batch_size,
        "image_size": config.evaluate.size or config.views.global_size,
        "crop": config.evaluate.crop,
        "canvas_size": config.data.canvas_size,
        "dtype": config.dtype,
        "regions": regions,
    }


class _Parts:
    """The batches of an embedding that are done, a .npz file each, in a folder."""

    def __init__(self, folder: Path, about: dict[str, Any]):
        self.folder = folder
        self._about = folder / "about.json"
        about = json.loads(json.dumps(about))
        if self._about.exists():
            earlier = json.loads(self._about.read_text())
            changed = [key for key in about if about[key] != earlier.get(key)]
            if changed:
                was = ", ".join(
                    f"{key} {earlier.get(key)!r} (now {about[key]!r})" for key in changed
                )
                raise UserError(
                    f"{folder} holds the parts of another embedding: {was}; remove it to begin anew"
                )
        folder.mkdir(parents=True, exist_ok=True)
        self._write(self._about, lambda file: file.write(json.dumps(about).encode()))
        self._count = next(i for i in itertools.count() if not self._path(i).exists())

    def __len__(self) -> int:
        """Batches done, without a gap."""
        return self._count

    def add(self, arrays: dict[str, Any]) -> None:
        """Writes the next batch."""
        self._write(self._path(self._count), lambda file: np.savez(file, **arrays))
        self._count += 1

    def __iter__(self) -> Iterator[Any]:
        """The batches, whose arrays are read when they are asked for."""
        for i in range(len(self)):
            with np.load(self._path(i)) as part:
                yield part

    def columns(self) -> dict[str, np.ndarray]:
        """The first batch's arrays that are to be written: no labels where there are none."""
        labelled = any((part["label"] >= 0).any() for part in self)
        with np.load(self._path(0)) as part:
            return {name: part[name] for name in part.files if name != "label" or labelled}

    def count_images(self) -> int:
        """Images in all of them."""
        return sum(len(part["label"]) for part in self)

    def _path(self, i: int) -> Path:
        return self.folder / f"{i:08d}.npz"

    def _write(self, path: Path, write: Any) -> None:
        temporary = path.with_suffix(".tmp")
        with open(temporary, "wb") as file:
            write(file)
        temporary.replace(path)


def _compute(
    loaded: LoadedModel, source: Source | TFRecordSource, parts: _Parts, regions: bool
) -> None:
    """Adds the batches that are missing."""
    config = loaded.config
    backbone = loaded.model.backbone

    def extract(params, batch):
        out = backbone.forward(params, evaluation_images(config, batch))
        return (
            {"view": out.view_features, "regions": out.region_features}
            if regions
            else {"view": out.view_features}
        )

    batch_size = config.evaluate.batch_size
    first = done = len(parts)
    total = -(-len(source) // batch_size)
    if first:
        print(f"{first} of {total} batches are there already")
    if first == total:
        return
    started = said = time.monotonic()
    extractor = FeatureExtractor(extract, config)
    for batch in extractor.batches(loaded.params["backbone"], source, first):
        parts.add(batch["features"] | {"label": batch["label"], "id": np.array(batch["id"], str)})
        done += 1
        now = time.monotonic()
        if now - said > 10 and done < total:
            said = now
            rate = (done - first) * batch_size / (now - started)
            print(f"{done * batch_size} of {len(source)} images, {rate:.0f} img/s", flush=True)


def _write_npz(path: Path, parts: _Parts, about: dict[str, Any]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, first in parts.columns().items():
            dtype = first.dtype
            if name == "id":  # strings of an array are of one length, the longest's
                dtype = max((part["id"].dtype for part in parts), key=lambda dtype: dtype.itemsize)
            header = {
                "descr": np.lib.format.dtype_to_descr(dtype),
                "fortran_order": False,
                "shape": (about["images"], *first.shape[1:]),
            }
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, header)
                for part in parts:
                    file.write(part[name].astype(dtype).tobytes())
        with archive.open("about.npy", "w") as file:
            np.lib.format.write_array(file, np.array(json.dumps(about)))


def _write_parquet(path: Path, parts: _Parts, about: dict[str, Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = parts.columns()

    def column(array: np.ndarray) -> pa.Array:
        if array.ndim == 1:
            return pa.array(array)
        return pa.FixedSizeListArray.from_arrays(array.ravel(), int(np.prod(array.shape[1:])))

    def table(part: Any) -> pa.Table:
        return pa.table({name: column(part[name]) for name in columns})

    shapes = {name: array.shape[1:] for name, array in columns.items()}
    metadata = {"about": json.dumps(about | {"shapes": shapes})}
    schema = table(columns).schema.with_metadata(metadata)
    with pq.ParquetWriter(path, schema) as writer:
        for part in parts:
            if len(part["id"]):
                writer.write_table(table(part).cast(schema))
