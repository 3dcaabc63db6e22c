"""Times of calls, taken in turns so that a machine's moods hit all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax


class Timing(NamedTuple):
    """Seconds of one call: the median of all rounds, the fastest and the slowest."""

    median: float
    low: float
    high: float


def time_in_turns(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """Calls each once to warm up, then all of them one after the other, `rounds` times.

    A call has ended when the arrays it returns are there.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {
        name: Timing(statistics.median(times), min(times), max(times))
        for name, times in seconds.items()
    }
