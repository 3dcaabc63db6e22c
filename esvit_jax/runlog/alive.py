"""Signs of life of what takes long: a live line on a terminal, a line now and then elsewhere."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.status import Status
from rich.text import Text

# Seconds until the first line outside a terminal, and between two of them; between two changes of
# the live line on one.
FIRST_LINE, NEXT_LINE, LIVE = 5.0, 10.0, 0.5


def say(console: Console, line: str) -> None:
    """Prints a line as it is: rich takes nothing in it for its own, and breaks it nowhere.

    In a notebook, too, it is a line of text: rich would make an output of its own of each, in HTML.
    """
    if console.is_jupyter and not console.quiet:
        print(line, file=console.file, flush=True)
    else:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def signs_of_life(describe: Callable[[], str], console: Console | None = None) -> Iterator[None]:
    """Shows what `describe` says while the block runs, and for how long it has been running.

    A thread of its own does that, so that it goes on while XLA compiles. Outside of a terminal, a
    block of less than 5 s shows nothing.

    Args:
      describe: what is being done and how far it is, on one line; called from the thread.
      console: where to write; None is standard output. `Console(quiet=True)` silences it.
    """
    console = console or Console()
    started, over = time.monotonic(), threading.Event()

    def line() -> str:
        return f"{describe()} ({time.monotonic() - started:.0f} s)"

    def print_lines() -> None:
        wait = FIRST_LINE
        while not over.wait(wait):
            wait = NEXT_LINE
            say(console, line())

    def refresh(status: Status) -> None:
        with status:
            while not over.wait(LIVE):
                status.update(Text(line()))

    if console.is_interactive:
        status = Status("", console=console, refresh_per_second=2)
        thread = threading.Thread(target=refresh, args=(status,), daemon=True)
    else:
        thread = threading.Thread(target=print_lines, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
