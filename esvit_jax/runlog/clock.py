"""Time: the pace of the loop, and what the time of a run went to."""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

# What time is spent on. "start" is what comes before the first step and is none of the others;
# "lost" is the time of earlier starts, of any kind, after the checkpoint that was gone on from.
SPENT_ON = ("start", "compile", "step", "data", "checkpoint", "evaluation", "lost")


class TimeAccount:
    """What the time of a run went to, as its main thread sees it: every second counts once.

    The devices work meanwhile: time in which they are waited for, or in which there is nothing else
    to do, is of the steps. What happens between two starts is not known.

    Args:
      carried: seconds of earlier starts, see `carried_over`.
    """

    def __init__(self, carried: Mapping[str, float] | None = None):
        self._seconds = dict.fromkeys(SPENT_ON, 0.0) | dict(carried or {})
        self._now, self._since = "start", time.perf_counter()

    def switch(self, to: str) -> str:
        """From here on, time is spent on something else; returns on what until here."""
        now = time.perf_counter()
        self._seconds[self._now] += now - self._since
        before, self._now, self._since = self._now, to, now
        return before

    @contextmanager
    def spent_on(self, what: str) -> Iterator[None]:
        """The time within the block is spent on this."""
        before = self.switch(what)
        try:
            yield
        finally:
            self.switch(before)

    def report(self) -> dict[str, float]:
        """Seconds of all starts, as "spent_step" and so on, and "goodput": the share of steps."""
        self.switch(self._now)
        total = sum(self._seconds.values())
        seconds = {f"spent_{what}": x for what, x in self._seconds.items()}
        return seconds | {"goodput": self._seconds["step"] / total if total else 0.0}


def carried_over(lines: Iterable[Mapping[str, Any]], resume_step: int | None) -> dict[str, float]:
    """The seconds that a run was given before this start, by what they were spent on.

    Args:
      lines: of its metrics.jsonl, as the last start left them.
      resume_step: of the checkpoint that it goes on from; None if it begins anew.

    Returns:
      What stood in the newest line up to that step; whatever came later is "lost".
    """
    kept: dict[str, float] = {}
    last: dict[str, float] = {}
    for line in lines:
        if "spent_step" in line:
            last = {what: line.get(f"spent_{what}", 0.0) for what in SPENT_ON}
            if resume_step is not None and line["step"] <= resume_step:
                kept = last
    lost = sum(last.values()) - sum(kept.values())
    return kept | {"lost": kept.get("lost", 0.0) + lost}


def spent(report: Mapping[str, float]) -> str:
    """What a `TimeAccount.report` says, in words.

    >>> spent({"spent_step": 90.0, "spent_data": 9.96, "spent_lost": 0.04, "goodput": 0.9})
    'in 0:01:40: step 90.0 %, data 10.0 %'
    """
    seconds = {name[6:]: x for name, x in report.items() if name.startswith("spent_")}
    total = sum(seconds.values())
    shares = {what: 100 * x / total for what, x in seconds.items() if x >= 0.0005 * total}
    shares = sorted(shares.items(), key=lambda share: -share[1])
    minutes, rest = divmod(round(total), 60)
    return f"in {minutes // 60}:{minutes % 60:02d}:{rest:02d}: " + ", ".join(
        f"{what} {share:.1f} %" for what, share in shares
    )


class StepClock:
    """Measures the pace of the loop and how much of it is waiting for the input pipeline.

        with clock.waiting_for_data():
            batch = next(batches)

    Use it once a step. Steps are dispatched asynchronously, so a report is honest only after the
    loop has blocked on a result of the last step, as it does when it logs.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forgets what was measured: after the first step's compilation, or an evaluation."""
        self._start = time.perf_counter()
        self._waited = 0.0
        self._steps = 0

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Counts one step, and the time inside as waiting."""
        begin = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begin
        self._steps += 1

    def report(self, num_images: int) -> dict[str, float]:
        """The pace since the last report or restart, in which `num_images` were trained on.

        Returns:
          `img_per_s`; `data_wait_share`, 0..1 of the elapsed time; `seconds_per_step`.
        """
        elapsed = time.perf_counter() - self._start
        result = {
            "img_per_s": num_images / elapsed,
            "data_wait_share": self._waited / elapsed,
            "seconds_per_step": elapsed / max(self._steps, 1),
        }
        self.restart()
        return result
