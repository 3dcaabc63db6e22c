"""Features of every image of a source, computed on all devices."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from esvit_jax import parallel, steps
from esvit_jax.config import ConfigDict
from esvit_jax.data.augment import center_view
from esvit_jax.data.loader import eval_batches


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


def view_features(backbone: Any, config: ConfigDict) -> Callable[[Any, dict], jax.Array]:
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


def fitting_batch_size(batch_size: int, lengths: Sequence[int], devices: int) -> int:
    """Images a batch: `batch_size`, or what covers the smallest of some data sets, if that is less.

    At least 32, so that devices have something to do, and a multiple of their number.
    """
    smallest = max(32, min(lengths, default=batch_size))
    return min(batch_size, -(-smallest // devices) * devices)


class FeatureExtractor:
    """Runs `extract(params, batch)` over whole sources; compiled once.

    Args:
      extract: pure; see `steps.feature_step`.
      config: of the run (views, evaluate, data, parallel).
      sources: whose images it will be asked for; small ones get small batches, so that little of
        a batch is padding.
    """

    def __init__(
        self, extract: Callable[[Any, dict], Any], config: ConfigDict, sources: Sequence[Any] = ()
    ):
        self._config = config
        self.batch_size = fitting_batch_size(
            config.evaluate.batch_size, [len(source) for source in sources], jax.device_count()
        )
        step = functools.partial(steps.feature_step, extract=extract)
        self._step = parallel.lift(step, config.parallel)

    def batches(self, params: Any, source: Any, first_batch: int = 0) -> Iterator[dict[str, Any]]:
        """{"features", "label", "id"} of the images of a batch, in order, without padding.

        "id" is of this process's images only. `first_batch` batches are left out.
        """
        config = self._config
        host_batches = eval_batches(
            source,
            batch_size=self.batch_size,
            canvas_size=config.data.canvas_size,
            num_threads=config.data.num_threads,
            first_batch=first_batch,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        for batch in host_batches:
            result = jax.tree.map(np.asarray, self._step(params, parallel.shard(batch)))
            kept = result.pop("mask")
            result = jax.tree.map(lambda x, kept=kept: x[kept], result)
            ids = [i for i, keep in zip(batch["id"], batch["mask"], strict=True) if keep]
            yield result | {"id": ids}

    def arrays(self, params: Any, source: Any) -> tuple[np.ndarray, np.ndarray]:
        """Features f32[n, d] and labels int32[n] (-1 for none) of all images, in memory."""
        parts = [(batch["features"], batch["label"]) for batch in self.batches(params, source)]
        features, labels = zip(*parts, strict=True)
        return np.concatenate(features), np.concatenate(labels)
