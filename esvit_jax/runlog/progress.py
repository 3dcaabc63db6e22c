"""What one sees of a run while it goes: a live line on a terminal, lines elsewhere."""

from collections.abc import Mapping
from typing import Any

from rich import progress
from rich.console import Console


class Progress:
    """A live line on a terminal; elsewhere (a pipe, a file, a notebook) a line a log interval.

    Both say the same: step of steps, loss, images a second, share of the time spent waiting for
    data, and the time that the remaining steps take at the pace of the last interval.

    Args:
      total_steps: steps of the whole run.
      first_step: steps done before this start (a resumed run).
      console: where to write; None is standard output. `Console(quiet=True)` silences it.
    """

    def __init__(self, total_steps: int, *, first_step: int = 0, console: Console | None = None):
        self._total = total_steps
        self._console = console or Console()
        self._live = progress.Progress(
            progress.TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            progress.BarColumn(bar_width=None),
            progress.TextColumn("{task.description}", markup=False),
            console=self._console,
            disable=not self._console.is_interactive,
            # A slow redraw: the devices of a laptop are the cores that draw.
            refresh_per_second=2,
            expand=True,
        )
        self._task = self._live.add_task("compiling", total=total_steps, completed=first_step)

    def advance(self, step: int) -> None:
        """Moves the live line to `step`; prints nothing elsewhere."""
        self._live.update(self._task, completed=step)

    def update(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Shows `loss` and what `StepClock.report` returned, from `scalars`, as of `step`."""
        minutes, seconds = divmod(round((self._total - step) * scalars["seconds_per_step"]), 60)
        text = (
            f"loss {float(scalars['loss']):7.4f}  {scalars['img_per_s']:7.1f} img/s  "
            f"wait {100 * scalars['data_wait_share']:5.1f} %  "
            f"ETA {minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
        )
        self._live.update(self._task, completed=step, description=text)
        if not self._console.is_interactive:
            self.print(f"step {step:{len(str(self._total))}d}/{self._total}  {text}")

    def print(self, message: str) -> None:
        """Prints a message on lines of its own, above the live line if there is one."""
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> "Progress":
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()
