"""`esvit finetune`: train a backbone and a linear head on labels."""

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from esvit_jax.commands.arguments import (
    ConfigParser,
    Parser,
    add_json,
    add_key,
    add_network,
    add_processes,
    ending_at_once,
    number,
    open_network,
    path,
    positive,
    processes,
    quiet_libraries,
)
from esvit_jax.commands.labelled import add_splits, open_splits
from esvit_jax.errors import renamed

if TYPE_CHECKING:
    from esvit_jax.config import ConfigDict

TEXT = (
    "Trains a backbone and a linear classifier on labels: of --workdir, or random ones of --config."
)
NUMBERS = {
    "epochs": "of training (default: 100)",
    "learning_rate": "at its peak, for 256 images a step (default: 0.0005)",
    "min_learning_rate": "at the end (default: 1e-6)",
    "warmup_epochs": "over which it rises from 0 (default: 5)",
    "weight_decay": "of AdamW (default: 0.05)",
    "layer_decay": "a layer's learning rate over the next one's (default: 0.8, random: 1)",
    "label_smoothing": "share of a target spread over all classes (default: 0.1)",
    "mixup": "a of Beta(a, a); 0 for none (default: 0.8)",
    "cutmix": "likewise (default: 1)",
}


def main(argv: list[str]) -> None:
    """`esvit finetune`."""
    config = None
    if any(argument.startswith("--config") for argument in argv):
        parser = ConfigParser("finetune", TEXT)
        add_flags(parser)
        config, arguments = parser.parse(argv)
    else:
        parser = Parser("finetune", TEXT, epilog="--config=FILE in place of --workdir: random.")
        add_network(parser)
        add_key(parser)
        parser.add_argument(
            "--from_scratch", action="store_true",
            help="take the network's architecture alone, with random weights",
        )  # fmt: skip
        add_flags(parser)
        arguments = parser.parse_args(argv)
    with ending_at_once("finetune"), processes(arguments, "finetune"):
        run(arguments, config)


def add_flags(parser: Parser) -> None:
    """The flags that it has with a network, and with a config."""
    add_splits(parser)
    parser.add_argument(
        "--out", required=True, type=path, help="folder of this run alone, where it is kept"
    )
    for name, text in NUMBERS.items():
        parser.add_argument(f"--{name}", type=number, help=text)
    parser.add_argument(
        "--batch_size", type=positive,
        help="images a step, over all devices (default: 256, or less if the data are less)",
    )  # fmt: skip
    parser.add_argument(
        "--drop_path", type=number, help="of the last block (default: as the network's)"
    )
    add_json(parser)
    add_processes(parser)


def run(arguments: Any, config: "ConfigDict | None") -> None:
    """Trains; of several processes, one speaks."""
    import jax
    from rich.console import Console

    from esvit_jax.config.fields import set_field
    from esvit_jax.evaluate.finetune import finetune
    from esvit_jax.evaluate.tuning import Tuning
    from esvit_jax.runlog.alive import say

    quiet_libraries()
    console = Console(stderr=arguments.json)
    backbone, source, random = None, "random", {"layer_decay": 1.0}
    if config is None:
        loaded = open_network(arguments)
        config = loaded.config.copy_and_resolve_references()
        if not arguments.from_scratch:
            key = loaded.chosen(arguments.key)
            backbone, random = loaded.network(key)["backbone"], {}
            source = f"{key} of {arguments.workdir} at step {loaded.step}"
    if arguments.drop_path is not None:
        with renamed(**{"config.backbone.drop_path_rate": "--drop_path"}):
            set_field(config, "backbone.drop_path_rate", arguments.drop_path)
    if arguments.data_dir:
        config.data.data_dir = arguments.data_dir
    train, test = open_splits(arguments, config, "fine-tuning")
    fields = [field.name for field in dataclasses.fields(Tuning)]
    given: dict[str, Any] = {name: getattr(arguments, name) for name in fields}
    given = random | {name: x for name, x in given.items() if x is not None}
    with renamed(workdir="--out", **{name: f"--{name}" for name in fields}):
        found = finetune(
            arguments.out, config, train, test, backbone=backbone, source=source,
            tuning=Tuning(**given), console=console,
        )  # fmt: skip
    if jax.process_index() != 0:
        return
    if arguments.json:
        print(
            json.dumps({"workdir": found.workdir, "step": found.step} | dict(found.result.values))
        )
    say(console, str(found.result))
    say(console, f"the backbone and classifier.npz are in {found.workdir}")
