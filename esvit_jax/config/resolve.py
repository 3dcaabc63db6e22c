"""The numbers of a run, and what is refused before anything is compiled."""

import dataclasses

from esvit_jax.config.fields import FIELDS, MAX_STEPS, ConfigDict, flatten, require_all_fields
from esvit_jax.errors import UserError, renamed


@dataclasses.dataclass(frozen=True)
class RunNumbers:
    """What follows from a config, a data set and the devices. Steps count from 0."""

    num_images: int
    steps_per_epoch: int
    total_steps: int
    images_per_device: int
    peak_learning_rate: float
    warmup_steps: int
    freeze_prototypes_steps: int


def resolve(config: ConfigDict, *, num_images: int, num_devices: int) -> RunNumbers:
    """Checks a config against data and devices, and computes the numbers of the run.

    Args:
      config: after all overrides; see `check`.
      num_images: in the training split.
      num_devices: over all processes.

    Raises:
      UserError: names the first field that cannot work.
    """
    check(config)
    _require_multiple("batch_size", config.batch_size, num_devices)
    _require_multiple("evaluate.batch_size", config.evaluate.batch_size, num_devices)
    images_per_device = config.batch_size // num_devices
    if images_per_device % config.accum_steps:
        raise UserError(
            f"it must divide the {images_per_device} images of a device into equal parts",
            argument="config.accum_steps", value=config.accum_steps,
        )  # fmt: skip
    if num_images < 1:
        raise UserError(
            "it has no images", argument="config.data.train_split", value=config.data.train_split
        )
    steps_per_epoch = max(1, num_images // config.batch_size)

    def steps(field: str) -> int:
        """The steps of this many epochs."""
        epochs = config[field]
        count = round(epochs * steps_per_epoch)
        if count > MAX_STEPS:
            raise UserError(
                f"{count:,} steps are more than a run can count, which is {MAX_STEPS:,}",
                argument=f"config.{field}", value=epochs,
            )  # fmt: skip
        return count

    total_steps = steps("total_epochs") if config.total_steps is None else config.total_steps
    if total_steps < 1:
        raise UserError(
            f"that is no step: an epoch has {steps_per_epoch:,}; config.total_steps counts in "
            "steps",
            argument="config.total_epochs", value=config.total_epochs,
        )  # fmt: skip
    return RunNumbers(
        num_images=num_images,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        images_per_device=images_per_device,
        peak_learning_rate=config.optimizer.learning_rate * config.batch_size / 256,
        warmup_steps=steps("optimizer.warmup_epochs"),
        freeze_prototypes_steps=steps("optimizer.freeze_prototypes_epochs"),
    )


def _require_multiple(field: str, images: int, num_devices: int) -> None:
    if images % num_devices:
        above = images + -images % num_devices
        below = above - num_devices
        raise UserError(
            f"{num_devices} devices need a multiple of {num_devices}, such as "
            + (f"{below} or {above}" if below else f"{above}"),
            argument=f"config.{field}", value=images,
        )  # fmt: skip


def check(config: ConfigDict) -> None:
    """Refuses what cannot work whatever the data and the devices are.

    Raises:
      UserError: names the field, its value, and what would do.
    """
    require_all_fields(config)
    for name, field in FIELDS.items():
        field.rule.require(f"config.{name}", config[name])
    views = config.views
    largest = max(views.global_size, views.local_size if views.num_local else 0)
    if config.data.canvas_size < largest:
        raise UserError(
            f"it must be at least {largest}, the side of the largest view",
            argument="config.data.canvas_size", value=config.data.canvas_size,
        )  # fmt: skip
    if config.parallel == "fsdp" and config.backbone.attention == "pallas":
        raise UserError(
            'config.parallel="fsdp" cannot cut the kernel for several devices; use "auto" or "xla"',
            argument="config.backbone.attention", value="pallas",
        )  # fmt: skip
    from esvit_jax.models import create_backbone  # needs jax, unlike all the above

    with renamed(**{name: f"config.backbone.{name}" for name in config.backbone}):
        backbone = create_backbone(**config.backbone)
    if config.parallel == "fsdp" and backbone.when_spread is None:
        raise UserError(
            f"XLA cannot cut the convolutions of a {type(backbone).__name__} for several devices; "
            'use "pmap"',
            argument="config.parallel", value="fsdp",
        )  # fmt: skip


def differences(old: ConfigDict, new: ConfigDict) -> list[str]:
    """The fields that make two configs different runs, a line each."""
    old_values, new_values = flatten(old), flatten(new)
    return [
        f"config.{name} was {old_values[name]!r} and is {new_values[name]!r} now"
        for name in sorted(FIELDS)
        if not FIELDS[name].free and old_values[name] != new_values[name]
    ]
