"""The batches of an embedding on disk, and the file that is made of them."""

import io
import json
import os
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from esvit_jax import buckets
from esvit_jax.errors import RunError, UserError, renamed


class Parts:
    """The batches of an embedding that are done, a .npz file each, in a folder beside `out`.

    Args:
      out: the file to make in the end, local or gs://.
      about: what the features depend on.
      count: number of batches in all.
    """

    def __init__(self, out: epath.Path, about: Mapping[str, Any], count: int):
        self._out, self._count = out, count
        self._about: dict[str, Any] = json.loads(json.dumps(about))
        self.folder = out.with_name(out.name + ".parts")

    def begin(self, report: Callable[[str], None]) -> list[int]:
        """Makes the folder; returns the batches that are missing, in order.

        What an earlier start left there is used; what of it cannot be read (a machine that went
        down cuts files off) is done again. Of several processes, one does this before all others
        write.

        Args:
          report: is told what was found.

        Raises:
          UserError: the folder holds the parts of another embedding, or nothing can be written
            there.
        """
        if buckets.is_remote(self._out):
            with renamed(workdir="out"):
                buckets.usable_folder(os.fspath(self._out.parent))
        with self.writing():
            return self._begin(report)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Within the block, what the operating system refuses is a mistake of the user.

        Raises:
          UserError: says why `out` cannot be written.
        """
        try:
            yield
        except OSError as error:
            folder = self._out.parent
            why = error.strerror or error if folder.is_dir() else f"there is no folder {folder}"
            raise UserError(
                f"it cannot be written: {why}", argument="out", value=str(self._out)
            ) from error

    def _begin(self, report: Callable[[str], None]) -> list[int]:
        file = self.folder / "about.json"
        self.folder.mkdir(exist_ok=True)
        begun = any(self.folder.glob("*.npz"))  # asked first, as another process may begin, too
        earlier = _read_object(file)
        if earlier is None and begun:
            report(f"{file} cannot be read, so nobody knows whose parts these are: begun anew")
            self.remove()
            self.folder.mkdir()
        elif earlier is not None:
            self._check_same(earlier)
        if earlier != self._about:
            _write_whole(file, json.dumps(self._about).encode())

        names = {path.name for path in self.folder.glob("*.npz")}
        there = [i for i in range(self._count) if self._path(i).name in names]
        columns = {*self._about.get("columns", ()), "label", "id"}
        cut = [i for i in there if not _is_whole(self._path(i), columns)]
        for i in cut:
            self._path(i).unlink()
        if cut:
            names = ", ".join(self._path(i).name for i in cut)
            report(f"cannot be read and computed again: {names} in {self.folder}")
        if len(there) > len(cut):
            report(f"{len(there) - len(cut)} of {self._count} batches are there already")
        return sorted({*range(self._count)} - {*there} | {*cut})

    def _check_same(self, earlier: dict[str, Any]) -> None:
        about = self._about
        changed = [key for key in about if about[key] != earlier.get(key)]
        if changed:
            was = ", ".join(f"{key} {earlier.get(key)!r} (now {about[key]!r})" for key in changed)
            raise UserError(
                f"{self.folder} holds the parts of another embedding: {was}; remove it to begin "
                "anew"
            )

    def write(self, i: int, columns: Mapping[str, np.ndarray]) -> None:
        """Writes batch i."""
        content = io.BytesIO()
        np.savez(content, allow_pickle=False, **columns)
        if not self.folder.is_dir():
            raise _gone(self.folder)
        with self.writing():
            _write_whole(self._path(i), content.getbuffer())

    def __iter__(self) -> Iterator[Any]:
        """The batches, whose arrays are read when they are asked for."""
        for i in range(self._count):
            with self._read(i) as part:
                yield part

    def columns(self) -> dict[str, np.ndarray]:
        """The first batch's arrays that are to be written: no labels where there are none."""
        labelled = any((part["label"] >= 0).any() for part in self)
        with self._read(0) as part:
            return {name: part[name] for name in part.files if name != "label" or labelled}

    def count_images(self) -> int:
        """Images in all of them."""
        return sum(len(part["label"]) for part in self)

    def make_whole(self, about: dict[str, Any]) -> None:
        """Makes the file of them, and removes them."""
        write = WRITERS[self._out.suffix]
        if buckets.is_remote(self._out):
            with buckets.local_work(self._out) as file:
                write(file, self, about)
        else:
            whole = self.folder / "whole.tmp"
            write(Path(whole), self, about)
            whole.rename(self._out)
        self.remove()

    def remove(self) -> None:
        """Removes the folder."""
        self.folder.rmtree()

    @contextmanager
    def _read(self, i: int) -> Iterator[Any]:
        try:
            file = self._path(i).open("rb")
        except FileNotFoundError as error:
            raise _gone(self._path(i)) from error
        with file, np.load(file) as part:
            yield part

    def _path(self, i: int) -> epath.Path:
        return self.folder / f"{i:08d}.npz"


def _gone(path: epath.Path) -> RunError:
    return RunError(
        f"{path} is gone: removed by hand, or by a command with another checkpoint or other data; "
        "start this one again"
    )


def _read_object(file: epath.Path) -> dict[str, Any] | None:
    """A JSON object, or None where there is none that can be read."""
    try:
        content = json.loads(file.read_bytes())
    except (FileNotFoundError, ValueError):  # not JSON, or not UTF-8
        return None
    return content if isinstance(content, dict) else None


def _is_whole(part: epath.Path, columns: set[str]) -> bool:
    """Whether a .npz file has these arrays, and all of them can be read."""
    try:
        with part.open("rb") as file, zipfile.ZipFile(file) as archive:
            whole = archive.testzip() is None
            return whole and {f"{name}.npy" for name in columns} == set(archive.namelist())
    # The last two are of a damaged table of contents: another compression, or a password.
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError):
        return False


def _write_whole(path: epath.Path, content: bytes | memoryview) -> None:
    # A name of its own, as another process may write the same.
    temporary = path.with_name(f"{path.stem}.{uuid.uuid4().hex}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
    temporary.replace(path)


def _write_npz(path: Path, parts: Parts, about: dict[str, Any]) -> None:
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


def _write_parquet(path: Path, parts: Parts, about: dict[str, Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = parts.columns()

    def column(array: np.ndarray) -> pa.Array:
        if array.ndim == 1:
            return pa.array(array)
        return pa.FixedSizeListArray.from_arrays(array.ravel(), int(np.prod(array.shape[1:])))

    def table(part: Mapping[str, np.ndarray]) -> pa.Table:
        return pa.table({name: column(part[name]) for name in columns})

    shapes = {name: array.shape[1:] for name, array in columns.items()}
    metadata = {"about": json.dumps(about | {"shapes": shapes})}
    schema = table(columns).schema.with_metadata(metadata)
    with pq.ParquetWriter(path, schema) as writer:
        for part in parts:
            if len(part["id"]):
                writer.write_table(table(part).cast(schema))


WRITERS = {".npz": _write_npz, ".parquet": _write_parquet}
