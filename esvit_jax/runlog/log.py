"""What a run says of itself: lines to read, metrics on disk, results for the caller."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import jax
from etils import epath
from rich.console import Console

from esvit_jax import buckets
from esvit_jax.config import ConfigDict, RunNumbers
from esvit_jax.evaluate.result import Result, results_of_lines
from esvit_jax.optim import Schedule
from esvit_jax.runlog.clock import StepClock, TimeAccount, carried_over, spent
from esvit_jax.runlog.collapse import collapse_warning
from esvit_jax.runlog.progress import Progress
from esvit_jax.runlog.writer import MetricWriter, read_metrics


class RunLog:
    """Writes and shows what training and evaluations measure.

    Args:
      workdir: for metrics.jsonl and TensorBoard.
      config, numbers: of the run.
      schedules: functions of the step, logged beside the scalars of training.
      resume_step: steps done before; None for a new run.
      start_step: of a new run.
      console: to print to; a quiet one on processes other than 0.
      seconds_at_peak: that a step would take if the devices did its products at their peak; None
        where nobody knows it.

    Attributes:
      scalars: the last ones logged.
      results: of all evaluations, in order.
      clock: to be told when the loop waits for data.
      account: of what the run spends its time on.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        config: ConfigDict,
        numbers: RunNumbers,
        schedules: Mapping[str, Schedule],
        *,
        resume_step: int | None,
        start_step: int = 0,
        console: Console,
        seconds_at_peak: float | None = None,
    ):
        self._config, self._numbers, self._schedules = config, numbers, schedules
        first = start_step if resume_step is None else resume_step
        self._progress = Progress(numbers.total_steps, first_step=first, console=console)
        self._seconds_at_peak = seconds_at_peak
        metrics = epath.Path(workdir) / "metrics.jsonl"
        earlier = read_metrics(metrics) if metrics.exists() else []
        self._writer = MetricWriter(
            workdir,
            resume_step=resume_step,
            enabled=jax.process_index() == 0,
            report=self.say,
        )
        self._shown_warnings: set[str] = set()
        self._timed_from = first  # steps done when the clock last started
        self._done = self._first = first
        self.scalars: dict[str, float] = {}
        self.results: list[Result] = []
        self.clock = StepClock()
        self._earlier = carried_over(earlier, resume_step)
        self._evaluated = {result.step for result in results_of_lines(earlier)}
        self.account = TimeAccount(self._earlier)

    def say(self, message: str) -> None:
        """Prints a message."""
        self._progress.print(message)

    @contextmanager
    def busy(self, what: str, spent_on: str | None = None) -> Iterator[None]:
        """Says, while a block runs, what it does and for how long.

        Args:
          what: it does, in words.
          spent_on: one of `clock.SPENT_ON`; None is what time is spent on already.
        """
        outer = self.account.spent_on(spent_on) if spent_on else nullcontext()
        with outer, self._progress.busy(what):
            yield

    def evaluated(self, step: int) -> bool:
        """Whether an earlier start has recorded evaluations of this step."""
        return step in self._evaluated

    def record(self, result: Result, step: int) -> None:
        """Writes and prints what an evaluation measured; its time is not training's."""
        self.results.append(result)
        self._writer.write(step, result.scalars())
        self.say(f"step {step}: {result.evaluation} of {result.subject}: {result}")
        self._restart_clock(step)

    def first_step(self, done: int, scalars: Mapping[str, jax.Array]) -> None:
        """Shows the first step of this start, whose time is mostly not a step's."""
        self._progress.first(done, float(scalars["loss"]))
        self._restart_clock(done)
        self.account.switch("step")

    def advance(self, done: int) -> None:
        """Moves the live line."""
        self._done = done
        self._progress.advance(done)

    def due(self, done: int) -> bool:
        """Whether the scalars after so many steps are to be logged."""
        return done % self._config.log_every_steps == 0 or done == self._numbers.total_steps

    def log(self, done: int, scalars: Mapping[str, jax.Array]) -> None:
        """Waits for the scalars of the last of so many steps; writes and shows them."""
        numbers = {name: float(x) for name, x in scalars.items()}
        numbers |= {name: float(value(done - 1)) for name, value in self._schedules.items()}
        if done > self._timed_from:
            numbers |= self.clock.report((done - self._timed_from) * self._config.batch_size)
            if self._seconds_at_peak:
                numbers["mfu"] = self._seconds_at_peak / numbers["seconds_per_step"]
            self._progress.update(done, numbers)
        numbers |= self.account.report()
        self._timed_from = done
        self._writer.write(done, numbers)
        self._warn(done, numbers)
        self.scalars = numbers

    def flush(self) -> None:
        """Brings what was written to a workdir that is in a bucket."""
        self._writer.flush()

    def _warn(self, done: int, scalars: Mapping[str, Any]) -> None:
        if done <= self._numbers.warmup_steps:
            return
        warning = collapse_warning(scalars, num_prototypes=self._config.head.num_prototypes)
        if warning and warning not in self._shown_warnings:
            self._shown_warnings.add(warning)
            self.say("warning: " + warning)

    def _restart_clock(self, done: int) -> None:
        self.clock.restart()
        self._timed_from = done

    def __enter__(self) -> "RunLog":
        self._progress.__enter__()
        if seconds := self._earlier.get("compile"):
            self.say(f"compiling took {seconds:.0f} s before; what is kept of it takes less now")
        return self

    def _sum_up(self) -> None:
        """Writes and says what all starts of the run spent their time on."""
        report = self.account.report()
        self._writer.write(self._done, report)
        seconds = sum(x for name, x in report.items() if name.startswith("spent_"))
        pace = f"{self._done * self._config.batch_size / seconds:.1f} img/s over all"
        mfu = f"; MFU {100 * self.scalars['mfu']:.1f} %" if "mfu" in self.scalars else ""
        self.say(f"{self._done:,} steps {spent(report)}; {pace}{mfu}")

    def __exit__(self, *error: object) -> None:
        if error[0] is None and self._done > self._first:
            self._sum_up()
        self._progress.__exit__(*error)
        gone = isinstance(error[1], Exception) and buckets.is_unreachable(error[1])
        self._writer.close(flush=not gone)
