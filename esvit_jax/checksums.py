"""Checksums of a checkpoint: what a disk or a copy has changed is found before it is restored.

Orbax and TensorStore check the tree of their files, not the arrays in them: a flipped bit there
would be restored as another number. So a file in each checkpoint lists size and CRC-32 of all
files of its items. It is written before Orbax commits the checkpoint, and so is there whenever the
checkpoint is. It finds accidents, not forgery.
"""

import json
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from etils import epath

from esvit_jax import buckets

FILE = "checksums.json"
THREADS = 8  # on a bucket, it is the number of requests that takes long
CHUNK = 1 << 22  # bytes


def write(checkpoint: epath.Path) -> None:
    """Writes `FILE` into the folder of a checkpoint whose items are complete."""
    # Files beside the items are Orbax's own, and it writes to them until the end.
    files = [file for item in checkpoint.iterdir() if item.is_dir() for file in _files_below(item)]
    with ThreadPoolExecutor(THREADS) as pool:
        checksums = list(pool.map(_size_and_checksum, files))
    names = [file.relative_to(checkpoint).as_posix() for file in files]
    (checkpoint / FILE).write_text(json.dumps(dict(zip(names, checksums, strict=True)), indent=0))


def damage(checkpoint: epath.Path, items: Iterable[str]) -> str | None:
    """What is wrong with some items of a checkpoint, in a few words; None where nothing is.

    Of a checkpoint without `FILE`, which an earlier version wrote, nothing is known but whether
    the items are there.

    Args:
      checkpoint: its folder.
      items: names of the items that are to be read.
    """
    try:
        if not any(checkpoint.iterdir()):
            return "it is empty"
        for item in items:
            if not (checkpoint / item).is_dir():
                return f"{item} is missing"
        if not are_there(checkpoint):
            return None
        with ThreadPoolExecutor(THREADS) as pool:
            recorded = _recorded(checkpoint, items)
            found = pool.map(lambda entry: _difference(checkpoint, *entry), recorded)
            return next(filter(None, found), None)
    except ValueError:  # no JSON, or not UTF-8
        return f"{FILE} cannot be read"
    except OSError as error:
        if buckets.is_unreachable(error):  # which says nothing of the files
            raise
        return f"it cannot be read: {error.strerror or error}"


def are_there(checkpoint: epath.Path) -> bool:
    """Whether `write` was there."""
    return (checkpoint / FILE).exists()


def _recorded(checkpoint: epath.Path, items: Iterable[str]) -> list[tuple[str, list[int]]]:
    """Names, and sizes and checksums, of the files of some items.

    Raises:
      ValueError: the file is not what `write` writes.
    """
    content = json.loads((checkpoint / FILE).read_text())
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")
    wanted = [(name, values) for name, values in content.items() if name.split("/")[0] in items]
    if not all(isinstance(values, list) and len(values) == 2 for _, values in wanted):
        raise ValueError("it has no size and checksum of a file")
    if {name.split("/")[0] for name, _ in wanted} != set(items):
        raise ValueError("it lacks an item")
    return wanted


def _files_below(folder: epath.Path) -> Iterator[epath.Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from _files_below(path)
        else:
            yield path


def _size_and_checksum(file: epath.Path) -> list[int]:
    size = checksum = 0
    with file.open("rb") as content:
        while chunk := content.read(CHUNK):
            size += len(chunk)
            checksum = zlib.crc32(chunk, checksum)
    return [size, checksum]


def _difference(checkpoint: epath.Path, name: str, recorded: list[int]) -> str | None:
    """How a file differs from what was recorded of it."""
    if not (checkpoint / name).exists():
        return f"{name} is missing"
    found = _size_and_checksum(checkpoint / name)
    if found == recorded:
        return None
    if found[0] != recorded[0]:
        return f"{name} has {found[0]:,} bytes, not {recorded[0]:,}"
    return f"{name} has changed: its checksum is another"
