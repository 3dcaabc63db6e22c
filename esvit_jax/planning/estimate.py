"""What follows from the costs of a step: the least time it takes, and the hours of a run."""

from typing import NamedTuple

from esvit_jax.planning.chips import Chip


class Floor(NamedTuple):
    """No step of a program is faster than this; how much slower it is, only the chip can tell.

    Attributes:
      floor_seconds: of a step.
      floor_images_per_second: of all chips.
      floor_hours: of the whole run.
    """

    floor_seconds: float | None = None
    floor_images_per_second: float | None = None
    floor_hours: float | None = None


def floor(
    chip: Chip, bytes_accessed: int, flops: int, *, batch_size: int, total_steps: int
) -> Floor:
    """The least time that bandwidth and arithmetic allow.

    Args:
      chip: that runs the step.
      bytes_accessed: to and from its memory, a step.
      flops: of its matrix products, a step.
      batch_size: images a step, over all chips.
      total_steps: of the run.
    """
    seconds = max(bytes_accessed / chip.bandwidth, flops / chip.peak_flops)
    return Floor(seconds, batch_size / seconds, total_steps * seconds / 3600)
