"""Folders of images: which files are images, of which split, and with which label."""

import collections
import dataclasses
import functools
import hashlib
import importlib.util
import os
import re
import stat
import time
from collections.abc import Collection, Iterable
from typing import NamedTuple

from absl import logging

from esvit_jax.errors import UserError

# What OpenCV reads, and what pillow-heif reads (extra `heic`).
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif"}
HEIC_SUFFIXES = {".heic", ".heif", ".hif"}
# Names of folders, in small letters, that mean a split and no label.
SPLIT_FOLDERS = {"train", "training", "val", "valid", "validation", "test", "testing"}
SECONDS_BETWEEN_SIGNS = 10.0  # of life, while a large folder is listed


class ImageFile(NamedTuple):
    """An image: its path below the folder that was read, and the name of its label, if any."""

    path: str
    label: str | None


def read_folder(folder: str, split: str) -> dict[str, list[ImageFile]]:
    """Lists the images of a folder by split, and logs in one line how it was understood.

    Images are regular files, or links to some, whose names end in IMAGE_SUFFIXES, and with
    pillow-heif in HEIC_SUFFIXES. Names that begin with a dot are passed over. Anything else, and
    what cannot be opened, is left out, and the line in the log says so. Links to folders are
    followed, unless they lead back to a folder that they lie in.

    1. Splits. The top folders are splits if two or all of them are named as such (SPLIT_FOLDERS);
       or if there are further folders in them, and one is named as a split, or asked for by
       `split`. Otherwise everything is the split "train". A folder that does nothing but wrap the
       others is looked through.
    2. Labels. Each folder of a split is a label, of all images below it at any depth. Where images
       lie beside folders, or where there are no folders, the split has no labels.
    3. Order. Images are sorted by a hash of their path below the split's folder. So a slice is a
       fair sample (sorted photos would be one evening, or one class), and a new file moves no
       other.

    Args:
      folder: a path; `~` is the home folder.
      split: the split, slice or sum of splits that is wanted, as in TFDS.

    Returns:
      The images of every split, also of those not asked for; no split is empty.

    Raises:
      UserError: the folder is not there, cannot be opened or holds no images, or several folders
        below its top have names of splits.
    """
    listing = _list_files(folder)
    left_out = listing.left_out()
    if not listing.images:
        raise _error(folder, "; ".join(["it holds no images", *left_out]))
    splits, notes = _split_up(folder, listing.images, asked=_split_names(split))
    found: dict[str, list[ImageFile]] = {}
    deep: list[str] = []
    for name, (base, paths) in splits.items():
        labelled, loose = _label(base, paths)
        found[name] = sorted(labelled, key=functools.partial(_sort_key, base))
        deep += [path for path, label in labelled if label and path.count("/", len(base)) > 1]
        if loose:
            where = f" in {printable(base)}" if base else ""
            notes.append(
                f"folders{where} are no labels, as images lie beside them ({_first_few(loose)})"
            )
    if deep:
        notes.append(
            f"the labels are the top folders, also of images deeper down ({_first_few(deep)})"
        )
    notes += left_out
    line = "; ".join([f"folder:{printable(folder)}: {_summary(found)}", *notes])
    _log_once(logging.WARNING if notes else logging.INFO, line)
    return found


def printable(name: str) -> str:
    r"""A file name as text: bytes that are not UTF-8, and control characters, become \x….

    >>> print(printable("caf\udce9\n.jpg"))
    caf\xe9\x0a.jpg
    """
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)


def _error(folder: str, message: str) -> UserError:
    return UserError(message, argument="folder", value=folder)


@functools.cache
def _log_once(level: int, line: str) -> None:
    """Logs a line once in this process: the splits of a run are opened one after another."""
    logging.log(level, "%s", line)


# 1. The files.

_FILE, _FOLDER = "file", "folder"
_OTHER_KINDS = {
    stat.S_IFIFO: "pipe",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}


@dataclasses.dataclass
class _Listing:
    """What lies below a folder, as paths below it."""

    images: list[str] = dataclasses.field(default_factory=list)
    heic: list[str] = dataclasses.field(default_factory=list)  # that cannot be read here
    not_files: list[str] = dataclasses.field(default_factory=list)  # though named like images
    unreadable: list[str] = dataclasses.field(default_factory=list)  # folders
    loops: list[str] = dataclasses.field(default_factory=list)
    other_kinds: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def add(self, path: str, kind: str, reads_heic: bool) -> None:
        suffix = os.path.splitext(path)[1].lower()
        if not _named_as_image(path):
            self.other_kinds[suffix or "without a suffix"] += kind == _FILE
        elif kind != _FILE:
            self.not_files.append(f"{path} ({kind})")
        elif suffix in HEIC_SUFFIXES and not reads_heic:
            self.heic.append(path)
        else:
            self.images.append(path)

    def left_out(self) -> list[str]:
        """A clause for each reason why something is not among the images."""
        clauses = []
        if self.heic:
            files = _count(self.heic, "HEIC image")
            clauses.append(f"left out {files}: pip install esvit_jax[heic] to read them")
        for paths, reason in (
            (self.not_files, "no regular file"),
            (self.unreadable, "cannot be opened"),
            (self.loops, "a link to a folder that it lies in"),
        ):
            if paths:
                clauses.append(f"left out {_first_few(sorted(paths))}: {reason}")
        counts = sorted((-count, kind) for kind, count in self.other_kinds.items() if count)
        if counts:
            kinds = [f"{-count} {kind}" for count, kind in counts]
            clauses.append(f"left out files of other kinds: {_first_few(kinds)}")
        return clauses


def _list_files(folder: str) -> _Listing:
    root, listing = os.path.expanduser(folder), _Listing()
    try:
        os.scandir(root).close()
    except FileNotFoundError:
        raise _error(folder, "there is no such folder") from None
    except NotADirectoryError:
        raise _error(folder, "this is a file; give the folder that holds the images") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise _error(folder, f"it cannot be opened: {_reason(error)}") from error

    reads_heic = importlib.util.find_spec("pillow_heif") is not None
    last_sign = time.monotonic()
    # Folders to be listed, with those that they lie in; by device and inode, as links rename them.
    pending: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while pending:
        path, above = pending.pop()
        try:
            status = os.stat(os.path.join(root, path))
            identity = status.st_dev, status.st_ino
            if identity in above:
                listing.loops.append(path)
                continue
            with os.scandir(os.path.join(root, path)) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    inner = f"{path}/{entry.name}" if path else entry.name
                    kind = _kind(entry)
                    if kind == _FOLDER and not _named_as_image(entry.name):
                        pending.append((inner, above | {identity}))
                    else:
                        listing.add(inner, kind, reads_heic)
        except OSError as error:
            listing.unreadable.append(f"{path} ({_reason(error)})")
        if time.monotonic() - last_sign > SECONDS_BETWEEN_SIGNS:
            last_sign = time.monotonic()
            logging.warning("folder:%s: %s so far", folder, _count(listing.images, "image"))
    return listing


def _named_as_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES | HEIC_SUFFIXES


def _kind(entry: os.DirEntry[str]) -> str:
    """What an entry of a folder is, or what it links to."""
    try:
        if entry.is_file():  # mostly known from listing the folder, without another system call
            return _FILE
        if entry.is_dir():
            return _FOLDER
        return _OTHER_KINDS[stat.S_IFMT(entry.stat().st_mode)]
    except OSError:
        return "broken link"


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


# 2. Their splits.


def _split_names(split: str) -> set[str]:
    """Names in a split spec: train[:90%]+extra -> {train, extra}."""
    return {part.partition("[")[0].strip() for part in split.split("+")}


def _split_up(
    folder: str, paths: list[str], asked: set[str]
) -> tuple[dict[str, tuple[str, list[str]]], list[str]]:
    """{split: (its folder with a slash, or "", and its paths)}, and clauses about what is odd."""
    base = ""
    while wrapper := _wrapper(path[len(base) :] for path in paths):
        if wrapper.lower() in SPLIT_FOLDERS or wrapper in asked:
            break
        base += wrapper + "/"
    by_top: dict[str, list[str]] = {}
    for path in paths:
        top, slash, _ = path[len(base) :].partition("/")
        by_top.setdefault(top if slash else "", []).append(path)
    loose = by_top.pop("", [])
    named = {top for top in by_top if top.lower() in SPLIT_FOLDERS}
    # "train" is the default, and what everything is called without splits: it tells nothing.
    own = (asked - {"train"}) & by_top.keys()
    nested = any(path.count("/", len(base)) > 1 for path in paths)
    if by_top and (named == by_top.keys() or len(named) > 1 or (nested and (named or own))):
        note = f"left out {_first_few(loose)}: beside the folders of the splits"
        splits = {top: (f"{base}{top}/", of_top) for top, of_top in sorted(by_top.items())}
        return splits, [note] if loose else []
    _refuse_inner_splits(folder, paths, base)
    return {"train": (base, paths)}, []


def _wrapper(paths: Iterable[str]) -> str:
    """The one folder that holds all the folders of images, and no image; "" if there is none."""
    parts = [path.split("/", 2) for path in paths]
    tops = {top for top, *_ in parts}
    return tops.pop() if len(tops) == 1 and all(len(part) == 3 for part in parts) else ""


def _refuse_inner_splits(folder: str, paths: list[str], base: str) -> None:
    """Images that are kept apart for tests must not end up among the others unnoticed."""
    splits: dict[str, set[str]] = {}
    for parent in {path.rpartition("/")[0] for path in paths}:
        parts = parent[len(base) :].split("/")
        for depth in range(1, len(parts)):
            if parts[depth].lower() in SPLIT_FOLDERS:
                splits.setdefault("/".join(parts[:depth]), set()).add(parts[depth])
    for parent, names in sorted(splits.items()):
        if len(names) > 1:
            names = " and ".join(sorted(names))
            raise _error(
                folder,
                f"{printable(base + parent)} holds splits ({names}), but splits must be on top: "
                f"read folder:{printable(os.path.join(folder, base + parent))}, or move them up",
            )


# 3. Their labels, and their order.


def _label(base: str, paths: list[str]) -> tuple[list[ImageFile], list[str]]:
    """The images of a split with their labels; and those beside folders, if that means none."""
    inner = [path[len(base) :] for path in paths]
    loose = [path for path in inner if "/" not in path]
    if loose:
        files = [ImageFile(path, None) for path in paths]
        return files, loose if len(loose) < len(paths) else []
    labels = [path.partition("/")[0] for path in inner]
    return list(map(ImageFile, paths, labels)), []


def _sort_key(base: str, file: ImageFile) -> bytes:
    """What the images of a split are sorted by."""
    path = file.path[len(base) :]
    return hashlib.sha1(path.encode("utf-8", "surrogateescape")).digest()


# In words.


def _summary(splits: dict[str, list[ImageFile]]) -> str:
    counts = {name: _count(files, "image") for name, files in splits.items()}
    if list(counts) == ["train"]:
        parts = [counts["train"]]
    else:
        parts = [f"splits {', '.join(f'{printable(n)} ({c})' for n, c in counts.items())}"]
    labels = {file.label for files in splits.values() for file in files if file.label is not None}
    parts.append(
        f"{_count(labels, 'label')} ({_first_few(sorted(labels))})" if labels else "no labels"
    )
    return ", ".join(parts)


def _count(things: Collection[object], name: str) -> str:
    return f"{len(things):,} {name}{'' if len(things) == 1 else 's'}"


def _first_few(names: list[str]) -> str:
    """The first of some names: a, b, c and 7 more."""
    shown = ", ".join(printable(name) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3:,} more"
