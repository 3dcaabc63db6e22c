"""What is known of a run before anything is compiled: its size, and whether memory and disk do."""

import math
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax

from esvit_jax.config import ConfigDict, RunNumbers
from esvit_jax.errors import UserError
from esvit_jax.planning.estimate import step_cost
from esvit_jax.planning.measure import batch_shapes, tree_bytes
from esvit_jax.planning.topology import host_memory
from esvit_jax.recipe import Recipe
from esvit_jax.state import TrainState, create_state, init_params

GIB = 2**30
# The estimate is right within a tenth: above that share of the memory a step does not fit, and from
# this one up it may not.
REFUSED, DOUBTFUL = 1.1, 0.9


class Size(NamedTuple):
    """How large a run is.

    Attributes:
      backbone_parameters, parameters: of one network, without its heads and with them.
      step_bytes: that a step needs of one device's memory, an estimate.
      step_operations: of its matrix products, on one device.
      state_bytes: of the state, and so of a checkpoint.
      memory: bytes that one device has; None where nobody says.
    """

    backbone_parameters: int
    parameters: int
    step_bytes: int
    step_operations: int
    state_bytes: int
    memory: int | None


def measure_size(config: ConfigDict, numbers: RunNumbers, recipe: Recipe) -> Size:
    """Traces the step; compiles nothing."""
    state: TrainState = jax.eval_shape(
        lambda key: create_state(recipe.model, recipe.optimizer, init_params(recipe.model, key)),
        jax.random.key(0),
    )
    of_devices = batch_shapes(config, 1, numbers.images_per_device)
    batch = {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in of_devices.items()}
    cost = step_cost(recipe, state, batch)
    return Size(
        backbone_parameters=count(state.params["backbone"]),
        parameters=count(state.params),
        step_bytes=cost.bytes,
        step_operations=cost.operations,
        state_bytes=tree_bytes(state),
        memory=device_memory(),
    )


def count(params: Any) -> int:
    """Numbers in a tree of arrays or shapes."""
    return sum(x.size for x in jax.tree.leaves(params))


def device_memory() -> int | None:
    """Bytes of memory of one device; of this machine's CPU, its share for each."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return host_memory() // jax.local_device_count()
    return (device.memory_stats() or {}).get("bytes_limit")


class Disk(NamedTuple):
    """What checkpoints take of the workdir.

    Attributes:
      checkpoint_bytes: of one.
      soon: that are still to be written before an old one makes room.
      in_all: likewise, until the end of the run.
      free: bytes; None where nobody says (a bucket).
    """

    checkpoint_bytes: int
    soon: int
    in_all: int
    free: int | None


def measure_disk(
    config: ConfigDict, numbers: RunNumbers, size: Size, workdir: str | os.PathLike[str]
) -> Disk:
    """Looks at what is in the workdir, and at what its disk has left."""
    for_good = config.checkpoint_keep_every_steps
    kept_for_good = numbers.total_steps // for_good if for_good else 0
    written = math.ceil(numbers.total_steps / config.checkpoint_every_steps)
    soon = config.checkpoint_keep + 1  # an old one goes when a new one is there
    in_all = min(soon + kept_for_good, written)
    free, there = None, 0
    if "://" not in str(workdir):
        path = Path(workdir)
        there = sum(folder.name.isdigit() for folder in path.glob("checkpoints/*"))
        free = shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free
    return Disk(
        checkpoint_bytes=size.state_bytes,
        soon=max(min(soon, in_all) - there, 1),
        in_all=max(in_all - there, 1),
        free=free,
    )


def check_disk(config: ConfigDict, disk: Disk) -> None:
    """Refuses a run whose checkpoints find no room.

    Raises:
      UserError: says what to lower.
    """
    if disk.free is None or disk.soon * disk.checkpoint_bytes <= disk.free:
        return
    lower = "lower it, or make room" if config.checkpoint_keep > 1 else "make room"
    raise UserError(
        f"the next checkpoints, {disk.soon} of {disk.checkpoint_bytes / GIB:.2f} GiB (an old one "
        f"goes when a new one is there), do not fit the {disk.free / GIB:.2f} GiB that the workdir "
        f"has left; {lower}",
        argument="config.checkpoint_keep", value=config.checkpoint_keep,
    )  # fmt: skip


def check_memory(config: ConfigDict, size: Size) -> None:
    """Refuses a step that cannot fit.

    Raises:
      UserError: says what to lower.
    """
    if size.memory is None or size.step_bytes <= REFUSED * size.memory:
        return
    advice = ["raise config.accum_steps (the same update in smaller parts)"]
    if config.remat != "block" and jax.default_backend() != "cpu":  # XLA's CPU compiler undoes it
        advice.append("set config.remat=block")
    advice.append("lower config.batch_size")
    raise UserError(
        f"config.batch_size = {config.batch_size}: a step needs about "
        f"{size.step_bytes / GIB:.1f} GiB a device, which has {size.memory / GIB:.1f}; "
        + ", or ".join(advice)
    )


def describe(config: ConfigDict, numbers: RunNumbers, size: Size, disk: Disk) -> list[str]:
    """What is about to be trained, in a few lines."""
    devices = jax.device_count()
    platform = jax.devices()[0].platform
    epochs = numbers.total_steps / numbers.steps_per_epoch
    memory = f"about {size.step_bytes / GIB:.1f} GiB a device"
    if size.memory is not None:
        memory += f" of {size.memory / GIB:.1f}"
    parts = f" in {config.accum_steps} parts" if config.accum_steps > 1 else ""
    room = "" if disk.free is None else f", of {disk.free / GIB:.1f} GiB free"
    return [
        f"{config.backbone.name}, {size.backbone_parameters / 1e6:.3g} M parameters "
        f"({size.parameters / 1e6:.3g} M with heads), on {config.data.name} "
        f"{config.data.train_split}, {numbers.num_images:,} images",
        f"{numbers.total_steps:,} steps of {config.batch_size} images{parts}, {epochs:.3g} epochs, "
        f"{numbers.total_steps * config.batch_size:,} images seen; learning rate "
        f"{numbers.peak_learning_rate:.3g} ({config.optimizer.learning_rate:.3g} for 256 images) "
        f"after {numbers.warmup_steps:,} steps",
        f"{devices} {platform} device{'s' if devices > 1 else ''} of {numbers.images_per_device} "
        f"images, {config.dtype}; a step needs {memory}",
        f"checkpoints of {disk.checkpoint_bytes / GIB:.2f} GiB, at most {disk.in_all} to come"
        f"{room}",
        *notes(config, numbers, size, disk),
    ]


def notes(config: ConfigDict, numbers: RunNumbers, size: Size, disk: Disk) -> list[str]:
    """What may not be meant so, or may not go well."""
    found = []
    if numbers.warmup_steps >= numbers.total_steps:
        found.append(
            "the learning rate still rises at the end: config.optimizer.warmup_epochs is "
            f"{numbers.warmup_steps:,} steps"
        )
    if size.memory is not None and size.step_bytes > DOUBTFUL * size.memory:
        found.append("it may not fit; then raise config.accum_steps or lower config.batch_size")
    if disk.free is not None and disk.in_all * disk.checkpoint_bytes > DOUBTFUL * disk.free:
        advice = "raise config.checkpoint_keep_every_steps"
        if config.checkpoint_keep_every_steps is None:
            advice = "lower config.checkpoint_keep"
        found.append(f"the disk may fill up: {advice}, or make room")
    return [f"note: {note}" for note in found]
