"""Training: `train(config, workdir)`, read from top to bottom."""

import collections
import functools
import os
from collections.abc import Generator
from contextlib import closing
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jaxtyping import PyTree
from rich.console import Console

from esvit_jax import bad_step, buckets, checkpoint, parallel, preflight, processes, programs
from esvit_jax.bad_step import Batch, TriedStep
from esvit_jax.bench.peaks import peak_flops
from esvit_jax.config import ConfigDict, RunNumbers, resolve
from esvit_jax.data.loader import train_batches
from esvit_jax.data.sources import Source, open_source
from esvit_jax.errors import full_disk_in_words, renamed
from esvit_jax.evaluate.online import Evaluator, evaluators
from esvit_jax.evaluate.result import Result
from esvit_jax.interop.initialize import init_from
from esvit_jax.lock import Lock
from esvit_jax.recipe import Recipe, build
from esvit_jax.runlog.alive import say
from esvit_jax.runlog.collapse import effective_rank, feature_std
from esvit_jax.runlog.log import RunLog
from esvit_jax.runlog.profile import StepProfiler
from esvit_jax.runlog.signals import StopSignals, in_thread
from esvit_jax.state import TrainState, create_state, init_params
from esvit_jax.workdir import check_same_run, usable_workdir, write_run_config

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
    start = done = checkpoints.latest_step() or 0
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


class Run(NamedTuple):
    """A run that can be started: what is trained, on what, and where it is kept."""

    config: ConfigDict
    workdir: epath.Path
    source: Source
    numbers: RunNumbers
    recipe: Recipe
    evaluators: list[Evaluator]
    lock: Lock
    checkpoints: checkpoint.Checkpoints
    size: preflight.Size

    @property
    def cache(self) -> str | None:
        """Where compiled programs are kept."""
        return str(self.workdir / "cache") if self.config.compilation_cache else None

    def batches(self, start: int) -> Generator[Batch, None, None]:
        """The host's batches from a step on, without end."""
        return train_batches(
            self.source,
            batch_size=self.config.batch_size,
            canvas_size=self.config.data.canvas_size,
            seed=self.config.seed,
            start_step=start,
            num_workers=self.config.data.num_workers,
            num_threads=self.config.data.num_threads,
            max_bad_records=self.config.data.max_bad_records,
            max_wait_seconds=self.config.data.max_wait_seconds,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def log(self, console: Console) -> RunLog:
        """Where the run says what it does; its metrics begin anew or go on as its steps do."""
        peak = peak_flops(jax.local_devices()[0].device_kind, self.config.dtype)
        return RunLog(
            self.workdir,
            self.config,
            self.numbers,
            self.recipe.schedules,
            resume_step=self.checkpoints.latest_step(),
            console=console,
            seconds_at_peak=peak and self.size.step_operations / peak,
        )


def prepare(
    config: ConfigDict, workdir: str | os.PathLike[str], console: Console, strict: bool = False
) -> Run:
    """Opens the data, refuses what cannot work, says what is about to happen.

    Nothing is compiled, and nothing written before all is known to fit together.
    """
    path = usable_workdir(workdir)
    with renamed(
        name="config.data.name", split="config.data.train_split", data_dir="config.data.data_dir"
    ):
        source = open_source(
            config.data.name, config.data.train_split, config.data.data_dir or None
        )
    numbers = resolve(config, num_images=len(source), num_devices=jax.device_count())
    check_same_run(path, config, numbers)
    online = evaluators(config, source, numbers)
    recipe = build(config, numbers)
    if config.init_from and not checkpoint.has_checkpoint(path):
        shapes = jax.eval_shape(functools.partial(init_params, recipe.model), jax.random.key(0))
        with renamed(init_from="config.init_from", init_parts="config.init_parts"):
            init_from(shapes, config.init_from, config.init_parts)

    processes.check_same(processes.facts(path, config, numbers))

    size = preflight.measure_size(config, numbers, recipe)
    disk = preflight.measure_disk(config, numbers, size, path)
    for line in preflight.describe(config, numbers, size, disk):
        say(console, line)
    preflight.check_memory(config, size)
    preflight.check_disk(config, disk)
    lock = Lock(path, config.lock_seconds, enabled=jax.process_index() == 0)
    try:
        if jax.process_index() == 0:
            write_run_config(path, config, numbers)
        checkpoints = checkpoint.Checkpoints(
            str(path),
            every_steps=config.checkpoint_every_steps,
            keep=config.checkpoint_keep,
            keep_every_steps=config.checkpoint_keep_every_steps,
            strict=strict,
        )
    except BaseException:
        lock.close()
        raise
    step = checkpoints.latest_step()
    say(console, f"workdir {path} ({'new' if step is None else f'from step {step}'})")
    if step == numbers.total_steps:
        say(console, "it has taken all its steps; there is nothing left to train")
    return Run(config, path, source, numbers, recipe, online, lock, checkpoints, size)


def before_saving(run: Run, log: RunLog) -> None:
    """What is due before a checkpoint, so that one that is whole has its metrics beside it."""
    with buckets.waiting(run.workdir):
        run.lock.check()
        log.flush()


def first_state(run: Run, log: RunLog) -> TrainState:
    """The newest checkpoint's state or, of a new run, a random or loaded one; on all devices."""
    config, recipe = run.config, run.recipe
    create = functools.partial(create_state, recipe.model, recipe.optimizer)

    def init(key: jax.Array) -> PyTree:
        return init_params(recipe.model, jax.random.wrap_key_data(key))

    key = np.asarray(jax.random.key_data(jax.random.key(config.seed)))  # alike in all processes
    shapes = jax.eval_shape(lambda key: create(init(key)), key)
    shapes = parallel.laid_out(shapes, config.parallel)
    if run.checkpoints.latest_step() is not None:
        with log.busy("reading the checkpoint", "checkpoint"):
            return parallel.replicate(run.checkpoints.restore(shapes), config.parallel)

    shardings = jax.tree.map(lambda x: x.sharding, shapes)
    jitted = jax.jit(init, out_shardings=shardings.params)
    params = compiled(jitted, key, what="the initialisation", log=log)(key)
    if config.init_from:
        loaded, report = init_from(params, config.init_from, config.init_parts)
        log.say(report)
        params = jax.tree.map(parallel.place, loaded, shardings.params)
    state = jax.jit(create, out_shardings=shardings)(params)
    return parallel.replicate(state, config.parallel)


def evaluate(run: Run, state: TrainState, done: int, log: RunLog) -> None:
    """The evaluations that are due after so many steps; recorded if all of them come to an end."""
    results = []
    for evaluator in run.evaluators:
        if evaluator.due(done):
            with log.busy(f"evaluating at step {done}", "evaluation"):
                results.append(evaluator(state.teacher, done))
    for result in results:
        log.record(result, done)


def evaluate_baselines(run: Run, state: TrainState, log: RunLog) -> None:
    """What the run is to be compared with: other features, and its own before training."""
    for evaluator in run.evaluators:
        with log.busy("evaluating what to compare with", "evaluation"):
            results = [*evaluator.baselines(), evaluator(state.teacher, 0)]
        for result in results:
            log.record(result, 0)


def compiled(function: Any, *arguments: Any, what: str, log: RunLog) -> Any:
    """Compiles a jitted function for arguments, with signs of life, and open to signals.

    jax keeps the program, so that the function's next call with such arguments starts at once.
    """
    with log.busy(f"tracing {what}", "compile"):
        lowered = function.lower(*arguments)
    with log.busy(f"compiling {what}", "compile"):
        in_thread(lowered.compile)
    processes.meet()  # collectives wait for half a minute only, and compilers may differ by more
    return function


def device_batch(batch: Batch) -> Batch:
    """What of a host batch the step reads (no labels), laid out for the devices."""
    return parallel.shard({"canvas": batch["canvas"], "size": batch["size"]})


def feature_spread(features: jax.Array) -> dict[str, jax.Array]:
    """The collapse monitors of view features f32[n, d] of n images."""
    return {
        "feature_std": feature_std(features=features),
        "feature_rank": effective_rank(features=features),
    }
