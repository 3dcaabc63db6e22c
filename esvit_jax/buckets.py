"""Files in a bucket (gs://), through epath and gcsfs: made ready, waited for, and named in errors.

What a program writes there appears whole or not at all, and can be replaced but not appended to.
"""

import functools
import hashlib
import importlib.util
import logging
import os
import re
import shutil
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from etils import epath
from rich.console import Console

from esvit_jax.errors import RunError, UserError
from esvit_jax.runlog.alive import signs_of_life

# Libraries whose exceptions mean that a bucket could not be reached.
CLIENTS = ("aiohttp", "gcsfs", "google", "requests", "tensorflow")
# What TensorStore's messages say then.
UNREACHABLE = "(retry attempts failed|CURL error|UNAVAILABLE|PERMISSION_DENIED|UNAUTHENTICATED)"
# TensorStore waits 1, 2, 4, … s between its tries: a minute in all, where its own rule would take a
# quarter of an hour. gcsfs tries for half a minute.
RETRIES = {"max_retries": 6, "initial_delay": "1s", "max_delay": "32s"}

_waited_for: set[str] = set()  # paths of which somebody further up says so
P = ParamSpec("P")
T = TypeVar("T")


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL, such as gs://bucket/run."""
    return "://" in os.fspath(path)


@functools.cache
def make_ready() -> None:
    """Sets the libraries up for buckets, before anything is read from one.

    Raises:
      UserError: gcsfs is not installed.
    """
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError("files in a bucket need gcsfs: pip install 'esvit_jax[gcs]'")
    # For zonal buckets gcsfs asks for the kind of a bucket before every request.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    # A server that takes a connection and then says nothing is given up like one that is gone.
    os.environ.setdefault("TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS", "10")
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", "30")
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")
    # Traces of what is raised as well.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
    sys.unraisablehook = functools.partial(_without_closed_loops, sys.unraisablehook)

    import aiohttp
    from fsspec.config import conf
    from orbax.checkpoint._src.serialization import tensorstore_utils

    conf["gcs"] = {
        "use_listings_cache": False,  # others write there, too
        "requests_timeout": aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=30),
    } | conf.get("gcs", {})
    # Orbax has no argument for it.
    for context in (
        tensorstore_utils._BASE_TS_CONTEXT,
        tensorstore_utils._DEFAULT_OCDBT_TS_CONTEXT,
    ):
        context["gcs_request_retries"] = RETRIES


def _without_closed_loops(hook: Callable[[Any], Any], unraisable: Any) -> None:
    """Leaves out what TensorStore prints for each write that Orbax no longer waits for."""
    if str(unraisable.exc_value) != "Event loop is closed":
        hook(unraisable)


def ready_path(path: str | os.PathLike[str]) -> epath.Path:
    """A path that can be used at once: absolute, or in a bucket that the libraries are ready for.

    Raises:
      UserError: gcsfs is not installed.
    """
    if is_remote(path):
        make_ready()
        return epath.Path(path)
    return epath.Path(path).absolute()


def usable_folder(text: str) -> epath.Path:
    """A folder in a bucket, after something was written to it and removed again.

    Args:
      text: gs://bucket/folder, which may hold nothing yet.

    Raises:
      UserError: as `workdir`: it is none, or may not be written to.
      RunError: the bucket cannot be reached.
    """

    def refusal(message: str) -> UserError:
        return UserError(message, argument="workdir", value=text)

    scheme, _, place = text.partition("://")
    if scheme != "gs":
        raise refusal("of buckets only gs:// can be written to; mount this one as a folder")
    bucket, _, folder = place.strip("/").partition("/")
    if not bucket or not folder:
        raise refusal("it names no folder in a bucket; give gs://BUCKET/RUN")
    try:
        make_ready()
    except UserError as error:
        raise refusal(error.message) from error
    path = epath.Path(f"gs://{bucket}/{folder}")
    probe = path / f"probe-{uuid.uuid4().hex}"
    try:
        with reaching(path), waiting(path):
            probe.write_bytes(b"?")
            probe.unlink()
    except FileNotFoundError as error:
        raise refusal(f"there is no bucket {bucket}, or you may not see it") from error
    except OSError as error:  # what gcsfs makes of "forbidden", among others
        raise refusal(f"it cannot be written to: {_one_line(error)}") from error
    return path


@contextmanager
def local_copy(file: str | os.PathLike[str]) -> Iterator[Path]:
    """A file that is local already (~ is the home folder), or a copy of one in a bucket.

    Raises:
      UserError: the bucket has no such file; as `path`.
      RunError: the bucket cannot be reached.
    """
    if not is_remote(file):
        yield Path(os.path.expanduser(file))
        return
    make_ready()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / epath.Path(file).name
        try:
            with reaching(file), waiting(file):
                _copy(epath.Path(file), epath.Path(copy))
        except FileNotFoundError as error:
            message = "there is no such file in the bucket"
            raise UserError(message, argument="path", value=os.fspath(file)) from error
        yield copy


@contextmanager
def local_work(file: str | os.PathLike[str]) -> Iterator[Path]:
    """Where a file for a bucket can be made: it is copied there at the end, if nothing fails.

    It is the same local place for each try at the same file, so that what is left there of one is
    found by the next.

    Raises:
      UserError: the file's folder cannot be written to; as `workdir`.
      RunError: the bucket cannot be reached.
    """
    usable_folder(os.path.dirname(os.fspath(file)))
    name = hashlib.sha1(os.fspath(file).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"esvit_jax-{os.getuid()}-{name}"
    folder.mkdir(mode=0o700, exist_ok=True)
    work = folder / epath.Path(file).name
    yield work
    try:
        with reaching(file), waiting(file):
            _copy(epath.Path(work), epath.Path(file))
    except (RunError, OSError) as error:
        raise RunError(f"{work} is whole, but could not be copied: {error}") from error
    shutil.rmtree(folder)


def copy_folder(source: str | os.PathLike[str], target: epath.Path) -> None:
    """Copies all files below a local folder to a folder in a bucket."""
    with waiting(target):
        for file in filter(Path.is_file, Path(source).rglob("*")):
            _copy(epath.Path(file), target / file.relative_to(source).as_posix())


def _copy(source: epath.Path, target: epath.Path) -> None:
    with source.open("rb") as content, target.open("wb") as file:
        shutil.copyfileobj(content, file, 16 * 2**20)


@contextmanager
def reaching(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns what clients of a bucket raise in the block into a line that names the path.

    Raises:
      RunError: the bucket cannot be reached, or does not do what it was asked for.
    """
    try:
        yield
    except Exception as error:
        if not is_remote(path) or not is_unreachable(error):
            raise
        raise RunError(
            f"{os.fspath(path)} cannot be reached: {_one_line(error)}. What was written before is "
            "whole; start it again when the bucket answers"
        ) from error


@contextmanager
def waiting(path: str | os.PathLike[str]) -> Iterator[None]:
    """Says on standard error, while the block runs, that a bucket is waited for."""
    if not is_remote(path) or os.fspath(path) in _waited_for:
        yield
        return
    _waited_for.add(os.fspath(path))
    try:
        with signs_of_life(lambda: f"waiting for {os.fspath(path)}", Console(stderr=True)):
            yield
    finally:
        _waited_for.remove(os.fspath(path))


def reads_bucket(function: Callable[P, T]) -> Callable[P, T]:
    """For functions whose first argument is a path that may be in a bucket: waits with words."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        path: Any = args[0] if args else next(iter(kwargs.values()))
        if not is_remote(path):
            return function(*args, **kwargs)
        make_ready()
        with reaching(path), waiting(path):
            return function(*args, **kwargs)

    return wrapped


def is_unreachable(error: Exception) -> bool:
    """Whether a client of a bucket raised it because it could not reach or use the bucket."""
    if isinstance(error, UserError | RunError):
        return False
    if type(error).__module__.split(".")[0] in CLIENTS:
        return True
    # TensorStore has one kind for all: of a damaged file, too.
    return isinstance(error, ValueError) and bool(
        "gs://" in str(error) and re.search(UNREACHABLE, str(error))
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
