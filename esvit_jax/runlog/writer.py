"""Metrics on disk: a JSON object a line, and TensorBoard events."""

import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter


class MetricWriter:
    """Appends scalars to `workdir/metrics.jsonl` and, as TensorBoard events, `workdir/tensorboard`.

    A line is one strict JSON object, `step` first, then the scalars in the order given; a number
    that is not finite is written as null. A line is with the operating system when `write`
    returns, so a killed run loses none; TensorBoard may lag by `flush_secs`.

    With `resume_step` (the step of the checkpoint that the run goes on from) whatever was logged
    after that step is dropped from the file and hidden in TensorBoard, as is a line that the end
    of the process tore: the file reads as if there had been one run. Without it both start empty.

    Args:
      workdir: a local directory; made if it is not there.
      resume_step: last step whose lines are kept; None for a run that starts at the beginning.
      enabled: False (processes other than 0) writes nothing and creates no file.
    """

    def __init__(
        self, workdir: str | Path, *, resume_step: int | None = None, enabled: bool = True
    ):
        self._enabled = enabled
        if not enabled:
            return
        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / "metrics.jsonl"
        self._file = path.open("ab")
        self._file.truncate(0 if resume_step is None else _length_up_to(path, resume_step))
        self._events = SummaryWriter(
            logdir=str(workdir / "tensorboard"),
            purge_step=0 if resume_step is None else resume_step + 1,
            flush_secs=10,
            # The name has whole seconds only: a quick restart would overwrite the last run's file.
            filename_suffix=f".{time.time_ns()}",
        )

    def write(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Writes one line; `scalars` maps names to numbers or arrays of no axes."""
        if not self._enabled:
            return
        numbers = {name: _number(value) for name, value in scalars.items()}
        finite = {name: x if math.isfinite(x) else None for name, x in numbers.items()}
        line = json.dumps({"step": step} | finite, allow_nan=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        for name, number in numbers.items():
            self._events.add_scalar(name, number, step)

    def close(self) -> None:
        if self._enabled:
            self._file.close()
            self._events.close()

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl as dicts, in order, without a last line that is torn."""
    return [record for _, record in _intact_lines(Path(path))]


def _intact_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (bytes up to the end of the line, what it holds) up to the first torn line."""
    end = 0
    with path.open("rb") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                return
            if not line.endswith(b"\n"):
                return
            end += len(line)
            yield end, record


def _length_up_to(path: Path, step: int) -> int:
    """Bytes of the leading lines that belong to steps ≤ `step`."""
    length = 0
    for end, record in _intact_lines(path):
        if record["step"] > step:
            break
        length = end
    return length


def _number(value: Any) -> int | float:
    return value if isinstance(value, int) else float(value)
