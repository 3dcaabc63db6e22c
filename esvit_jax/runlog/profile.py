"""Traces of a few steps, to be read with TensorBoard's profile plugin or Perfetto."""

import os
import tempfile
from typing import Any

import jax
from etils import epath

from esvit_jax import buckets


class StepProfiler:
    """Traces steps with `jax.profiler`, into `workdir/profile`, until the last one has ended.

    Args:
      workdir: of the run; one in a bucket gets the trace when it is whole.
      steps: the first and the last to trace, counted from 1; None traces none. A start that comes
        after the first traces none either.
    """

    def __init__(self, workdir: str | os.PathLike[str], steps: tuple[int, int] | None):
        self._folder = epath.Path(workdir) / "profile"
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._first, self._last = steps or (0, 0)
        self._tracing = False

    def before(self, step: int) -> None:
        """To be called before a step is dispatched."""
        if step == self._first:
            if buckets.is_remote(self._folder):  # jax traces into local folders alone
                self._temporary = tempfile.TemporaryDirectory(prefix="esvit_profile")
            folder = self._temporary.name if self._temporary else os.fspath(self._folder)
            jax.profiler.start_trace(folder)
            self._tracing = True

    def after(self, step: int, result: Any) -> None:
        """To be called after it, with arrays that it returns."""
        if self._tracing and step >= self._last:
            jax.block_until_ready(result)
            self._stop()

    def _stop(self) -> None:
        self._tracing = False
        jax.profiler.stop_trace()
        if self._temporary:
            with self._temporary as folder:
                buckets.copy_folder(folder, self._folder)

    def __enter__(self) -> "StepProfiler":
        return self

    def __exit__(self, *error: object) -> None:
        if self._tracing:
            self._stop()
