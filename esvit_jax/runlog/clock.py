"""Throughput: the pace of the loop, and how much of it is waiting for data."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


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
