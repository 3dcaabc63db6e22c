"""Training: `train(config, workdir)`, read from top to bottom."""

import collections
import functools
import os
from contextlib import closing
from typing import NamedTuple

import jax
from etils import epath
from rich.console import Console

from esvit_jax import bad_step, buckets, parallel, programs
from esvit_jax.bad_step import Batch, TriedStep
from esvit_jax.config import ConfigDict
from esvit_jax.errors import full_disk_in_words, renamed
from esvit_jax.evaluate.result import Result
from esvit_jax.run import Run, compiled, first_state, prepare
from esvit_jax.runlog.collapse import effective_rank, feature_std
from esvit_jax.runlog.log import RunLog
from esvit_jax.runlog.profile import StepProfiler
from esvit_jax.runlog.signals import StopSignals
from esvit_jax.state import TrainState

# What the loader calls these fields.
LOADER_FIELDS = {
    "batch_size": "config.batch_size",
    "max_bad_records": "config.data.max_bad_records",
}


class TrainResult(NamedTuple):
    """What a run came to.

    Attributes:
      workdir: where it is kept.
      step: steps taken; fewer than asked for where a signal stopped it.
      scalars: the last ones logged.
      results: of all evaluations, in order, the baselines first.
    """

    workdir: str
    step: int
    scalars: dict[str, float]
    results: list[Result]

    @property
    def checkpoint(self) -> epath.Path:
        """The folder of the final state."""
        return epath.Path(self.workdir) / "checkpoints" / str(self.step)


def train(
    config: ConfigDict,
    workdir: str | os.PathLike[str],
    *,
    strict: bool = False,
    console: Console | None = None,
) -> TrainResult:
    """Trains until `total_steps`, from the newest whole checkpoint in `workdir` if there is one.

    SIGTERM and Ctrl-C end it after the step that is being taken, with a checkpoint; before the
    first step, at once. An evaluation is broken off, and made up for by the next start. Of several
    processes, a signal to any ends all after the same step, two steps later, evaluations included.
    In a thread other than the main one, signals are left alone.

    Args:
      config: see `default_config`.
      workdir: where checkpoints, metrics and figures go; a local folder, made if it is not there,
        or gs://bucket/run.
      strict: refuse to go on where the newest checkpoint is damaged, in place of going on from the
        one before it.
      console: a rich console to report to; None is standard output.

    Returns:
      Where the final state is, and what was measured last.

    Raises:
      UserError: something in the config, the data or the workdir that cannot work; before
        anything is compiled where that can be known.
      RunError: `config.max_bad_steps` steps in a row were not finite, a checkpoint cannot be
        written, or a bucket cannot be reached; as `Interrupted`: a signal came before the first
        step; as `DiskFull`: no room.
    """
    console = (console or Console()) if jax.process_index() == 0 else Console(quiet=True)
    with buckets.reaching(workdir):
        run = prepare(config, workdir, console, strict)
    checkpoints, total_steps = run.checkpoints, run.numbers.total_steps
    start = done = run.first_step
    alone = jax.process_count() == 1  # nobody waits for what this process breaks off
    batches = run.batches(start)
    in_flight: collections.deque[TriedStep] = collections.deque()
    stop_if_bad = functools.partial(bad_step.stop_if_bad, config, run.workdir, checkpoints)
    with (
        buckets.reaching(workdir), full_disk_in_words(), renamed(**LOADER_FIELDS),
        closing(run.lock), closing(checkpoints), closing(batches),
        run.log(console) as log, StopSignals() as signals, programs.kept_in(run.cache),
        StepProfiler(run.workdir, config.profile_steps) as profiler,
    ):  # fmt: skip
        # 1. What takes long before the first step; there is nothing to save yet.
        with signals.raising(f"nothing was trained after step {start}; start it again"):
            state = first_state(run, log)
            if config.knn_baselines and checkpoints.latest_step() is None:
                evaluate_baselines(run, state, log)
            step = parallel.on_all_devices(run.recipe.step, config.parallel, donate=True)
            spread = jax.jit(feature_spread)
            anywhere = parallel.Anywhere(config.parallel)
            with log.busy("reading the first images", "data"):
                first_batch = next(batches)
            if start < total_steps:
                compiled(step, state, device_batch(first_batch), what="the step", log=log)
            if alone and start and not log.evaluated(start):  # it was broken off
                evaluate(run, state, start, log)

        # 2. The loop. Steps are dispatched ahead of the devices; at most two wait there.
        for i in range(start, total_steps):
            with log.clock.waiting_for_data(), log.account.spent_on("data"):
                batch = first_batch if i == start else next(batches)
            profiler.before(i + 1)
            state, scalars, features = step(state, device_batch(batch))
            in_flight.append(TriedStep(i, scalars, batch))
            if len(in_flight) > 2:
                stop_if_bad(state, in_flight.popleft(), log.say)
            done = i + 1
            log.advance(done)
            profiler.after(done, scalars)
            if i == start:
                log.first_step(done, scalars)
            if log.due(done):
                log.log(done, scalars | spread(features))
            with signals.breaking_off(alone):
                if not (alone and signals.received):
                    evaluate(run, state, done, log)
            stopping = anywhere(signals.received)
            with log.account.spent_on("checkpoint"):
                checkpoints.save(
                    done, state, force=done == total_steps or stopping,
                    before=functools.partial(before_saving, run, log),
                )  # fmt: skip
            if stopping:
                log.say(f"stopped by a signal after step {done}; start it again to go on there")
                break
        while in_flight:
            stop_if_bad(state, in_flight.popleft(), log.say)
        with log.busy("writing the checkpoint", "checkpoint"):
            checkpoints.wait()
    return TrainResult(str(run.workdir), done, log.scalars, log.results)


def before_saving(run: Run, log: RunLog) -> None:
    """What is due before a checkpoint, so that one that is whole has its metrics beside it."""
    with buckets.waiting(run.workdir):
        run.lock.check()
        log.flush()


def evaluate(run: Run, state: TrainState, done: int, log: RunLog) -> None:
    """The evaluations that are due after so many steps; recorded if all of them come to an end."""
    results = []
    for evaluator in run.evaluators:
        if evaluator.due(done):
            with log.busy(f"evaluating at step {done}", "evaluation"):
                results += evaluator(state.teacher, done)
    for result in results:
        log.record(result, done)


def evaluate_baselines(run: Run, state: TrainState, log: RunLog) -> None:
    """What the run is to be compared with: other features, and its own before training."""
    for evaluator in run.evaluators:
        with log.busy("evaluating what to compare with", "evaluation"):
            results = evaluator.baselines(state.teacher, run.start_step)
        for result in results:
            log.record(result, run.start_step)


def device_batch(batch: Batch) -> Batch:
    """What of a host batch the step reads (no labels), laid out for the devices."""
    return parallel.shard({"canvas": batch["canvas"], "size": batch["size"]})


def feature_spread(features: jax.Array) -> dict[str, jax.Array]:
    """The collapse monitors of view features f32[n, d] of n images."""
    return {
        "feature_std": feature_std(features=features),
        "feature_rank": effective_rank(features=features),
    }
