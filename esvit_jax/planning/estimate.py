"""What a step takes: its memory by the traced step, its least time by its bytes and operations."""

from typing import NamedTuple

import jax

from esvit_jax.planning import flops, liveness
from esvit_jax.planning.chips import Chip
from esvit_jax.recipe import Recipe
from esvit_jax.state import TrainState

# Temporaries of a compiled step over those of the traced one, by which `step_cost` multiplies:
# 1.42 for Swin-T with 2 images, 1.22 for a network of four blocks with 4 images and with 16.
COMPILED_OVER_TRACED = 1.3


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
    chip: Chip, bytes_accessed: int, operations: int, *, batch_size: int, total_steps: int
) -> Floor:
    """The least time that bandwidth and arithmetic allow.

    Args:
      chip: that runs the step.
      bytes_accessed: to and from its memory, a step.
      operations: of its matrix products, a step.
      batch_size: images a step, over all chips.
      total_steps: of the run.
    """
    seconds = max(bytes_accessed / chip.bandwidth, operations / chip.peak_flops)
    return Floor(seconds, batch_size / seconds, total_steps * seconds / 3600)


class Expected(NamedTuple):
    """What the compiler's cost model expects; no chip was asked.

    Attributes:
      estimated_cycles: of a step.
      estimated_seconds: of a step.
      estimated_images_per_second: of all chips.
      estimated_hours: of the whole run.
      estimated_mfu: operations of the step's matrix products over what the chip could do meanwhile.
    """

    estimated_cycles: int | None = None
    estimated_seconds: float | None = None
    estimated_images_per_second: float | None = None
    estimated_hours: float | None = None
    estimated_mfu: float | None = None


def expected(
    chip: Chip, cycles: int, operations: int, *, batch_size: int, total_steps: int
) -> Expected:
    """What follows from the cycles of a step.

    Args:
      chip: that runs the step.
      cycles: of each of its cores.
      operations: of the step's matrix products, on all of them.
      batch_size: images a step, over all chips.
      total_steps: of the run.
    """
    seconds = cycles / chip.clock
    share = operations / (seconds * chip.peak_flops)
    hours = total_steps * seconds / 3600
    return Expected(cycles, seconds, batch_size / seconds, hours, share)


class StepCost(NamedTuple):
    """What one step takes of one device.

    Attributes:
      bytes: of state, batch and temporaries, an estimate.
      operations: of its matrix products, a multiply-add being two.
    """

    bytes: int
    operations: int


def step_cost(
    recipe: Recipe, state_shapes: TrainState, batch_shapes: dict[str, jax.ShapeDtypeStruct]
) -> StepCost:
    """Estimates what a step takes of one device, by tracing it; nothing is compiled.

    Against what XLA says of its own CPU programs in float32 (jax 0.10), temporaries are estimated
    between 9 % below (Swin-T, 2 images) and 7 % above (four blocks). A TPU pads arrays, and takes
    more. On a CPU `config.remat` saves nothing: XLA finds what is computed twice, and keeps it.

    Args:
      recipe: of the run.
      state_shapes: of the state; the step writes the new one over the old one.
      batch_shapes: of this device's share: "canvas" [b, s, s, 3] and "size" [b, 2].
    """
    jaxpr = flops.trace(recipe.step, state_shapes, batch_shapes, devices=1)
    held = liveness.peak_bytes(
        jaxpr,
        in_place=len(jax.tree.leaves(state_shapes)),
        merging=jax.default_backend() == "cpu",
    )
    arguments = sum(
        x.size * x.dtype.itemsize for x in jax.tree.leaves((state_shapes, batch_shapes))
    )
    total = arguments + round(COMPILED_OVER_TRACED * held)
    return StepCost(total, flops.matmul_flops(jaxpr))
