"""Linear probe: linear classifiers on a frozen backbone, by the published protocol."""

import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, PyTree
from rich.console import Console
from rich.table import Table

from esvit_jax import buckets, steps
from esvit_jax.checkpoint import Checkpoints, LoadedModel
from esvit_jax.config import ConfigDict
from esvit_jax.data.holdout import hold_out
from esvit_jax.data.sources import Source
from esvit_jax.errors import RunError, UserError
from esvit_jax.evaluate.accuracy import Accuracy, Classifiers
from esvit_jax.evaluate.features import evaluation_images, fitting_batch_size, params_sha1
from esvit_jax.evaluate.fit import (
    Fit,
    check_classes,
    classifier_views,
    image_size,
)
from esvit_jax.evaluate.result import Result
from esvit_jax.evaluate.sweep import (
    Head,
    Sweep,
    block_features,
    head_losses,
    head_ranks,
    init_heads,
    sweep_optimizer,
)
from esvit_jax.models import Backbone
from esvit_jax.runlog.alive import say
from esvit_jax.runlog.progress import Progress
from esvit_jax.runlog.signals import StopSignals
from esvit_jax.state import ClassifierState

EPOCHS, BATCH_SIZE = 100, 1024
# Steps between two checkpoints where an epoch has fewer.
SAVE_STEPS = 100
DIVERGED = "the network diverged, evaluate an earlier checkpoint"


class LinearProbe(NamedTuple):
    """What a linear probe came to.

    Attributes:
      result: the picked head on the test split: top1, top5.
      picked: of all heads the best on the held-out part; of equals the first of `held_out`.
      held_out: what each head reaches on the held-out part, by which one is picked.
      batch_size: images a step, which scales the learning rates.
      images: that were trained on (readable or not), held out, and in the test split; the latter
        two as far as they can be read.
    """

    result: Result
    picked: Head
    held_out: dict[Head, Accuracy]
    batch_size: int
    images: tuple[int, int, int]

    def json(self) -> dict[str, Any]:
        """All of it, as JSON holds it."""
        sweep = [head._asdict() | accuracy._asdict() for head, accuracy in self.held_out.items()]
        return {
            "batch_size": self.batch_size,
            "held_out_images": self.images[1],
            "sweep": sweep,
            "picked": self.picked._asdict(),
            **self.result.values,
        }


def linear_probe(
    loaded: LoadedModel,
    train: Source,
    test: Source,
    *,
    keep_in: str | os.PathLike[str],
    key: str | None = None,
    sweep: Sweep | None = None,
    epochs: int | float = EPOCHS,
    batch_size: int = BATCH_SIZE,
    console: Console | None = None,
) -> LinearProbe:
    """Trains linear heads on frozen features, picks one, and tests that one.

    Features are the mean maps of the last blocks, side by side, of a random resized crop (area
    0.08 to 1), flipped or not. All heads of the sweep are trained at once. A part of the training
    split is held out (`data.holdout`); the head that does best there is the one that is tested,
    on the centre of each test image, once.

    An interrupted probe goes on where it was, and comes to the same numbers bit by bit, on as many
    devices.

    Args:
      loaded: the network.
      train, test: splits of the same classes.
      keep_in: folder, local or gs://, for the heads while they are trained. Each probe has one of
        its own there, which goes when it is done.
      key: "teacher" or "student"; see `LoadedModel.network`.
      sweep: the heads; None is 13 learning rates, with and without decay, on the last block and on
        the last four.
      epochs: of training.
      batch_size: images a step, over all devices; less where the training split is smaller.
      console: to report to; None is standard output.

    Raises:
      UserError: an argument that cannot be; fewer than two classes or images; images without a
        label; `keep_in` cannot be written to.
      RunError: features are not finite, or no head's loss is; as `Interrupted`: a signal came.
    """
    sweep, console = sweep or Sweep(), console or Console()
    if not 0 < epochs < math.inf:
        raise UserError("it must be more than 0", argument="epochs", value=epochs)
    if batch_size < 1:
        raise UserError("it must be at least 1", argument="batch_size", value=batch_size)
    check_classes(train, "a linear probe")
    work = _Probe(loaded, train, test, key, sweep, epochs, batch_size)
    folder = epath.Path(keep_in) / work.digest
    try:
        with buckets.reaching(folder):
            folder.mkdir(parents=True, exist_ok=True)
            checkpoints = Checkpoints(
                str(folder), every_steps=max(work.steps_per_epoch, SAVE_STEPS), keep=1
            )
    except OSError as error:
        raise UserError(
            f"it cannot be written to: {error.strerror}", argument="keep_in", value=str(keep_in)
        ) from error
    with buckets.reaching(folder), StopSignals() as signals:
        with closing(checkpoints):
            state = work.train(checkpoints, signals, console)
        with signals.raising("the heads are trained; the same command goes on with their test"):
            probe = work.evaluate(state, console)
    if jax.process_index() == 0:
        folder.rmtree(missing_ok=True)
    return probe


class _Probe:
    """A network, the data, and how heads are trained on them."""

    def __init__(
        self,
        loaded: LoadedModel,
        train: Source,
        test: Source,
        key: str | None,
        sweep: Sweep,
        epochs: int | float,
        batch_size: int,
    ):
        self._config, self._backbone = loaded.config, loaded.model.backbone
        self._params = loaded.network(key)["backbone"]
        self._step, self._sweep = loaded.step, sweep
        self._rest, self._held = hold_out(train)
        self._test = test
        size = image_size(self._config)
        images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
        means = jax.eval_shape(self._backbone.forward, self._params, images).block_means
        sweep.check(len(means))
        self._num_features = {
            str(n): sum(mean.shape[-1] for mean in means[-n:]) for n in sweep.blocks
        }
        self.batch_size = fitting_batch_size(batch_size, [len(self._rest)], jax.device_count())
        self.steps_per_epoch = max(1, len(self._rest) // self.batch_size)
        self.total_steps = max(1, round(epochs * self.steps_per_epoch))
        self._about = {
            "params_sha1": params_sha1(self._params),
            "data_sha1": train.fingerprint(),
            "sweep": [sweep.blocks, sweep.learning_rates, sweep.weight_decays],
            "batch_size": self.batch_size,
            "total_steps": self.total_steps,
            "seed": self._config.seed,
            "views": [size, self._config.views.mean, self._config.views.std],
            "canvas_size": self._config.data.canvas_size,
            "dtype": self._config.dtype,
        }

    @property
    def digest(self) -> str:
        """Of all that the heads depend on, but for how many devices train them."""
        return hashlib.sha1(json.dumps(self._about).encode()).hexdigest()[:12]

    def train(
        self, checkpoints: Checkpoints, signals: StopSignals, console: Console
    ) -> ClassifierState:
        """The heads, trained."""
        count = sum(len(self._sweep.heads(n)) for n in self._sweep.blocks)
        say(
            console,
            f"{count} heads on {len(self._rest):,} images of {self._rest.num_classes} classes, "
            f"{self.total_steps:,} steps of {self.batch_size}; {len(self._held):,} are held out",
        )
        optimizer = sweep_optimizer(self._sweep, self.batch_size, self.total_steps)
        head = init_heads(
            jax.random.key(self._config.seed), self._num_features, self._sweep,
            self._rest.num_classes,
        )  # fmt: skip
        params = {"head": head}
        state = ClassifierState(
            jnp.zeros((), jnp.int32),
            params,
            optimizer.init(params),
            {"backbone": jax.tree.map(jnp.copy, self._params)},
        )
        step = functools.partial(
            steps.classifier_step,
            loss_of=probe_loss(self._backbone, self._config, self._sweep),
            optimizer=optimizer,
            seed=self._config.seed,
        )
        start = checkpoints.latest_step() or 0
        with Progress(self.total_steps, first_step=start, console=console) as progress:
            fit = Fit(
                self._config, self._rest, self.batch_size, self.total_steps, checkpoints,
                progress, signals, best_loss,
            )  # fmt: skip
            return fit.run(step, state)

    def evaluate(self, state: ClassifierState, console: Console) -> LinearProbe:
        """Picks a head by the held-out part, and tests it."""

        def ranks(params, batch):
            sweep = Sweep(blocks=tuple(map(int, params["head"])))
            images = evaluation_images(self._config, batch)
            features = block_features(self._backbone, params["backbone"], images, sweep)
            return head_ranks(params["head"], features, batch["label"])

        classifiers = Classifiers(ranks, self._config, self._held, self._test)
        accuracies, images = classifiers.accuracies(
            state.params | state.frozen, self._held, console
        )
        held_out: dict[Head, Accuracy] = {}
        for n in self._sweep.blocks:
            held_out |= dict(zip(self._sweep.heads(n), accuracies[str(n)], strict=True))
        picked = max(held_out, key=lambda head: held_out[head].top1)

        i = self._sweep.heads(picked.blocks).index(picked)
        n = str(picked.blocks)
        alone = {n: jax.tree.map(lambda x: np.asarray(x)[i : i + 1], state.params["head"][n])}
        tested, test_images = classifiers.accuracies(
            {"head": alone} | state.frozen, self._test, console
        )
        ((accuracy,),) = tested.values()
        return LinearProbe(
            Result("linear", accuracy._asdict(), step=self._step),
            picked,
            held_out,
            self.batch_size,
            (len(self._rest), images, test_images),
        )


def probe_loss(
    backbone: Backbone, config: ConfigDict, sweep: Sweep
) -> Callable[..., tuple[Array, dict[str, PyTree]]]:
    """What `steps.classifier_step` makes small: the sum of the heads' losses.

    Its scalars are {"loss": f32[h] by number of blocks, "finite": share of finite features}.
    """

    def loss_of(params, frozen, batch, keys):
        images = classifier_views(config, keys[0], batch)
        features = block_features(backbone, frozen["backbone"], images, sweep)
        losses = head_losses(params["head"], features, batch["label"])
        finite = [jnp.mean(jnp.isfinite(x).astype(jnp.float32)) for x in features.values()]
        total = jnp.concatenate(list(losses.values())).sum()
        return total, {"loss": losses, "finite": jnp.stack(finite).mean()}

    return loss_of


def best_loss(done: int, scalars: Mapping[str, Any]) -> dict[str, float]:
    """{"loss": the smallest of all heads'}.

    Raises:
      RunError: features are not finite, or no loss is.
    """
    if float(scalars["finite"]) < 1:
        raise RunError(f"step {done}: features are not finite; {DIVERGED}")
    losses = np.concatenate([np.asarray(x) for x in scalars["loss"].values()])
    if not np.isfinite(losses).any():
        raise RunError(f"step {done}: the loss of no head is finite; lower the learning rates")
    return {"loss": float(losses[np.isfinite(losses)].min())}


def linear_table(probe: LinearProbe) -> Table:
    """What each head reaches on the held-out part, a row a learning rate; the pick is marked."""
    table = Table("learning rate", title="linear probe: top-1 % on the held-out part")
    columns: dict[tuple[int, float], dict[float, str]] = {}
    for head, accuracy in probe.held_out.items():
        text = f"{accuracy.top1:.2f}" + (" *" if head == probe.picked else "  ")
        columns.setdefault((head.blocks, head.weight_decay), {})[head.learning_rate] = text
    for blocks, decay in columns:
        words = "last block" if blocks == 1 else f"last {blocks} blocks"
        table.add_column(f"{words}\ndecay {decay:g}", justify="right")
    for rate in next(iter(columns.values())):
        table.add_row(f"{rate:g}", *(column[rate] for column in columns.values()))
    return table
