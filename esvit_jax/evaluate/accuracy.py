"""How many images of a split classifiers get right, counted while the devices run them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from rich.console import Console

from esvit_jax.config import ConfigDict
from esvit_jax.data.sources import Source
from esvit_jax.errors import UserError
from esvit_jax.evaluate.features import FeatureExtractor
from esvit_jax.runlog.alive import signs_of_life


class Accuracy(NamedTuple):
    """Shares of the images, in percent, whose class is the first, or among the first five."""

    top1: float
    top5: float


def label_ranks(logits: Float[Array, "b c"], labels: Int[Array, " b"]) -> Int[Array, " b"]:
    """How many classes are put before the true one; of equal ones the lower is first.

    All c of them, where logits are not finite.
    """
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    lower = jnp.arange(logits.shape[1]) < labels[:, None]
    ahead = (logits > own) | ((logits == own) & lower)
    finite = jnp.isfinite(logits).all(axis=1)
    return jnp.where(finite, ahead.sum(axis=1), logits.shape[1])


class Classifiers:
    """Classifiers that are run over whole splits.

    Args:
      ranks: (params, batch) -> {name: int32[b, h]}, the `label_ranks` of h classifiers.
      config: of the network's run.
      sources: whose images they will be asked for.
    """

    def __init__(
        self,
        ranks: Callable[[Any, dict], dict[str, Array]],
        config: ConfigDict,
        *sources: Source,
    ):
        self._extractor = FeatureExtractor(ranks, config, sources)

    def accuracies(
        self, params: Any, source: Source, console: Console
    ) -> tuple[dict[str, list[Accuracy]], int]:
        """Of each classifier; and how many images could be read, which are those that count.

        Raises:
          UserError: no image can be read, or one has no label.
        """
        hits: dict[str, Any] = {}
        where, images = f"{source.name} {source.split}", 0
        with signs_of_life(self._extractor.describe, console):
            for batch in self._extractor.batches(params, source):
                if (batch["label"] < 0).any():
                    raise UserError(f"{where}: some images have no label, and all need one")
                images += len(batch["label"])
                for name, ranks in batch["features"].items():
                    found = np.stack([(ranks < 1).sum(0), (ranks < 5).sum(0)])
                    hits[name] = hits.get(name, 0) + found
        if not images:
            raise UserError(f"{where}: none of {len(source)} images can be read")
        shares = {name: 100.0 * counts / images for name, counts in hits.items()}
        return {
            name: [Accuracy(float(top1), float(top5)) for top1, top5 in share.T]
            for name, share in shares.items()
        }, images
