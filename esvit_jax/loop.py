"""Training: `train(config, workdir)`, read from top to bottom."""

import collections
import dataclasses
import functools
import json
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

from esvit_jax import checkpoint, parallel
from esvit_jax.config import ConfigDict, RunNumbers, differences, resolve
from esvit_jax.data.loader import train_batches
from esvit_jax.data.sources import open_source
from esvit_jax.errors import RunError, UserError, renamed
from esvit_jax.evaluate.online import evaluators
from esvit_jax.evaluate.result import Result
from esvit_jax.interop.initialize import init_from
from esvit_jax.recipe import build
from esvit_jax.runlog.clock import StepClock
from esvit_jax.runlog.collapse import collapse_warning, effective_rank, feature_std
from esvit_jax.runlog.progress import Progress
from esvit_jax.runlog.writer import MetricWriter
from esvit_jax.state import TrainState, create_state, init_params


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
    def checkpoint(self) -> Path:
        """The folder of the final state."""
        return Path(self.workdir) / "checkpoints" / str(self.step)


def train(config: ConfigDict, workdir: str, *, console: Console | None = None) -> TrainResult:
    """Trains until `total_steps`, from the newest checkpoint in `workdir` if there is one.

    Args:
      config: see `default_config`.
      workdir: where checkpoints, metrics and figures go.
      console: a rich console to report to; None is standard output.

    Returns:
      Where the final state is, and what was measured last.

    Raises:
      UserError: something in the config, the data or the workdir that cannot work; before
        anything is compiled where that can be known.
      RunError: `config.max_bad_steps` steps in a row were not finite.
    """
    # 1. What is trained on, and whether all of it fits together.
    with renamed(
        name="config.data.name", split="config.data.train_split", data_dir="config.data.data_dir"
    ):
        source = open_source(
            config.data.name, config.data.train_split, config.data.data_dir or None
        )
    numbers = resolve(config, num_images=len(source), num_devices=jax.device_count())
    check_workdir(workdir, config, numbers)
    online = evaluators(config, source, numbers)
    recipe = build(config, numbers)

    # 2. The state: the newest checkpoint's, or a new one.
    first = jax.process_index() == 0
    checkpoints = checkpoint.Checkpoints(
        workdir,
        every_steps=config.checkpoint_every_steps,
        keep=config.checkpoint_keep,
        keep_every_steps=config.checkpoint_keep_every_steps,
    )
    resume_step = checkpoints.latest_step()
    progress = Progress(numbers.total_steps, first_step=resume_step or 0, console=console)
    report = progress.print if first else (lambda message: None)
    describe(report, config, numbers, workdir, resume_step)
    params = jax.jit(functools.partial(init_params, recipe.model))(jax.random.key(config.seed))
    if config.init_from and resume_step is None:
        params, loaded = init_from(params, config.init_from, config.init_parts)
        report(loaded)
    state = jax.jit(functools.partial(create_state, recipe.model, recipe.optimizer))(params)
    if resume_step is not None:
        state = checkpoints.restore(state)
    state = parallel.replicate(state, config.parallel)
    del params

    # 3. Baselines, once.
    writer = MetricWriter(workdir, resume_step=resume_step, enabled=first)
    results: list[Result] = []

    def record(result: Result, step: int) -> None:
        results.append(result)
        writer.write(step, result.scalars())
        report(f"step {step}: {result.evaluation} of {result.subject}: {result}")

    if config.knn_baselines and resume_step is None:
        for evaluator in online:
            for result in (*evaluator.baselines(), evaluator(state.teacher, 0)):
                record(result, 0)

    # 4. The loop. Steps are dispatched ahead of the devices; at most two wait there.
    step = parallel.lift(recipe.step, config.parallel, donate=True)
    start = done = resume_step or 0
    batches = train_batches(
        source,
        batch_size=config.batch_size,
        canvas_size=config.data.canvas_size,
        seed=config.seed,
        start_step=start,
        num_workers=config.data.num_workers,
        num_threads=config.data.num_threads,
        max_bad_records=config.data.max_bad_records,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    spread = jax.jit(feature_spread)
    shown_warnings: set[str] = set()
    last: dict[str, float] = {}
    clock, logged = StepClock(), start
    in_flight: collections.deque[TriedStep] = collections.deque()
    with closing(checkpoints), closing(batches), writer, progress, stop_on_signal() as stopping:
        for i in range(start, numbers.total_steps):
            with clock.waiting_for_data():
                batch = next(batches)
            state, scalars, features = step(state, parallel.shard(model_inputs(batch)))
            in_flight.append(TriedStep(i, scalars, batch))
            if len(in_flight) > 2:
                stop_if_bad(config, workdir, state, in_flight.popleft(), report)
            if i == start:  # the clock is to measure steps, not compilation
                jax.block_until_ready(scalars)
                clock.restart()
                logged = start + 1
            done = i + 1
            progress.advance(done)

            if done % config.log_every_steps == 0 or done == numbers.total_steps:
                last = {name: float(x) for name, x in (scalars | spread(features)).items()}
                last |= {name: float(value(i)) for name, value in recipe.schedules.items()}
                if done > logged:
                    last |= clock.report((done - logged) * config.batch_size)
                    progress.update(done, last)
                logged = done
                writer.write(done, last)
                warning = collapse_warning(last, num_prototypes=config.head.num_prototypes)
                if warning and done > numbers.warmup_steps and warning not in shown_warnings:
                    shown_warnings.add(warning)
                    report("warning: " + warning)
            for evaluator in online:
                if evaluator.due(done):
                    record(evaluator(state.teacher, done), done)
                    clock.restart()
                    logged = done
            checkpoints.save(done, state, force=done == numbers.total_steps or bool(stopping))
            if stopping:
                report(f"stopped by a signal after step {done}; start it again to go on from there")
                break
        while in_flight:
            stop_if_bad(config, workdir, state, in_flight.popleft(), report)
    return TrainResult(workdir, done, last, results)


def model_inputs(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What of a host batch the step reads: no labels."""
    return {"canvas": batch["canvas"], "size": batch["size"]}


def feature_spread(features: jax.Array) -> dict[str, jax.Array]:
    """The collapse monitors of view features f32[n, d] of n images."""
    return {
        "feature_std": feature_std(features=features),
        "feature_rank": effective_rank(features=features),
    }


def check_workdir(workdir: str, config: ConfigDict, numbers: RunNumbers) -> None:
    """Refuses a workdir of another run; writes the config of a new one.

    Raises:
      UserError: lists what differs in what the model or the schedules are made of.
    """
    facts = dataclasses.asdict(numbers)
    del facts["images_per_device"]  # may differ: the number of devices is free
    found = checkpoint.read_config(workdir)
    if found and checkpoint.has_checkpoint(workdir):
        old_config, old_facts = found
        if "steps_per_epoch" not in old_facts:
            raise UserError(
                f"{workdir} is a converted checkpoint: give another --workdir, and "
                f"--config.init_from={workdir}"
            )
        changes = differences(old_config, config) + [
            f"{name} was {old_facts[name]} and is {facts[name]} now"
            for name in ("num_images", "total_steps", "steps_per_epoch")
            if old_facts[name] != facts[name]
        ]
        if changes:
            raise UserError(
                f"{workdir} holds another run; take another --workdir or undo: "
                + "; ".join(changes)
            )
    if jax.process_index() == 0:
        checkpoint.write_config(workdir, config, facts)


class TriedStep(NamedTuple):
    """A step that was dispatched, and whose outcome nobody has looked at.

    Attributes:
      step: steps before it.
      scalars: of the devices.
      batch: on the host.
    """

    step: int
    scalars: Mapping[str, jax.Array]
    batch: dict[str, np.ndarray]


def stop_if_bad(
    config: ConfigDict,
    workdir: str,
    state: TrainState,
    tried: TriedStep,
    report: Callable[[str], None],
) -> None:
    """Waits for a step, reports it if it was skipped, and ends a run of too many of them.

    Raises:
      RunError: `config.max_bad_steps` steps in a row were not finite. The state and the step's
        images lie in workdir/bad_step; views follow from config.seed and the step.
    """
    bad_steps = int(tried.scalars["bad_steps"])
    if not bad_steps:
        return
    numbers = {name: float(value) for name, value in tried.scalars.items()}
    report(f"step {tried.step + 1} is not finite and was skipped (loss {numbers['loss']})")
    if bad_steps < config.max_bad_steps:
        return
    directory = Path(workdir) / "bad_step"
    directory.mkdir(exist_ok=True)
    if jax.process_index() == 0:
        np.savez(directory / "batch.npz", allow_pickle=False, **tried.batch)
        facts = {"step": tried.step} | numbers
        (directory / "scalars.json").write_text(json.dumps(facts, indent=1))
        checkpoint.write_config(directory, config, {})
    with closing(checkpoint.Checkpoints(str(directory))) as checkpoints:
        checkpoints.save(tried.step, state, force=True)
    raise RunError(
        f"{bad_steps} losses in a row were not finite (config.max_bad_steps); the last batch and "
        f"the state are in {directory}; start a new workdir with a lower "
        "config.optimizer.learning_rate or config.optimizer.clip_norm, or config.dtype=float32, "
        f"and config.init_from={workdir} to keep what was learned before"
    )


@contextmanager
def stop_on_signal() -> Iterator[list[int]]:
    """A list that gets an entry on SIGTERM (preemption) or Ctrl-C; a second Ctrl-C is heeded."""
    received: list[int] = []

    def remember(number: int, frame: Any) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        old = {s: signal.signal(s, remember) for s in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread (a notebook's): signals stay as they are
        old = {}
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def describe(
    report: Callable[[str], None],
    config: ConfigDict,
    numbers: RunNumbers,
    workdir: str,
    resume_step: int | None,
) -> None:
    """Says what is about to happen."""
    devices = jax.devices()
    report(
        f"{config.backbone.name} on {config.data.name} {config.data.train_split}: "
        f"{numbers.num_images} images, {numbers.total_steps} steps of {config.batch_size} "
        f"({numbers.total_steps / numbers.steps_per_epoch:.3g} epochs), {len(devices)} "
        f"{devices[0].platform} device(s), {config.dtype}"
    )
    if numbers.warmup_steps >= numbers.total_steps:
        report(
            f"note: the learning rate still rises at the end: config.optimizer.warmup_epochs is "
            f"{numbers.warmup_steps} steps"
        )
    where = f"from step {resume_step}" if resume_step is not None else "new"
    report(f"workdir {workdir} ({where})")
    if resume_step == numbers.total_steps:
        report("it has taken all its steps; there is nothing to train")
