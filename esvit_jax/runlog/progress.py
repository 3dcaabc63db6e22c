"""What one sees of a run while it goes: a line that changes in place, or a line now and then."""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from rich import progress
from rich.console import Console

from esvit_jax.runlog.alive import say, signs_of_life

# Seconds between two changes of a line in place: the devices of a laptop are the cores that draw.
REDRAW = 0.5


class LiveLine(Protocol):
    """One line that changes in place."""

    def show(self, step: int, text: str) -> None:
        """Changes the line."""
        ...

    def close(self) -> None:
        """Leaves the line as it is."""
        ...


class TerminalLine:
    """The lowest line of a terminal, with a bar; what is printed meanwhile goes above it."""

    def __init__(self, console: Console, total_steps: int, first_step: int):
        self._progress = progress.Progress(
            progress.TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            progress.BarColumn(bar_width=None),
            progress.TextColumn("{task.description}", markup=False),
            console=console,
            refresh_per_second=1 / REDRAW,
            expand=True,
        )
        self._task = self._progress.add_task("", total=total_steps, completed=first_step)
        self._progress.start()

    def show(self, step: int, text: str) -> None:
        self._progress.update(self._task, completed=step, description=text)

    def close(self) -> None:
        self._progress.stop()


class NotebookLine:
    """A line of a cell's output. rich's own needs ipywidgets, this one only what a notebook has."""

    def __init__(self, total_steps: int):
        from IPython.display import display

        self._total, self._id = total_steps, f"esvit_jax_{id(self)}"
        self._latest, self._shown, self._shown_at = "", "", 0.0
        display({"text/plain": ""}, raw=True, display_id=self._id)

    def show(self, step: int, text: str) -> None:
        self._latest = f"step {step}/{self._total}  {text}"
        if time.monotonic() - self._shown_at >= REDRAW:
            self._redraw()

    def close(self) -> None:
        self._redraw()

    def _redraw(self) -> None:
        from IPython.display import update_display

        if self._shown != self._latest:
            update_display({"text/plain": self._latest}, raw=True, display_id=self._id)
            self._shown, self._shown_at = self._latest, time.monotonic()


class Progress:
    """A live line on a terminal or in a notebook; elsewhere (a pipe, a file) a line a log interval.

    Both say the same: step of steps, loss, images a second, share of the time spent waiting for
    data, and the time that the remaining steps take at the pace of the last interval.

    Args:
      total_steps: steps of the whole run.
      first_step: steps done before this start (a resumed run).
      console: where to write; None is standard output. `Console(quiet=True)` silences it.
    """

    def __init__(self, total_steps: int, *, first_step: int = 0, console: Console | None = None):
        self._total, self._step = total_steps, first_step
        self._text = ""
        self._console = console or Console()
        self._line: LiveLine | None = None

    def advance(self, step: int) -> None:
        """Moves the live line to `step`; prints nothing elsewhere."""
        self._show(step, self._text)

    def first(self, step: int, loss: float) -> None:
        """Shows the loss of the first step, whose time says nothing of those that follow."""
        self._show(step, f"loss {loss:7.4f}")
        if self._line is None:
            self.print(f"{self._step_of_steps()}  {self._text}")

    def update(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Shows `loss` and what `StepClock.report` returned, from `scalars`, as of `step`."""
        minutes, seconds = divmod(round((self._total - step) * scalars["seconds_per_step"]), 60)
        text = (
            f"loss {float(scalars['loss']):7.4f}  {scalars['img_per_s']:7.1f} img/s  "
            f"wait {100 * scalars['data_wait_share']:5.1f} %  "
            f"ETA {minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
        )
        self._show(step, text)
        if self._line is None:
            self.print(f"{self._step_of_steps()}  {text}")

    def print(self, message: str) -> None:
        """Prints a message on lines of its own, above the live line if there is one."""
        say(self._console, message)

    @contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """Says, while the block runs, what it does and for how long: first after a few seconds."""
        if self._line is None:
            with signs_of_life(lambda: what, self._console):
                yield
            return
        line, text = self._line, self._text
        started, over = time.monotonic(), threading.Event()

        def tick() -> None:
            while not over.wait(REDRAW):
                line.show(self._step, f"{what} ({time.monotonic() - started:.0f} s)")

        line.show(self._step, what)
        thread = threading.Thread(target=tick, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self._show(self._step, text)

    def _show(self, step: int, text: str) -> None:
        self._step, self._text = step, text
        if self._line is not None:
            self._line.show(step, text)

    def _step_of_steps(self) -> str:
        return f"step {self._step:{len(str(self._total))}d}/{self._total}"

    def __enter__(self) -> "Progress":
        if self._console.quiet:
            return self
        if self._console.is_jupyter:
            self._line = NotebookLine(self._total)
        elif self._console.is_interactive:
            self._line = TerminalLine(self._console, self._total, self._step)
        return self

    def __exit__(self, *error: object) -> None:
        if self._line is not None:
            self._line.close()
            self._line = None
