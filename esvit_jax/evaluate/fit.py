"""Training on labels: the loop that linear probes and fine-tuning share."""

import collections
import dataclasses
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Key

from esvit_jax import parallel
from esvit_jax.checkpoint import Checkpoints
from esvit_jax.config import ConfigDict
from esvit_jax.data.augment import random_view
from esvit_jax.data.loader import train_batches
from esvit_jax.data.sources import Source
from esvit_jax.errors import UserError, renamed
from esvit_jax.runlog.clock import StepClock
from esvit_jax.runlog.progress import Progress
from esvit_jax.runlog.signals import Interrupted, StopSignals, in_thread
from esvit_jax.state import ClassifierState

CROP_SCALE, CROP_RATIO, FLIP = (0.08, 1.0), (3 / 4, 4 / 3), 0.5
Step = Callable[[ClassifierState, Any], tuple[ClassifierState, dict[str, Any]]]


def _nothing(done: int, state: ClassifierState, numbers: dict[str, float] | None) -> bool:
    return False


@dataclasses.dataclass(frozen=True)
class Fit:
    """How a classifier is trained.

    Attributes:
      config: of the network's run: how data are read, how steps reach the devices, the seed.
      source: to train on.
      batch_size: images a step, over all devices and processes.
      total_steps: of all starts.
      checkpoints: where it is kept, and gone on from.
      progress: what one sees of it.
      signals: that stop it.
      numbers: (steps done, scalars of the last one) -> what is shown of them, with "loss"; it may
        refuse to go on. Asked after the first step, then every `config.log_every_steps`, and after
        the last.
      after_step: (steps done, state, the numbers every so many steps, else None) -> whether that
        took time which is not the steps'; called after every step, before it is saved, and after
        that which an earlier start took last.
    """

    config: ConfigDict
    source: Source
    batch_size: int
    total_steps: int
    checkpoints: Checkpoints
    progress: Progress
    signals: StopSignals
    numbers: Callable[[int, Mapping[str, Any]], dict[str, float]]
    after_step: Callable[[int, ClassifierState, dict[str, float] | None], bool] = _nothing

    @property
    def start(self) -> int:
        """Steps that earlier starts have taken."""
        return self.checkpoints.latest_step() or 0

    def run(self, step: Step, state: ClassifierState) -> ClassifierState:
        """Takes the steps that are left.

        Args:
          step: see `steps.classifier_step`.
          state: before the first step of all.

        Returns:
          The state after the last one.

        Raises:
          Interrupted: a signal came; what was trained is kept.
          UserError: an image has no label, or too many cannot be read.
        """
        start, mode = self.start, step_mode(self.config)
        if self.checkpoints.latest_step() is not None:
            state = self.checkpoints.restore(state)
            self.progress.print(f"going on from step {start} of {self.total_steps}")
        state = parallel.replicate(state, mode)
        if start:  # perhaps it was stopped in the midst of that
            self.after_step(start, state, None)
        if self.signals.received:
            raise self._stopped(start)
        if start == self.total_steps:
            return state
        on_devices = parallel.on_all_devices(step, mode, donate=True)
        anywhere = parallel.Anywhere(mode)
        in_flight: collections.deque[Mapping[str, Any]] = collections.deque()
        clock, timed_from = StepClock(), start + 1
        with closing(self._batches(start)) as batches:
            with self.signals.raising(f"nothing was trained after step {start}; start it again"):
                with self.progress.busy("reading the first images"):
                    batch = next(batches)
                with self.progress.busy("compiling the step"):
                    in_thread(on_devices.lower(state, parallel.shard(batch)).compile)
            for done in range(start + 1, self.total_steps + 1):
                with clock.waiting_for_data():
                    batch = batch if done == start + 1 else next(batches)
                state, scalars = on_devices(state, parallel.shard(batch))
                in_flight.append(scalars)
                if len(in_flight) > 2:  # so many steps wait on the devices
                    jax.block_until_ready(in_flight.popleft())
                self.progress.advance(done)
                numbers, last = None, done == self.total_steps
                due = last or done % self.config.log_every_steps == 0
                if due or done == start + 1:
                    numbers = self.numbers(done, scalars)
                if numbers and done == start + 1:  # whose time is mostly not a step's
                    self.progress.first(done, numbers["loss"])
                    clock.restart()
                elif numbers:
                    pace = clock.report((done - timed_from) * self.batch_size)
                    self.progress.update(done, numbers | pace)
                    timed_from = done
                if self.after_step(done, state, numbers if due else None):
                    clock.restart()
                    timed_from = done
                stopping = anywhere(self.signals.received)
                if stopping:
                    self.numbers(done, scalars)  # what cannot go on is not kept
                self.checkpoints.save(done, state, force=last or stopping)
                if stopping:
                    raise self._stopped(done)
        return state

    def _stopped(self, done: int) -> Interrupted:
        return Interrupted(
            f"stopped by a signal after step {done} of {self.total_steps}; the same command goes "
            "on from there"
        )

    def _batches(self, start: int) -> Generator[dict[str, np.ndarray], None, None]:
        """This process's share of the batches from a step on, without end."""
        config = self.config
        batches = train_batches(
            self.source,
            batch_size=self.batch_size,
            canvas_size=config.data.canvas_size,
            seed=config.seed,
            start_step=start,
            num_workers=config.data.num_workers,
            num_threads=config.data.num_threads,
            max_bad_records=config.data.max_bad_records,
            max_wait_seconds=config.data.max_wait_seconds,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        with closing(batches), renamed(max_bad_records="config.data.max_bad_records"):
            for batch in batches:
                if (batch["label"] < 0).any():
                    raise UserError(
                        f"{self.source.name} {self.source.split}: some images have no label, and "
                        "training needs one of each"
                    )
                yield batch


def step_mode(config: ConfigDict) -> str:
    """How a step with labels reaches the devices: each of them holds the whole state."""
    return "shard_map" if config.parallel == "fsdp" else config.parallel


def image_size(config: ConfigDict) -> int:
    """Pixels along the side of a classifier's image."""
    return config.evaluate.size or config.views.global_size


def classifier_views(
    config: ConfigDict, keys: Key[Array, " b"], batch: Mapping[str, Array]
) -> Float[Array, "b s s 3"]:
    """Of each canvas a random resized crop, flipped or not, normalised."""
    return random_view(
        keys,
        batch["canvas"],
        batch["size"],
        view_size=image_size(config),
        scale=CROP_SCALE,
        ratio=CROP_RATIO,
        flip=FLIP,
        mean=config.views.mean,
        std=config.views.std,
    )


def check_classes(source: Source, what: str) -> None:
    """Refuses data without classes to tell apart.

    Raises:
      UserError: says what needs them.
    """
    if source.num_classes < 2:
        have = "has one class" if source.num_classes else "has no labels"
        raise UserError(f"{source.name} {source.split} {have}; {what} needs two classes or more")
