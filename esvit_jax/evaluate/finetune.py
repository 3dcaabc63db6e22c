"""Fine-tuning: a backbone and a linear head are trained on labels, from what is there or anew."""

import dataclasses
import functools
import math
import os
from collections.abc import Mapping
from contextlib import closing
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jaxtyping import PyTree
from rich.console import Console

from esvit_jax import buckets, optim, steps
from esvit_jax.checkpoint import Checkpoints
from esvit_jax.config import ConfigDict, differences
from esvit_jax.config_file import read_config, write_config
from esvit_jax.data.holdout import sample
from esvit_jax.data.sources import Source
from esvit_jax.errors import RunError, UserError, full_disk_in_words
from esvit_jax.evaluate.accuracy import Classifiers, label_ranks
from esvit_jax.evaluate.features import evaluation_images, fitting_batch_size, params_sha1
from esvit_jax.evaluate.fit import Fit, check_classes, image_size
from esvit_jax.evaluate.result import Result, results_of_lines
from esvit_jax.evaluate.sweep import INIT_STD, head_logits
from esvit_jax.evaluate.tuning import Tuning, finetune_loss, finetune_optimizer
from esvit_jax.lock import Lock
from esvit_jax.models import create_model
from esvit_jax.runlog.progress import Progress
from esvit_jax.runlog.signals import StopSignals
from esvit_jax.runlog.writer import MetricWriter, read_metrics
from esvit_jax.state import ClassifierState
from esvit_jax.workdir import usable_workdir

CLASSIFIER = "classifier.npz"


class FinetuneResult(NamedTuple):
    """What fine-tuning came to.

    Attributes:
      workdir: where the backbone is, for `esvit_jax.load`, and the classifier.
      result: of the last epoch: top1/test, top5/test, and of a sample of the training split, as
        large as the test split, top1/train and top5/train; percent.
      step: steps behind it.
    """

    workdir: str
    result: Result
    step: int


def finetune(
    workdir: str | os.PathLike[str],
    config: ConfigDict,
    train: Source,
    test: Source,
    *,
    backbone: PyTree | None = None,
    source: str = "random",
    tuning: Tuning | None = None,
    console: Console | None = None,
) -> FinetuneResult:
    """Trains a backbone and a linear head on its view features, and tests both every epoch.

    A run that was stopped goes on from its newest checkpoint and comes to the same numbers. The
    workdir is one of a converted backbone: what takes those (`esvit_jax.load`, `esvit knn`, `esvit
    export`) takes it. Beside it lie metrics.jsonl, TensorBoard, and classifier.npz: kernel f32[d,
    c], bias f32[c] and class_names; view features @ kernel + bias are the logits.

    Args:
      workdir: of this run alone, local or gs://.
      config: the network, its views, and how data are read; see `default_config`. The drop path's
        rate is `config.backbone.drop_path_rate`.
      train, test: splits of the same classes.
      backbone: params to start from; None for random ones.
      source: in words, where they come from; it is kept in config.json.
      tuning: how; None is the default.
      console: to report to; None is standard output.

    Raises:
      UserError: an argument that cannot be; images without a label; the workdir holds something
        else, or cannot be written to.
      RunError: the loss is not finite; as `Interrupted`: a signal came.
    """
    tuning = tuning or Tuning()
    tuning.check()
    check_classes(train, "fine-tuning")
    first = jax.process_index() == 0
    console = (console or Console()) if first else Console(quiet=True)
    run = _Finetune(config, train, test, backbone, tuning)
    path = usable_workdir(workdir)
    origin = {"parts": "backbone", "source": source, "finetune": run.facts()}
    with buckets.reaching(path), full_disk_in_words():
        _check_same(path, run.config, origin)
        with closing(Lock(path, config.lock_seconds, enabled=first)):
            if first:
                write_config(path, run.config, origin)
            checkpoints = Checkpoints(
                str(path), every_steps=run.steps_per_epoch, keep=config.checkpoint_keep
            )
            writer = MetricWriter(
                path, resume_step=checkpoints.latest_step(), enabled=first, report=console.print
            )
            metrics = path / "metrics.jsonl"
            earlier = results_of_lines(read_metrics(metrics) if metrics.exists() else [])
            with closing(checkpoints), writer, StopSignals() as signals:
                state, result = run.train(checkpoints, writer, signals, console, earlier)
            if first:
                _write_classifier(path, state.params["head"], train.class_names)
    return FinetuneResult(str(path), result, run.total_steps)


class _Finetune:
    """A network, the data, and how it is trained on them."""

    def __init__(
        self,
        config: ConfigDict,
        train: Source,
        test: Source,
        backbone: PyTree | None,
        tuning: Tuning,
    ):
        self.config = config.copy_and_resolve_references()
        self.config.data.name = train.name
        self.config.data.train_split, self.config.data.test_split = train.split, test.split
        self._backbone, self._given, self._tuning = create_model(config).backbone, backbone, tuning
        self._train, self._test = train, test
        self._seen = sample(train, len(test))
        self.batch_size = fitting_batch_size(tuning.batch_size, [len(train)], jax.device_count())
        self.steps_per_epoch = max(1, len(train) // self.batch_size)
        self.total_steps = max(1, round(tuning.epochs * self.steps_per_epoch))
        self._schedule = optim.warmup_cosine_schedule(
            tuning.learning_rate * self.batch_size / 256,
            tuning.min_learning_rate,
            round(tuning.warmup_epochs * self.steps_per_epoch),
            self.total_steps,
        )

        def ranks(params, batch):
            images = evaluation_images(self.config, batch)
            features = self._backbone.forward(params["backbone"], images).view_features
            return {"": label_ranks(head_logits(params["head"], features), batch["label"])[:, None]}

        self._classifiers = Classifiers(ranks, self.config, self._seen, test)

    def facts(self) -> dict[str, Any]:
        """What must stay as it was for a run to go on."""
        return dataclasses.asdict(self._tuning) | {
            "batch_size": self.batch_size,
            "train_images": len(self._train),
            "class_names": list(self._train.class_names),
            "started_from": "random" if self._given is None else params_sha1(self._given),
        }

    def train(
        self,
        checkpoints: Checkpoints,
        writer: MetricWriter,
        signals: StopSignals,
        console: Console,
        results: list[Result],
    ) -> tuple[ClassifierState, Result]:
        """The trained state, and what it reaches; `results` are those of earlier starts."""
        start = checkpoints.latest_step() or 0
        with Progress(self.total_steps, first_step=start, console=console) as progress:
            progress.print(
                f"{len(self._train):,} images of {self._train.num_classes} classes, "
                f"{self.total_steps:,} steps of {self.batch_size}"
            )
            with progress.busy("making the first state"):
                optimizer = finetune_optimizer(self._backbone, self._tuning, self._schedule)
                state = self._first_state(optimizer)

            def after_step(
                done: int, state: ClassifierState, numbers: dict[str, float] | None
            ) -> bool:
                if numbers:
                    rate = float(self._schedule(done - 1))
                    writer.write(done, numbers | {"learning_rate": rate})
                epoch_ends = done % self.steps_per_epoch == 0 or done == self.total_steps
                if not epoch_ends or done in [result.step for result in results]:
                    return False
                # Alone, nobody waits for what is broken off; the next start makes up for it.
                alone = jax.process_count() == 1
                with signals.breaking_off(alone), progress.busy(f"evaluating at step {done}"):
                    results.append(self._evaluate(done, state))
                    progress.print(f"step {done}: {results[-1]}")
                    writer.write(done, results[-1].scalars())
                    writer.flush()
                return True

            step = functools.partial(
                steps.classifier_step,
                loss_of=finetune_loss(self._backbone, self.config, self._tuning),
                optimizer=optimizer,
                seed=self.config.seed,
            )
            state = Fit(
                self.config, self._train, self.batch_size, self.total_steps, checkpoints, progress,
                signals, finite_loss, after_step,
            ).run(step, state)  # fmt: skip
            if start == self.total_steps:
                progress.print("it has taken all its steps; there is nothing left to train")
        return state, results[-1]

    def _first_state(self, optimizer: optax.GradientTransformation) -> ClassifierState:
        init_key, head_key = jax.random.split(jax.random.key(self.config.seed))
        if self._given is None:
            size = image_size(self.config)
            images = jnp.zeros((1, size, size, 3))
            backbone = jax.jit(self._backbone.init)(init_key, images)["params"]
        else:
            backbone = jax.tree.map(jnp.copy, self._given)  # steps reuse its memory
        shape = self._backbone.num_features, self._train.num_classes
        head = {
            "kernel": INIT_STD * jax.random.normal(head_key, shape),
            "bias": jnp.zeros(shape[1]),
        }
        params = {"backbone": backbone, "head": head}
        return ClassifierState(jnp.zeros((), jnp.int32), params, optimizer.init(params), {})

    def _evaluate(self, done: int, state: ClassifierState) -> Result:
        """Top-1 and top-5 on the centres of the test images, and of as many training images."""
        values = {}
        for name, source in (("test", self._test), ("train", self._seen)):
            found, _ = self._classifiers.accuracies(state.params, source, Console(quiet=True))
            ((accuracy,),) = found.values()
            values |= {f"top1/{name}": accuracy.top1, f"top5/{name}": accuracy.top5}
        return Result("finetune", values, step=done)


def finite_loss(done: int, scalars: Mapping[str, Any]) -> dict[str, float]:
    """The loss of a step.

    Raises:
      RunError: it is not finite.
    """
    loss = float(scalars["loss"])
    if not math.isfinite(loss):
        raise RunError(
            f"step {done}: the loss is not finite; take another workdir and a lower learning rate"
        )
    return {"loss": loss}


def _check_same(workdir: epath.Path, config: ConfigDict, origin: Mapping[str, Any]) -> None:
    """Refuses a folder that holds something else.

    Raises:
      UserError: lists what differs.
    """
    found = read_config(workdir)
    if found is None:
        return
    old_config, old_origin = found
    if "finetune" not in old_origin:
        raise UserError(
            "it holds another run; give a folder of its own", argument="workdir", value=str(workdir)
        )
    old, new = old_origin["finetune"], origin["finetune"]
    changes = differences(old_config, config) + [
        f"{name} was {old.get(name)!r} and is {x!r} now"
        for name, x in new.items()
        if old.get(name) != x
    ]
    if changes:
        raise UserError(
            f"it holds another run: {'; '.join(changes)}. Set it back, or give another folder",
            argument="workdir", value=str(workdir),
        )  # fmt: skip


def _write_classifier(
    workdir: epath.Path, head: Mapping[str, Any], class_names: tuple[str, ...]
) -> None:
    with (workdir / CLASSIFIER).open("wb") as file:
        np.savez(
            file,
            allow_pickle=False,
            kernel=np.asarray(head["kernel"]),
            bias=np.asarray(head["bias"]),
            class_names=np.array(class_names),
        )
