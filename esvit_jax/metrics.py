"""What one sees of a run: metrics on disk, progress on the terminal, throughput, collapse monitors.

Nothing here touches the training state, and only process 0 should write or print.
"""

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from rich import progress
from rich.console import Console
from tensorboardX import SummaryWriter

# Metrics on disk.


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


# Progress on the terminal.


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


# Throughput.


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


# Collapse monitors.


def feature_std(*, features: Float[Array, "n d"]) -> Float[Array, ""]:
    """Spread of the normalised features: mean over d of their standard deviation, times sqrt(d).

    1 when the directions are uniform on the sphere, 0 when all images have the same features
    (Chen & He 2021, "Exploring simple Siamese representation learning", section 4.1). The rows
    should be different images: two views of one image are alike in a good network, too.
    """
    features = features.astype(jnp.float32)
    norm = jnp.linalg.norm(features, axis=1, keepdims=True)
    unit = features / jnp.maximum(norm, 1e-12)
    return jnp.mean(jnp.std(unit, axis=0)) * math.sqrt(features.shape[1])


def effective_rank(*, features: Float[Array, "n d"]) -> Float[Array, ""]:
    """Number of directions that the features fill: 1 (collapse) to min(n, d).

    exp(H(p)), p = singular values / their sum, of the features as they are, not centred (Roy &
    Vetterli 2007, "The effective rank"). They are square roots of the eigenvalues of the smaller
    Gram matrix, so the cost is one symmetric eigenvalue problem of size min(n, d): for log
    steps, or for few rows. All-zero features have rank 1.
    """
    features = features.astype(jnp.float32)
    features = features if features.shape[0] <= features.shape[1] else features.T
    size = features.shape[0]
    gram = jnp.matmul(features, features.T, precision=jax.lax.Precision.HIGHEST)
    eigenvalues = jnp.linalg.eigvalsh(gram)
    # The root blows rounding up: without a floor, a rank of exactly 1 is measured as several.
    floor = size * jnp.finfo(jnp.float32).eps * eigenvalues[-1]
    singular = jnp.sqrt(jnp.where(eigenvalues > floor, eigenvalues, 0.0))
    share = singular / jnp.maximum(jnp.sum(singular), 1e-30)
    return jnp.exp(jnp.sum(jax.scipy.special.entr(share)))


def collapse_warning(scalars: Mapping[str, Any], *, num_prototypes: int) -> str | None:
    """A warning in words when the metrics of a step look like a collapse, else None.

    Three kinds are told apart, in this order:
    - uniform: `teacher_entropy` ≥ 0.99 and `view_loss` within 1 % of ln K. The teacher says
      nothing, and the student says it back.
    - one prototype: `teacher_entropy` ≤ 0.01 and `view_loss` ≤ 1 % of ln K. Every view gets the
      same prototype, which the student has learnt.
    - vanishing features: `feature_std` < 0.05 or `feature_rank` < 1.5. All images look alike to
      the backbone; this is where either of the above ends.

    An untrained network can look uniform for a while: ask after the learning rate's warm-up. The
    text of a kind is always the same, so a caller that remembers the texts it has shown warns
    once per kind. Numbers that are not finite are no collapse.

    Args:
      scalars: of one step; reads `teacher_entropy` (0..1, share of ln K), `view_loss` (nats),
        `feature_std` and `feature_rank`.
      num_prototypes: K.
    """
    uniform_loss = math.log(num_prototypes)
    entropy, loss = float(scalars["teacher_entropy"]), float(scalars["view_loss"])
    if entropy >= 0.99 and abs(loss - uniform_loss) <= 0.01 * uniform_loss:
        return (
            f"collapse to uniform: the loss sits at ln K = {uniform_loss:.2f} and the teacher "
            "prefers no prototype; lower config.loss.warmup_teacher_temp or "
            "config.loss.teacher_temp, raise config.loss.center_momentum, or lower "
            "config.optimizer.learning_rate"
        )
    if entropy <= 0.01 and loss <= 0.01 * uniform_loss:
        return (
            "collapse to one prototype: the teacher gives every view the same one and the loss "
            "is near 0; raise config.loss.teacher_temp and config.loss.warmup_teacher_temp, or "
            "lower config.loss.center_momentum so that the center follows faster"
        )
    if float(scalars["feature_std"]) < 0.05 or float(scalars["feature_rank"]) < 1.5:
        return (
            "collapse of the features: the backbone tells images hardly apart; lower "
            "config.optimizer.learning_rate or config.optimizer.clip_norm, or raise "
            "config.optimizer.warmup_epochs or config.optimizer.freeze_prototypes_epochs"
        )
    return None
