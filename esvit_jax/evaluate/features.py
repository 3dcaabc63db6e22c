"""Features of every image of a source, computed on all devices; those of splits with labels."""

import functools
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, PyTree
from rich.console import Console

from esvit_jax import parallel, steps
from esvit_jax.checkpoint import LoadedModel
from esvit_jax.config import ConfigDict
from esvit_jax.data.augment import center_view
from esvit_jax.data.loader import eval_batches
from esvit_jax.data.sources import Source
from esvit_jax.errors import RunError, UserError
from esvit_jax.models import Backbone
from esvit_jax.runlog.alive import signs_of_life


def evaluation_images(config: ConfigDict, batch: dict[str, jax.Array]) -> jax.Array:
    """Canvases to f32[b, s, s, 3]: the centre of each image, normalised."""
    return center_view(
        batch["canvas"],
        batch["size"],
        view_size=config.evaluate.size or config.views.global_size,
        crop=config.evaluate.crop,
        mean=config.views.mean,
        std=config.views.std,
    )


def view_features(backbone: Backbone, config: ConfigDict) -> Callable[[Any, dict], jax.Array]:
    """(the backbone's params, batch) -> view features f32[b, d]."""

    def extract(params, batch):
        return backbone.forward(params, evaluation_images(config, batch)).view_features

    return extract


def raw_pixels(config: ConfigDict) -> Callable[[Any, dict], jax.Array]:
    """(anything, batch) -> the image itself as features f32[b, h * w * 3], as a baseline."""

    def extract(_, batch):
        images = evaluation_images(config, batch)
        return images.reshape(len(images), -1)

    return extract


def params_sha1(params: PyTree) -> str:
    """What tells a network's params from all others."""
    digest = hashlib.sha1()
    for array in jax.tree.leaves(params):
        digest.update(np.asarray(array).tobytes())
    return digest.hexdigest()


def fitting_batch_size(batch_size: int, lengths: Sequence[int], devices: int) -> int:
    """Images a batch: `batch_size`, or what covers the smallest of some data sets, if that is less.

    At least 32, so that devices have something to do, unless `batch_size` is less; and always a
    multiple of the number of devices.
    """
    smallest = max(32, min(lengths, default=batch_size))
    wanted = min(batch_size, -(-smallest // devices) * devices)
    return max(wanted // devices, 1) * devices


class FeatureExtractor:
    """Runs `extract(params, batch)` over whole sources; compiled once.

    Args:
      extract: pure; see `steps.feature_step`.
      config: of the run (views, evaluate, data, parallel).
      sources: whose images it will be asked for; small ones get small batches, so that little of
        a batch is padding.
      own_devices: whole batches on this process's devices, whatever others do; else all processes
        share each batch.
    """

    def __init__(
        self,
        extract: Callable[[Any, dict], Any],
        config: ConfigDict,
        sources: Sequence[Source] = (),
        *,
        own_devices: bool = False,
    ):
        self._config = config
        devices = jax.local_devices() if own_devices else jax.devices()
        self.batch_size = fitting_batch_size(
            config.evaluate.batch_size, [len(source) for source in sources], len(devices)
        )
        self._share = (0, 1) if own_devices else (jax.process_index(), jax.process_count())
        step = functools.partial(steps.feature_step, extract=extract)
        # What is spread over the devices is gathered for as long as it takes.
        mode = "shard_map" if config.parallel == "fsdp" else config.parallel
        self._step = parallel.on_all_devices(step, mode, devices=devices)
        self._progress = "features"

    def batches(
        self, params: Any, source: Source, first_batch: int = 0
    ) -> Iterator[dict[str, Any]]:
        """{"features", "label", "id"} of the images of a batch, in order, without padding.

        Images that cannot be read are left out. "id" is of this process's images only.
        `first_batch` batches are left out.
        """
        config = self._config
        what = f"features of {source.name} {source.split}"
        self._progress = f"{what}: reading, and compiling for the first batch"
        host_batches = eval_batches(
            source,
            batch_size=self.batch_size,
            canvas_size=config.data.canvas_size,
            num_threads=config.data.num_threads,
            first_batch=first_batch,
            max_wait_seconds=config.data.max_wait_seconds,
            process_index=self._share[0],
            process_count=self._share[1],
        )
        started = None
        for i, batch in enumerate(host_batches):
            result = jax.tree.map(np.asarray, self._step(params, parallel.shard(batch)))
            kept = result.pop("mask")
            result = jax.tree.map(lambda x, kept=kept: x[kept], result)
            ids = [i for i, keep in zip(batch["id"], batch["mask"], strict=True) if keep]
            now = time.monotonic()
            started = started or now
            done = min((first_batch + i + 1) * self.batch_size, len(source))
            self._progress = f"{what}: {done} of {len(source)} images"
            if i:  # the pace without compilation
                self._progress += f", {i * self.batch_size / (now - started):.0f} img/s"
            yield result | {"id": ids}

    def describe(self) -> str:
        """How far it is, on one line, for `runlog.alive.signs_of_life`."""
        return self._progress

    def arrays(self, params: Any, source: Source) -> tuple[np.ndarray, np.ndarray]:
        """Features f32[n, d] and labels int32[n] (-1 for none) of all images, in memory.

        n is the number of images that could be read, which may be less than `len(source)`.
        """
        parts = [(batch["features"], batch["label"]) for batch in self.batches(params, source)]
        features, labels = zip(*parts, strict=True)
        return np.concatenate(features), np.concatenate(labels)


def labelled_features(
    loaded: LoadedModel,
    sources: Sequence[Source],
    what: str,
    *,
    key: str | None = None,
    console: Console | None = None,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """View features f32[n, d] and labels int32[n] of each split, in memory.

    Args:
      loaded: the network.
      sources: of the splits; n may be less than their lengths, as images that cannot be read are
        left out.
      what: needs the labels, such as "k-NN".
      key: "teacher" or "student"; see `LoadedModel.network`.
      console: for signs of life; None is standard output.

    Raises:
      UserError, RunError: see `check_split`.
    """
    params = parallel.replicate(loaded.network(key)["backbone"], loaded.config.parallel)
    extract = view_features(loaded.model.backbone, loaded.config)
    extractor = FeatureExtractor(extract, loaded.config, sources)
    found = []
    with signs_of_life(extractor.describe, console or Console()):
        for source in sources:
            features, labels = extractor.arrays(params, source)
            check_split(source, features, labels, what)
            found.append((features, labels))
    return found


def check_split(
    source: Source,
    features: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"],
    what: str,
) -> None:
    """Refuses features and labels from which nothing can be learned.

    Args:
      source: whose they are.
      features, labels: of the images that could be read.
      what: needs them, such as "k-NN".

    Raises:
      UserError, RunError: see `check_labels` and `check_finite`.
    """
    check_labels(source, labels, what)
    check_finite(source, np.asarray(np.isfinite(features).all(axis=1)))


def check_labels(source: Source, labels: Int[np.ndarray, " n"], what: str) -> None:
    """Refuses labels of a split from which nothing can be learned.

    Raises:
      UserError: no image could be read, or some have no label.
    """
    where = f"{source.name} {source.split}"
    if len(labels) == 0:
        raise UserError(f"{where}: none of {len(source)} images can be read; {what} needs some")
    if unlabelled := int(np.sum(labels < 0)):
        raise UserError(
            f"{where}: {unlabelled} of {len(labels)} images have no label; {what} needs all of them"
        )


def check_finite(source: Source, finite: Bool[np.ndarray, " n"]) -> None:
    """Refuses features that are not finite.

    Args:
      source: of the images.
      finite: whether all features of an image are.

    Raises:
      RunError: some are not.
    """
    if bad := int(np.sum(~finite)):
        raise RunError(
            f"{source.name} {source.split}: the features of {bad} of {len(finite)} images are not "
            "finite; the network diverged, evaluate an earlier checkpoint"
        )
