"""A workdir belongs to one run at a time: who has it, and whether that one is still alive."""

import getpass
import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from datetime import datetime
from typing import Any

from etils import epath

from esvit_jax import buckets
from esvit_jax.errors import RunError, UserError

NAME = "lock.json"
# Seconds that a lock of a dead run is looked at after it was taken over: of two that do so at once
# the later one stays.
SETTLE = 1.0


class Lock:
    """The lock of a workdir, held from here to `close`, and renewed meanwhile in a thread.

    It is the file lock.json, which only one run can create, and which says who that is and when it
    last gave a sign of life. A lock is dead, and is taken over, if its process was on this machine
    and is gone, or if there was no sign of life for as long as its owner has promised them. A run
    that lost its lock (it was frozen, its clock was set, somebody removed the file) saves nothing
    more. So one run at most goes on, whatever happens; clocks of two machines that differ by more
    than `seconds` can at worst end the run that was there first.

    Args:
      workdir: a folder, made if it is not there, or one in a bucket.
      seconds: without a sign of life, after which others may take the lock to be dead.
      enabled: False (processes other than 0) leaves everything to the process that has it.

    Raises:
      UserError: another run has it, or nothing can be written there; as `workdir`.
    """

    def __init__(self, workdir: os.PathLike[str], seconds: float, *, enabled: bool = True):
        self._enabled, self._lost, self._answered = enabled, False, True
        if not enabled:
            return
        workdir = epath.Path(workdir)
        self._path, self._seconds = workdir / NAME, seconds
        self._owner = {
            "owner": uuid.uuid4().hex,
            "user": _user(),
            "host": socket.gethostname(),
            "machine": _machine(),
            "pid": os.getpid(),
            "process_started": _started(os.getpid()),
            "since": datetime.now().astimezone().isoformat(timespec="seconds"),
            "seconds": seconds,
        }
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            self._take(workdir)
        except OSError as error:
            if buckets.is_remote(workdir):
                raise
            raise UserError(
                f"it cannot be written to: {error.strerror}", argument="workdir", value=str(workdir)
            ) from error
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Refuses to go on without the lock.

        Raises:
          RunError: another run has taken the workdir over.
        """
        if not self._enabled:
            return
        if self._lost or not self._is_ours():
            raise RunError(
                f"{self._path.parent} was taken over by another run, or {NAME} was removed, while "
                "this one gave no sign of life; nothing more is saved"
            )

    def close(self) -> None:
        """Gives the workdir back, if it is reached and still this run's."""
        if not self._enabled:
            return
        self._closed.set()
        if not self._answered:  # the bucket is gone: the lock dies of age
            return
        self._thread.join()
        with suppress(Exception):
            if self._is_ours():
                self._path.unlink()

    def _take(self, workdir: epath.Path) -> None:
        if _create(self._path, self._content()):
            return
        other = _read(self._path)
        if other is not None and not _is_dead(other):
            raise UserError(
                f"another run is there: process {other['pid']} of {other['user']} on "
                f"{other['host']}, since {other['since']}; wait for it or take another workdir "
                f"(if it is dead, wait {other['seconds']:g} s, or remove {self._path})",
                argument="workdir",
                value=str(workdir),
            )
        _replace(self._path, self._content())
        time.sleep(SETTLE)
        if not self._is_ours():
            raise UserError(
                "another run has just started there", argument="workdir", value=str(workdir)
            )

    def _renew(self) -> None:
        while not self._closed.wait(self._seconds / 4):
            try:
                if not self._is_ours():
                    self._lost = True
                    return
                _replace(self._path, self._content())
            except Exception:  # the bucket does not answer: it may the next time
                continue

    def _is_ours(self) -> bool:
        self._answered = False
        found = _read(self._path)
        self._answered = True
        return found is not None and found["owner"] == self._owner["owner"]

    def _content(self) -> bytes:
        return json.dumps(self._owner | {"seen": time.time()}, indent=1).encode() + b"\n"


def _create(path: epath.Path, content: bytes) -> bool:
    """Writes a file unless there is one; whether it did."""
    try:
        if buckets.is_remote(path):
            import fsspec

            fsspec.filesystem("gcs").pipe_file(os.fspath(path), content, mode="create")
        else:
            _link(path, content)
    except FileExistsError:
        return False
    return True


def _link(path: epath.Path, content: bytes) -> None:
    """Makes a file that has its content from the start."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # such as a mounted bucket, which knows no links
        with open(path, "xb") as file:
            file.write(content)
    finally:
        temporary.unlink()


def _replace(path: epath.Path, content: bytes) -> None:
    if buckets.is_remote(path):
        path.write_bytes(content)
        return
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _read(path: epath.Path) -> dict[str, Any] | None:
    """What a lock says; None where there is none, or none of ours."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    needed = {"owner", "user", "host", "machine", "pid", "process_started", "since", "seconds"}
    return found if isinstance(found, dict) and needed | {"seen"} <= found.keys() else None


def _is_dead(lock: dict[str, Any]) -> bool:
    if lock["machine"] == _machine():
        return _started(lock["pid"]) != lock["process_started"]
    return time.time() - lock["seen"] > lock["seconds"]


def _machine() -> str:
    """Tells apart who cannot see each other's processes: machines, starts of one, containers."""
    try:
        boot = epath.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {uuid.getnode()}"


def _started(pid: int) -> str | None:
    """When a process of this machine began, in the kernel's ticks; None if there is none."""
    try:
        stat = epath.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return stat.rpartition(")")[2].split()[19]


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())
