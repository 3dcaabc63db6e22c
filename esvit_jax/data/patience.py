"""The wait for what is read: said now and then, and with an end."""

import time
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

from absl import logging

from esvit_jax.errors import Stalled

SAY_EVERY = 30.0  # seconds between two lines about a wait
MAX_WAIT = 300.0  # seconds that are waited for an item

_Item = TypeVar("_Item")
_END = object()


def patiently(
    items: Iterator[_Item], *, what: str, max_wait_seconds: float
) -> Generator[_Item, None, None]:
    """The same items; a wait for one is named in the log every half minute, and has an end.

    They are made in a thread of their own, so that it does not matter in what it is stuck.

    Args:
      items: any.
      what: they are, in words.
      max_wait_seconds: for one of them.

    Raises:
      Stalled: from the iterator, after that time. The thread waits on.
    """
    maker = ThreadPoolExecutor(1, thread_name_prefix="patiently")
    try:
        while True:
            item = _result(maker.submit(next, items, _END), what, max_wait_seconds)
            if item is _END:
                return
            yield item  # type: ignore[misc]  # it is none of another type
    finally:
        maker.shutdown(wait=False)


def _result(future: Future[_Item], what: str, max_wait_seconds: float) -> _Item:
    started, waited = time.monotonic(), 0.0
    while not wait([future], min(SAY_EVERY, max_wait_seconds - waited)).done:
        waited = time.monotonic() - started
        if waited >= max_wait_seconds:
            break
        logging.warning(
            "waiting for %s: nothing for %.0f of at most %g s", what, waited, max_wait_seconds
        )
    else:
        return future.result()
    raise Stalled(
        f"nothing came of {what} for {max_wait_seconds:g} s (max_wait_seconds): the disk or bucket "
        "with the data does not answer, or a worker process is frozen; start again to go on from "
        "the newest checkpoint"
    )
