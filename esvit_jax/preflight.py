"""What is known of a run before anything is compiled: its size, and whether it fits the memory."""

from typing import Any, NamedTuple

import jax

from esvit_jax.config import ConfigDict, RunNumbers
from esvit_jax.errors import UserError
from esvit_jax.planning.estimate import step_bytes
from esvit_jax.planning.measure import batch_shapes
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
      memory: bytes that one device has; None where nobody says.
    """

    backbone_parameters: int
    parameters: int
    step_bytes: int
    memory: int | None


def measure_size(config: ConfigDict, numbers: RunNumbers, recipe: Recipe) -> Size:
    """Traces the step; compiles nothing."""
    state: TrainState = jax.eval_shape(
        lambda key: create_state(recipe.model, recipe.optimizer, init_params(recipe.model, key)),
        jax.random.key(0),
    )
    of_devices = batch_shapes(config, 1, numbers.images_per_device)
    batch = {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in of_devices.items()}
    return Size(
        backbone_parameters=count(state.params["backbone"]),
        parameters=count(state.params),
        step_bytes=step_bytes(recipe, state, batch),
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


def describe(config: ConfigDict, numbers: RunNumbers, size: Size) -> list[str]:
    """What is about to be trained, in a few lines."""
    devices = jax.device_count()
    platform = jax.devices()[0].platform
    epochs = numbers.total_steps / numbers.steps_per_epoch
    memory = f"about {size.step_bytes / GIB:.1f} GiB a device"
    if size.memory is not None:
        memory += f" of {size.memory / GIB:.1f}"
    parts = f" in {config.accum_steps} parts" if config.accum_steps > 1 else ""
    lines = [
        f"{config.backbone.name}, {size.backbone_parameters / 1e6:.3g} M parameters "
        f"({size.parameters / 1e6:.3g} M with heads), on {config.data.name} "
        f"{config.data.train_split}, {numbers.num_images:,} images",
        f"{numbers.total_steps:,} steps of {config.batch_size} images{parts}, {epochs:.3g} epochs; "
        f"learning rate {numbers.peak_learning_rate:.3g} after {numbers.warmup_steps:,} steps",
        f"{devices} {platform} device{'s' if devices > 1 else ''}, {config.dtype}; a step needs "
        f"{memory}",
    ]
    if numbers.warmup_steps >= numbers.total_steps:
        lines.append(
            "note: the learning rate still rises at the end: config.optimizer.warmup_epochs is "
            f"{numbers.warmup_steps:,} steps"
        )
    if size.memory is not None and size.step_bytes > DOUBTFUL * size.memory:
        lines.append(
            "note: it may not fit; then raise config.accum_steps or lower config.batch_size"
        )
    return lines
