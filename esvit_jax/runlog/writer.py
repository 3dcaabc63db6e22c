"""Metrics on disk: a JSON object a line, and TensorBoard events."""

import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from etils import epath
from tensorboardX import SummaryWriter

from esvit_jax import buckets


class MetricWriter:
    """Appends scalars to `workdir/metrics.jsonl` and, as TensorBoard events, `workdir/tensorboard`.

    A line is one strict JSON object, `step` first, then the scalars in the order given; a number
    that is not finite is written as null. A line is with the operating system when `write`
    returns, so a killed run loses none; TensorBoard may lag by `flush_secs`.

    What a bucket holds cannot be appended to. For a workdir in one, both lie in a local temporary
    folder, and `flush` and `close` bring them there.

    With `resume_step` (the step of the checkpoint that the run goes on from) whatever was logged
    after that step is dropped from the file and hidden in TensorBoard: the file reads as if there
    had been one run. Lines that are damaged, by the end of the process or by the disk, are dropped
    too, with a word; those around them stay. Without `resume_step` both start empty.

    Args:
      workdir: a directory, made if it is not there, or gs://….
      resume_step: last step whose lines are kept; None for a run that starts at the beginning.
      enabled: False (processes other than 0) writes nothing and creates no file.
      report: is told of damaged lines.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        resume_step: int | None = None,
        enabled: bool = True,
        report: Callable[[str], None] = lambda message: None,
    ):
        self._enabled = enabled
        if not enabled:
            return
        self._workdir = self._folder = epath.Path(workdir)
        if buckets.is_remote(workdir):
            self._temporary = tempfile.TemporaryDirectory(prefix="esvit_metrics")
            self._folder = epath.Path(self._temporary.name)
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / "metrics.jsonl"
        kept = self._workdir / "metrics.jsonl"
        if kept != path and resume_step is not None and kept.exists():
            path.write_bytes(kept.read_bytes())
        if resume_step is None:
            path.write_bytes(b"")
        elif path.exists():
            _keep_steps(path, resume_step, report)
        self._file = path.open("ab")
        self._events = SummaryWriter(
            logdir=str(self._folder / "tensorboard"),
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

    def flush(self) -> None:
        """Brings all that was written to a workdir in a bucket, whole files."""
        if not self._enabled or self._folder == self._workdir:
            return
        self._events.flush()
        events = [f"tensorboard/{path.name}" for path in (self._folder / "tensorboard").iterdir()]
        with buckets.waiting(self._workdir):
            for name in ("metrics.jsonl", *events):
                (self._workdir / name).write_bytes((self._folder / name).read_bytes())

    def close(self, *, flush: bool = True) -> None:
        """Ends the files; with `flush` they are brought to a bucket once more."""
        if not self._enabled:
            return
        self._file.close()
        self._events.close()
        try:
            if flush:
                self.flush()
        finally:
            if self._folder != self._workdir:
                self._temporary.cleanup()

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl as dicts, in order, without those that are damaged."""
    return [record for _, record in _parsed_lines(epath.Path(path)) if record is not None]


def damaged_lines(path: str | os.PathLike[str]) -> list[int]:
    """The numbers, from 1, of the lines that `read_metrics` leaves out."""
    lines = enumerate(_parsed_lines(epath.Path(path)), start=1)
    return [number for number, (_, record) in lines if record is None]


def _parsed_lines(path: epath.Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Yields each line and what it holds; None for one that is damaged or has no end."""
    with path.open("rb") as lines:
        for line in lines:
            try:
                record = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                record = None
            is_ours = isinstance(record, dict) and isinstance(record.get("step"), int)
            yield line, record if is_ours else None


def _keep_steps(path: epath.Path, last: int, report: Callable[[str], None]) -> None:
    """Leaves of a metrics.jsonl the lines that are whole and belong to steps up to the last."""
    lines = list(_parsed_lines(path))
    kept = [line for line, record in lines if record is not None and record["step"] <= last]
    if len(kept) == len(lines):
        return
    if damaged := damaged_lines(path):
        numbers = ", ".join(map(str, damaged[:10])) + (", …" if len(damaged) > 10 else "")
        report(f"damaged and left out: line {numbers} of {path.name}; those around it are kept")
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(b"".join(kept))
    os.replace(temporary, path)


def _number(value: Any) -> int | float:
    return value if isinstance(value, int) else float(value)
