"""SIGTERM (preemption), Ctrl-C and SIGHUP (a lost terminal): heeded at once, or between steps."""

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from threading import Thread
from types import FrameType
from typing import Any, TypeVar

from esvit_jax.errors import RunError

T = TypeVar("T")


class Interrupted(RunError):
    """A signal ended a run before its first step.

    The compiler may still be at work in a thread, see `in_thread`. A process that has nothing else
    to do ends at once with `os._exit`.
    """


class StopSignals:
    """Within the block, SIGTERM, Ctrl-C and SIGHUP are remembered: `received` is true after one.

    A SIGHUP that is ignored, as under nohup, stays ignored. A second Ctrl-C interrupts whatever is
    being done. Outside of the main thread (a notebook's worker) handlers cannot be set, and signals
    stay as they are.
    """

    def __init__(self) -> None:
        self.received = False
        self._raising = False
        self._old: dict[int, Any] = {}

    @contextmanager
    def raising(self, message: str) -> Iterator[None]:
        """Within this block, a signal raises Interrupted instead; the message says what of it."""
        self._raising = True
        try:
            yield
        except KeyboardInterrupt:
            raise Interrupted(f"stopped by a signal: {message}") from None
        finally:
            self._raising = False

    @contextmanager
    def breaking_off(self, enabled: bool) -> Iterator[None]:
        """If `enabled`, a signal is remembered and ends this block at once, without an error."""
        self._raising = enabled
        try:
            yield
        except KeyboardInterrupt:
            if not enabled:
                raise
            self._raising = False
            self._handle(signal.SIGINT, None)
        finally:
            self._raising = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._raising:
            raise KeyboardInterrupt
        self.received = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __enter__(self) -> "StopSignals":
        try:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue
                self._old[number] = signal.signal(number, self._handle)
        except ValueError:  # not the main thread
            pass
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


def in_thread(function: Callable[[], T]) -> T:
    """Runs a function that stays away from Python for long, so that signals are heeded meanwhile.

    Python runs the handlers of signals in its main thread alone, and there only between two steps
    of its own: while the compiler has that thread, for minutes, Ctrl-C does nothing. Here the main
    thread only waits. If a handler raises, the function runs on in its thread: nothing can stop it,
    and an ordinary end of the process waits for it (left alone, the compiler would abort it).
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:
            outcome.set_exception(error)

    Thread(target=run).start()
    return outcome.result()
