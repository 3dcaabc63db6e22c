"""What the processes of a run tell each other beside arrays: what they run, and that one failed.

They do so by the key-value store of JAX's distributed runtime, which process 0 keeps and which
needs no device. In a run of one process nothing here does anything.
"""

import dataclasses
import itertools
import json
import multiprocessing
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
from etils import epath

from esvit_jax import __version__
from esvit_jax.config import ConfigDict, RunNumbers, flatten
from esvit_jax.errors import RunError, UserError, exit_status

# Seconds that processes wait for each other where all must come, that pass until the others hear
# of a failure, and that one which ends waits until all have heard of it.
MEET_SECONDS, LISTEN_SECONDS, LINGER_SECONDS = 600, 0.5, 10.0
FAILED, HEARD = "esvit/failed", "esvit/heard"
_meetings = itertools.count()  # a key and a barrier are for one use
# How XLA's collectives and JAX's runtime say that the other end is gone.
GONE = re.compile("gloo|nccl|connection|peer|unavailable|heartbeat|coordination", re.IGNORECASE)


def facts(workdir: epath.Path, config: ConfigDict, numbers: RunNumbers) -> dict[str, Any]:
    """What all processes of a run must hold alike, by names that a user knows.

    Where data lie, and who decodes them, is each host's own affair.
    """
    own = {"data.data_dir", "data.num_threads", "data.num_workers"}
    fields = {f"config.{name}": x for name, x in flatten(config).items() if name not in own}
    saved = [path.name for path in (workdir / "checkpoints").glob("[0-9]*")]
    others = {
        "version of esvit_jax": __version__,
        "version of jax": jax.__version__,
        "number of devices": jax.local_device_count(),
        "workdir": str(workdir),
        "newest checkpoint": max(map(int, filter(str.isdigit, saved)), default=None),
    }
    return fields | dataclasses.asdict(numbers) | others


def check_same(facts: Mapping[str, object]) -> None:
    """Waits for all processes, and refuses to go on if they do not hold the same.

    Args:
      facts: names, and what must be equal on all: anything that JSON holds.

    Raises:
      UserError: names the first that differs from process 0's, and both values; or the processes
        are not connected, see `cluster.connect`.
    """
    client = _client()
    if client is None and jax.process_count() > 1:  # libtpu has found the other hosts
        raise UserError("this is one of several processes; start all of them with --distributed")
    if client is None:
        return
    mine, key = json.loads(json.dumps(facts)), f"esvit/facts/{next(_meetings)}"
    if jax.process_index() == 0:
        client.key_value_set(key, json.dumps(mine))
    else:
        first = json.loads(client.blocking_key_value_get(key, MEET_SECONDS * 1000))
        for name, value in mine.items():
            if value != first.get(name):
                raise UserError(
                    f"{name} is {value!r} in process {jax.process_index()} and "
                    f"{first.get(name)!r} in process 0; start all alike"
                )
    client.wait_at_barrier(key, MEET_SECONDS * 1000)


def from_first(value: Any) -> Any:
    """What process 0 has, a value that JSON holds, in all processes; waits as long as it takes."""
    client = _client()
    if client is None:
        return value
    key = f"esvit/told/{next(_meetings)}"
    if jax.process_index() == 0:
        client.key_value_set(f"{key}/0", json.dumps(value))
    ((_, told),) = _wait_for(client, key, 1)
    return json.loads(told)


def meet() -> None:
    """Waits until all processes have come here, as long as it takes."""
    client = _client()
    if client is not None:
        key = f"esvit/met/{next(_meetings)}"
        client.key_value_set(f"{key}/{jax.process_index()}", "")
        _wait_for(client, key, jax.process_count())


def _wait_for(client: Any, folder: str, count: int) -> list[tuple[str, str]]:
    """The keys and values of a folder of the store, when there are so many.

    The store's own ways of waiting end after a time, and let no signal through.
    """
    while len(found := client.key_value_dir_get(folder)) < count:
        time.sleep(LISTEN_SECONDS)
    return found


class Failure(NamedTuple):
    """Why a process ended.

    Attributes:
      process: which one.
      status: its exit status, which becomes that of all.
      line: what it said.
    """

    process: int
    status: int
    line: str


@contextmanager
def failing_together(complain: Callable[[str], None]) -> Iterator[None]:
    """Within the block, an error of one process ends all, with its line and its exit status.

    Of one process, errors are raised as ever. Of several, no error leaves the block: whoever has
    one ends there, by `os._exit`, since an ordinary end would wait for the others' collectives.

    Args:
      complain: says a line.
    """
    client = _client()
    if client is None:
        yield
        return
    together = _Together(client, complain)
    threading.Thread(target=together.listen, daemon=True).start()
    try:
        yield
        client.wait_at_barrier("esvit/done", MEET_SECONDS * 1000)
    except BaseException as error:
        together.fail(error)
    together.over.set()


class _Together:
    """One process's part in ending all."""

    def __init__(self, client: Any, complain: Callable[[str], None]):
        self._client, self._complain = client, complain
        self._ending = threading.Lock()  # of two threads that see a failure, one ends the process
        self.over = threading.Event()

    def listen(self) -> None:
        """Ends this process when another one has failed."""
        while not self.over.wait(LISTEN_SECONDS):
            if failures := self._failures():
                self._end(failures[0])

    def fail(self, error: BaseException) -> None:
        """Ends this process for an error, and with it all others."""
        if _lost_another(error):
            time.sleep(4 * LISTEN_SECONDS)  # that one may have said why
            if failures := self._failures():
                self._end(failures[0])
            cause = str(error).strip().splitlines()[0]
            error = RunError(f"another process is gone, see what it said: {cause[:200]}")
        status = exit_status(error)
        if status == 1:
            traceback.print_exception(error)
        line = str(error) if isinstance(error, UserError | RunError) else repr(error)
        failure = Failure(jax.process_index(), status, line)
        self._client.key_value_set(f"{FAILED}/{failure.process}", json.dumps(failure))
        self._end(failure)

    def _failures(self) -> list[Failure]:
        found = self._client.key_value_dir_get(FAILED)
        return [Failure(*json.loads(value)) for _, value in found]

    def _end(self, failure: Failure) -> None:
        self._ending.acquire()
        index, count = jax.process_index(), jax.process_count()
        theirs = "" if failure.process == index else f"process {failure.process}: "
        self._complain(theirs + failure.line)
        sys.stdout.flush()
        sys.stderr.flush()
        # Whose connections break before he has heard of the failure says other things, at length.
        self._client.key_value_set(f"{HEARD}/{index}", "")
        deadline = time.monotonic() + LINGER_SECONDS
        while len(self._client.key_value_dir_get(HEARD)) < count and time.monotonic() < deadline:
            time.sleep(0.1)
        if index == 0:  # it keeps the store
            time.sleep(2 * LISTEN_SECONDS)
        for worker in multiprocessing.active_children():
            worker.terminate()
        os._exit(failure.status)


def _lost_another(error: BaseException) -> bool:
    """Whether an error of XLA's tells that another process has gone."""
    return isinstance(error, jax.errors.JaxRuntimeError) and bool(GONE.search(str(error)))


def _client() -> Any:
    """Of JAX's distributed runtime; None in a run of one process."""
    from jax._src import distributed  # public are only its beginning and its end

    return distributed.global_state.client
