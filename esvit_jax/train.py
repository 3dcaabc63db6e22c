"""Training: `train(config, workdir)`, read from top to bottom."""

import argparse
import collections
import dataclasses
import functools
import json
import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from rich.console import Console

from esvit_jax import checkpoint, metrics, optim, parallel, steps
from esvit_jax.analyze.summary import draw_figures, knn_summary
from esvit_jax.config import ConfigDict, RunNumbers, differences, parse_config, resolve
from esvit_jax.data.augment import augment
from esvit_jax.data.loader import train_batches
from esvit_jax.data.sources import open_source
from esvit_jax.errors import UserError
from esvit_jax.evaluate.monitor import Evaluation, in_words
from esvit_jax.interop.initialize import init_from
from esvit_jax.models import EsViT, create_model
from esvit_jax.state import TrainState, create_state, init_params


def build(config: ConfigDict, numbers: RunNumbers) -> tuple[EsViT, Any, Any, dict[str, Any]]:
    """The network, the optimiser chain and the step that a config describes.

    Returns:
      model, optimizer, step (for one device; see `steps.train_step`), and the schedules by name.
    """
    c, n = config.optimizer, numbers
    schedules = {
        "learning_rate": optim.warmup_cosine_schedule(
            n.peak_learning_rate, c.min_learning_rate, n.warmup_steps, n.total_steps
        ),
        "weight_decay": optim.cosine_schedule(c.weight_decay, c.final_weight_decay, n.total_steps),
        "teacher_momentum": optim.cosine_schedule(
            c.teacher_momentum, c.final_teacher_momentum, n.total_steps
        ),
        "teacher_temp": optim.epoch_line_schedule(
            config.loss.warmup_teacher_temp,
            config.loss.teacher_temp,
            config.loss.warmup_teacher_temp_epochs,
            n.steps_per_epoch,
        ),
    }
    model = create_model(config)
    optimizer = optim.build_optimizer(
        name=c.name,
        learning_rate=schedules["learning_rate"],
        weight_decay=schedules["weight_decay"],
        teacher_momentum=schedules["teacher_momentum"],
        clip_norm=c.clip_norm,
        freeze_prototypes_steps=n.freeze_prototypes_steps,
        norm_last_layer=config.head.norm_last_layer,
    )
    views = config.views
    step = functools.partial(
        steps.train_step,
        model=model,
        optimizer=optimizer,
        make_views=lambda keys, batch: augment(keys, batch["canvas"], batch["size"], views),
        teacher_temp=schedules["teacher_temp"],
        center_momentum=config.loss.center_momentum,
        seed=config.seed,
        accum_steps=config.accum_steps,
        student_temp=config.loss.student_temp,
        chunk=config.loss.prototype_chunk,
        dtype=jnp.dtype(config.dtype),
    )
    return model, optimizer, step, schedules


def train(config: ConfigDict, workdir: str, console: Any = None) -> dict[str, float]:
    """Trains until `total_steps`, from the newest checkpoint in `workdir` if there is one.

    Args:
      config: see `config.default_config`.
      workdir: where checkpoints, metrics and figures go.
      console: a rich console to report to; None is standard output.

    Returns:
      The last scalars, k-NN accuracies among them.

    Raises:
      UserError: something in the config, the data or the workdir that cannot work; before
        anything is compiled where that can be known.
    """
    # 1. What is trained on, and whether all of it fits together.
    source = open_source(config.data.name, config.data.train_split, config.data.data_dir or None)
    numbers = resolve(config, num_images=len(source), num_devices=jax.device_count())
    check_workdir(workdir, config, numbers)
    evaluation = Evaluation(config, source) if config.knn_every_steps else None
    model, optimizer, step, schedules = build(config, numbers)

    # 2. The state: the newest checkpoint's, or a new one.
    first = jax.process_index() == 0
    checkpoints = checkpoint.Checkpoints(
        workdir,
        every_steps=config.checkpoint_every_steps,
        keep=config.checkpoint_keep,
        keep_every_steps=config.checkpoint_keep_every_steps,
    )
    resume_step = checkpoints.latest_step()
    progress = metrics.Progress(numbers.total_steps, first_step=resume_step or 0, console=console)
    say = progress.print if first else (lambda message: None)
    describe(say, config, numbers, workdir, resume_step)
    params = jax.jit(functools.partial(init_params, model))(jax.random.key(config.seed))
    if config.init_from and resume_step is None:
        params, report = init_from(params, config.init_from, config.init_parts)
        say(report)
    state = jax.jit(functools.partial(create_state, model, optimizer))(params)
    if resume_step is not None:
        state = checkpoints.restore(state)
    state = parallel.replicate(state, config.parallel)
    del params

    # 3. Baselines, once.
    writer = metrics.MetricWriter(workdir, resume_step=resume_step, enabled=first)
    last = {}
    if evaluation and config.knn_baselines and resume_step is None:
        pixels = evaluation.raw_pixels()
        last = evaluation.knn(state.teacher)
        say("k-NN of raw pixels:  " + in_words(pixels))
        say("k-NN before training: " + in_words(last))
        writer.write(0, last | {f"raw_pixels/{name}": value for name, value in pixels.items()})

    # 4. The loop. Steps are dispatched ahead of the devices; at most two wait there.
    lifted = parallel.lift(step, config.parallel, donate=True)
    start = resume_step or 0
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
    shown_warnings = set()
    clock, logged = metrics.StepClock(), start
    in_flight = collections.deque()
    with closing(checkpoints), closing(batches), writer, progress, stop_on_signal() as stopping:
        for i in range(start, numbers.total_steps):
            with clock.waiting_for_data():
                batch = next(batches)
            state, scalars, features = lifted(state, parallel.shard(model_inputs(batch)))
            in_flight.append((i, scalars, batch))
            if len(in_flight) > 2:
                stop_if_bad(config, workdir, state, in_flight.popleft(), say)
            if i == start:  # the clock is to measure steps, not compilation
                jax.block_until_ready(scalars)
                clock.restart()
                logged = start + 1
            done = i + 1
            progress.advance(done)

            if done % config.log_every_steps == 0 or done == numbers.total_steps:
                scalars = {k: float(v) for k, v in (scalars | spread(features)).items()}
                scalars |= {name: float(value(i)) for name, value in schedules.items()}
                if done > logged:
                    scalars |= clock.report((done - logged) * config.batch_size)
                    progress.update(done, scalars)
                logged = done
                writer.write(done, scalars)
                last |= scalars
                warning = metrics.collapse_warning(
                    scalars, num_prototypes=config.head.num_prototypes
                )
                if warning and done > numbers.warmup_steps and warning not in shown_warnings:
                    shown_warnings.add(warning)
                    say("warning: " + warning)
            if evaluation and (done % config.knn_every_steps == 0 or done == numbers.total_steps):
                accuracy = evaluation.knn(state.teacher)
                last |= accuracy
                writer.write(done, accuracy)
                say(f"step {done}: k-NN top-1 " + in_words(accuracy))
                clock.restart()
                logged = done
            checkpoints.save(done, state, force=done == numbers.total_steps or bool(stopping))
            if stopping:
                say(f"stopped by a signal after step {done}; start it again to go on from there")
                break
        while in_flight:
            stop_if_bad(config, workdir, state, in_flight.popleft(), say)
    return last


def model_inputs(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What of a host batch the step reads: no labels."""
    return {"canvas": batch["canvas"], "size": batch["size"]}


def feature_spread(features: jax.Array) -> dict[str, jax.Array]:
    """The collapse monitors of view features f32[n, d] of n images."""
    return {
        "feature_std": metrics.feature_std(features=features),
        "feature_rank": metrics.effective_rank(features=features),
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


def stop_if_bad(
    config: ConfigDict,
    workdir: str,
    state: TrainState,
    tried: tuple[int, dict[str, Any], dict[str, np.ndarray]],
    say: Any,
) -> None:
    """Waits for a step, reports it if it was skipped, and ends a run of too many of them.

    Args:
      config, workdir, state: of the run.
      tried: step, its scalars, its batch on the host.
      say: prints a message.

    Raises:
      UserError: `config.max_bad_steps` steps in a row were not finite. The state and the step's
        images lie in workdir/bad_step; views follow from config.seed and the step.
    """
    step, scalars, batch = tried
    bad_steps = int(scalars["bad_steps"])
    if not bad_steps:
        return
    numbers = {name: float(value) for name, value in scalars.items()}
    say(f"step {step + 1} is not finite and was skipped (loss {numbers['loss']})")
    if bad_steps < config.max_bad_steps:
        return
    directory = Path(workdir) / "bad_step"
    directory.mkdir(exist_ok=True)
    if jax.process_index() == 0:
        np.savez(directory / "batch.npz", allow_pickle=False, **batch)
        (directory / "scalars.json").write_text(json.dumps({"step": step} | numbers, indent=1))
        checkpoint.write_config(directory, config, {})
    checkpoints = checkpoint.Checkpoints(str(directory))
    checkpoints.save(step, state, force=True)
    checkpoints.close()
    raise UserError(
        f"{bad_steps} losses in a row were not finite (config.max_bad_steps); the last batch and "
        f"the state are in {directory}; try a lower config.optimizer.learning_rate or "
        "config.optimizer.clip_norm, or config.dtype=float32"
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
    say: Any, config: ConfigDict, numbers: RunNumbers, workdir: str, resume_step: int | None
) -> None:
    """Says what is about to happen."""
    devices = jax.devices()
    say(
        f"{config.backbone.name} on {config.data.name} {config.data.train_split}: "
        f"{numbers.num_images} images, {numbers.total_steps} steps of {config.batch_size} "
        f"({numbers.total_steps / numbers.steps_per_epoch:.3g} epochs), {len(devices)} "
        f"{devices[0].platform} device(s), {config.dtype}"
    )
    if numbers.warmup_steps >= numbers.total_steps:
        say(
            f"note: the learning rate still rises at the end: config.optimizer.warmup_epochs is "
            f"{numbers.warmup_steps} steps"
        )
    where = f"from step {resume_step}" if resume_step is not None else "new"
    say(f"workdir {workdir} ({where})")
    if resume_step == numbers.total_steps:
        say("it has taken all its steps; there is nothing to train")


def main(argv: list[str]) -> None:
    """`esvit train`."""
    parser = argparse.ArgumentParser(
        prog="esvit train",
        description="Trains a backbone, or goes on with a run that was interrupted.",
        epilog="--config=FILE[:arguments] and --config.field=value describe the run.",
    )
    parser.add_argument("--workdir", required=True, help="where the run is kept")
    parser.add_argument(
        "--distributed", action="store_true", help="connect the processes of several hosts first"
    )
    if "-h" in argv or "--help" in argv:
        parser.parse_args(argv)
    config, rest = parse_config(argv)
    arguments = parser.parse_args(rest)
    logging.set_verbosity(logging.WARNING)
    if "://" in arguments.workdir:
        raise UserError(f"--workdir={arguments.workdir} is remote: mount the bucket as a folder")
    if arguments.distributed:
        parallel.start_distributed()
    train(config, arguments.workdir)
    if jax.process_index() == 0:
        if table := knn_summary(arguments.workdir):
            Console().print(table)
        loss, views = draw_figures(config, arguments.workdir)
        print(f"the loss: {loss}\nthe views of one image: {views}")
