"""Some images of a source, to be looked at."""

from collections.abc import Sequence
from contextlib import closing

import numpy as np

from esvit_jax.data.loader import eval_batches
from esvit_jax.data.sources import Source, TFRecordSource


def first_images(
    source: Source, count: int, *, canvas_size: int, num_threads: int
) -> tuple[list[str], dict[str, np.ndarray]]:
    """The first images of a source that can be read, to be looked at.

    Args:
      source: what to read, of which no more than four times `count` records are.
      count: of images.
      canvas_size: pixels along the side of a canvas.
      num_threads: threads that decode.

    Returns:
      Their ids; "canvas" uint8[b, s, s, 3] and "size" int32[b, 2], b ≤ count.
    """
    batches = eval_batches(
        source, batch_size=min(4 * count, len(source)), canvas_size=canvas_size,
        num_threads=num_threads,
    )  # fmt: skip
    with closing(batches):
        batch = next(batches)
    readable = np.flatnonzero(batch["mask"])[:count]
    canvases = {name: batch[name][readable] for name in ("canvas", "size")}
    return [batch["id"][i] for i in readable], canvases


def read_images(
    source: Source, ids: Sequence[str] | np.ndarray, numbers: Sequence[int] | np.ndarray
) -> list[bytes | np.ndarray]:
    """Some images, encoded as they were stored.

    Args:
      source: that has them.
      ids: of all its images that can be read, in order.
      numbers: of those that are wanted, among `ids`.
    """
    if isinstance(source, TFRecordSource):
        wanted = {str(ids[n]) for n in numbers}
        found = {
            record["id"]: record["image"] for record in source.in_order() if record["id"] in wanted
        }
        return [found[str(ids[n])] for n in numbers]
    images = []
    for n in numbers:
        index = int(n)  # or later: some before it cannot be read
        while (record := source[index])["id"] != ids[n]:
            index += 1
        images.append(record["image"])
    return images
