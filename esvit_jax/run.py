"""A run that can be started: what is refused before anything is compiled, and its first state."""

import functools
import os
from collections.abc import Generator
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jaxtyping import PyTree
from rich.console import Console

from esvit_jax import checkpoint, parallel, preflight, processes
from esvit_jax.bad_step import Batch
from esvit_jax.bench.peaks import peak_flops
from esvit_jax.config import ConfigDict, RunNumbers, resolve
from esvit_jax.config.fields import FIELDS
from esvit_jax.data.loader import train_batches
from esvit_jax.data.sources import Source, open_source
from esvit_jax.errors import UserError, renamed
from esvit_jax.evaluate.online import Evaluator, evaluators
from esvit_jax.interop.initialize import Start, init_from
from esvit_jax.lock import Lock
from esvit_jax.recipe import Recipe, build
from esvit_jax.runlog.alive import say
from esvit_jax.runlog.log import RunLog
from esvit_jax.runlog.signals import in_thread
from esvit_jax.state import TrainState, create_state, init_params
from esvit_jax.workdir import check_same_run, usable_workdir, write_run_config


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
    start_step: int

    @property
    def first_step(self) -> int:
        """Steps that are behind this start."""
        latest = self.checkpoints.latest_step()
        return self.start_step if latest is None else latest

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
            start_step=self.start_step,
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
    start_step = 0
    _require_source(config)
    if config.init_from and not checkpoint.has_checkpoint(path):
        shapes = jax.eval_shape(functools.partial(init_params, recipe.model), jax.random.key(0))
        start_step = round(started(config, shapes).epochs * numbers.steps_per_epoch)
    if start_step >= numbers.total_steps:
        raise UserError(
            f"it has the {start_step} of this run's {numbers.total_steps} steps behind it; name an "
            "earlier checkpoint with config.init_step",
            argument="config.init_from", value=config.init_from,
        )  # fmt: skip

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
    return Run(config, path, source, numbers, recipe, online, lock, checkpoints, size, start_step)


def first_state(run: Run, log: RunLog) -> TrainState:
    """The newest checkpoint's state or, of a new run, a random or loaded one; on all devices."""
    config, recipe = run.config, run.recipe
    create = functools.partial(create_state, recipe.model, recipe.optimizer)

    def init(key: jax.Array) -> PyTree:
        return init_params(recipe.model, jax.random.wrap_key_data(key))

    key = np.asarray(jax.random.key_data(jax.random.key(config.seed)))  # alike in all processes
    shapes = jax.eval_shape(lambda key: create(init(key), init(key), {}), key)
    shapes = parallel.laid_out(shapes, config.parallel)
    if run.checkpoints.latest_step() is not None:
        with log.busy("reading the checkpoint", "checkpoint"):
            return parallel.replicate(run.checkpoints.restore(shapes), config.parallel)

    shardings = jax.tree.map(lambda x: x.sharding, shapes)
    jitted = jax.jit(init, out_shardings=shardings.params)
    params = compiled(jitted, key, what="the initialisation", log=log)(key)
    teacher, centers = params, {}
    if config.init_from:
        start = started(config, params)
        log.say(start.report)
        params, teacher = (
            jax.tree.map(parallel.place, x, shardings.params)
            for x in (start.student, start.teacher)
        )
        centers = {
            name: parallel.place(x, shardings.centers[name]) for name, x in start.centers.items()
        }
    create = functools.partial(create, step=run.start_step)
    state = jax.jit(create, out_shardings=shardings)(params, teacher, centers)
    return parallel.replicate(state, config.parallel)


def _require_source(config: ConfigDict) -> None:
    """Refuses fields that say what is taken from `config.init_from` where that is empty.

    Recipes set them for whoever names a run; a config alone may have them.

    Raises:
      UserError: names the field.
    """
    for name in ("init_parts", "init_step"):
        if not config.init_from and config[name] != FIELDS[name].default:
            raise UserError(
                "name the run to begin from in config.init_from", argument=f"config.{name}",
                value=config[name],
            )  # fmt: skip


def started(config: ConfigDict, params: PyTree) -> Start:
    """What `config.init_from` gives a new run of such params."""
    names = {name: f"config.{name}" for name in ("init_from", "init_parts", "init_step")}
    with renamed(**names):
        return init_from(params, config.init_from, config.init_parts, config.init_step)


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
