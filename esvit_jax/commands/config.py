"""`esvit config`: print a config, and the numbers of its run."""

import dataclasses
import json

from rich.console import Console
from rich.text import Text

from esvit_jax.commands.arguments import ConfigParser, add_json, positive
from esvit_jax.config import ConfigDict, RunNumbers, check, flatten, resolve
from esvit_jax.config.show import rows
from esvit_jax.errors import UserError, renamed

NUMBERS = {
    "num_images": "images to train on",
    "steps_per_epoch": "steps an epoch",
    "total_steps": "steps of the run",
    "warmup_steps": "steps in which the learning rate rises",
    "freeze_prototypes_steps": "steps in which prototypes do not move",
    "peak_learning_rate": "peak of the learning rate",
    "images_per_device": "images a device",
}


def main(argv: list[str]) -> None:
    """`esvit config`."""
    parser = ConfigParser(
        "config", "Prints a config, what of it is not the default, and the numbers of its run."
    )
    parser.add_argument(
        "--num_images",
        type=positive,
        help="to train on (default: those of the data set, if it is here)",
    )
    parser.add_argument("--num_devices", type=positive, default=1, help="over all processes")
    add_json(parser)
    config, arguments = parser.parse(argv)
    check(config)
    numbers, reason = None, ""
    try:
        num_images = arguments.num_images or _count_images(config)
    except UserError as error:
        reason = f"the numbers of the run need its data, or --num_images=…: {error}"
    else:
        numbers = resolve(config, num_images=num_images, num_devices=arguments.num_devices)
    if arguments.json:
        print(json.dumps({
            "config": flatten(config),
            "changed": {row.name: row.default for row in rows(config) if row.changed},
            "numbers": dataclasses.asdict(numbers) if numbers else None,
        }))  # fmt: skip
    else:
        _print_config(config, Console())
        _print_numbers(numbers, Console())
    if reason:
        Console(stderr=True).print(reason, soft_wrap=True, markup=False, highlight=False)


def _count_images(config: ConfigDict) -> int:
    from esvit_jax.data.sources import open_source

    data = config.data
    with renamed(
        name="config.data.name", split="config.data.train_split", data_dir="config.data.data_dir"
    ):
        return len(open_source(data.name, data.train_split, data.data_dir or None))


def _print_config(config: ConfigDict, console: Console) -> None:
    from esvit_jax.models import create_backbone

    backbone = create_backbone(**config.backbone)
    table = rows(config)
    names, values = (max(len(text) for text in texts) for texts in zip(
        *((row.name, repr(row.value)) for row in table), strict=True
    ))  # fmt: skip
    console.print("Lines with * are not the default.", highlight=False)
    for row in table:
        section, _, field = row.name.rpartition(".")
        note = f"[default {row.default!r}] " if row.changed else ""
        if section == "backbone" and row.value is None and hasattr(backbone, field):
            note = f"[{getattr(backbone, field)!r} in {config.backbone.name}] "
        mark = "*" if row.changed else " "
        line = Text(
            f"{mark} {row.name:{names}}  {row.value!r:{values}}  {note}{row.comment}",
            style="bold" if row.changed else "",
        )
        if console.is_terminal:
            line.truncate(console.width, overflow="ellipsis")
        console.print(line, soft_wrap=True)


def _print_numbers(numbers: RunNumbers | None, console: Console) -> None:
    if numbers is None:
        return
    console.print("\nThe run:", highlight=False)
    width = max(map(len, NUMBERS.values()))
    for name, about in NUMBERS.items():
        value = getattr(numbers, name)
        shown = f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
        console.print(f"  {about:{width}}  {shown}", highlight=False)
