"""`esvit transfer`: a probe and k-NN on many data sets."""

import dataclasses
import json
import os
from typing import TYPE_CHECKING, Any

from esvit_jax.commands.arguments import (
    Parser,
    add_data_dir,
    add_json,
    add_key,
    add_network,
    check_writable,
    ending_at_once,
    open_network,
    path,
    positive,
    quiet_libraries,
    write_json,
)
from esvit_jax.errors import UserError, renamed

if TYPE_CHECKING:
    from rich.console import Console

    from esvit_jax.checkpoint import LoadedModel
    from esvit_jax.evaluate.transfer import Protocol, SetScores, SetSources


def main(argv: list[str]) -> None:
    """`esvit transfer`."""
    parser = Parser(
        "transfer", "Trains a linear probe on many data sets, and classifies them by k-NN."
    )
    add_network(parser)
    add_key(parser)
    parser.add_argument(
        "--data", metavar="SET,…",
        help="sets by name, NAME=folder:PATH for one of them from elsewhere, or any other data set "
        "with the splits train and test (default: all that there are names for)",
    )  # fmt: skip
    add_data_dir(parser)
    parser.add_argument(
        "--protocol", choices=("fast", "benchmark", "linear"), default="fast",
        help="fast: ℓ2 chosen once; benchmark: the benchmark's range of ℓ2, three seeds; linear: "
        "as esvit linear, for sets that ask for top-1 (default: fast)",
    )  # fmt: skip
    parser.add_argument(
        "--shots", type=positive, metavar="N",
        help="images a class that have labels; the benchmark has 5, 20, 50 (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--against", type=path, metavar="DIR",
        help="workdir, converted checkpoint or export of another network to compare with",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=path, help="JSON file to write (default: transfer.json in the workdir)"
    )
    add_json(parser)
    arguments = parser.parse_args(argv)
    if arguments.shots and arguments.protocol == "linear":
        raise UserError(
            "the protocol linear takes all labels", argument="--shots", value=arguments.shots
        )
    with ending_at_once("transfer"):
        run(arguments)


def run(arguments: Any) -> None:
    """Evaluates."""
    from rich.console import Console

    from esvit_jax.evaluate.transfer import PROTOCOLS, transfer_table, wins
    from esvit_jax.interop.exported import load_network
    from esvit_jax.runlog.alive import say

    quiet_libraries()
    console = Console(stderr=arguments.json)
    networks = [open_network(arguments)]
    if arguments.against:
        with renamed(workdir="--against"):
            networks.append(load_network(arguments.against, strict=arguments.strict))
    out = arguments.out or os.path.join(arguments.workdir, "transfer.json")
    check_writable(out, "--out")
    protocol = dataclasses.replace(PROTOCOLS[arguments.protocol], shots=arguments.shots)
    skipped: dict[str, str] = {}
    sets = open_sets(arguments, networks[0], skipped, console)

    found: list[list[SetScores]] = [[] for _ in networks]
    for opened in sets:
        for scores, one in zip(
            found, scores_of(arguments, networks, opened, protocol, skipped, console), strict=False
        ):
            scores.append(one)
    if not found[0]:
        raise UserError("no set is left to transfer to; see the lines above")
    report = report_of(arguments, networks[0], found, skipped)
    write_json(out, report)
    if arguments.json:
        print(json.dumps(report))
    else:
        console.print(transfer_table(*found))
    if arguments.against:
        for name, (won, of) in wins(*found).items():
            say(console, f"better than {arguments.against} on {won} of {of} sets by {name}")
    say(console, f"written to {out}")


def open_sets(
    arguments: Any, loaded: "LoadedModel", skipped: dict[str, str], console: "Console"
) -> list["SetSources"]:
    """The sets that there are; why others are left out is said, and added to `skipped`.

    Raises:
      UserError: there is none, or no such name.
    """
    from esvit_jax.evaluate.sets import SETS, named_set
    from esvit_jax.evaluate.transfer import open_set

    data_dir = arguments.data_dir or loaded.config.data.data_dir or None
    sets = []
    with renamed(text="--data"):
        named = [named_set(x) for x in (arguments.data.split(",") if arguments.data else SETS)]
    for name, about in named:
        try:
            sets.append(open_set(name, about, data_dir))
        except UserError as error:
            skip(name, error, skipped, console)
    if not sets:
        raise UserError(
            "none of the sets can be read; see the lines above", argument="--data",
            value=arguments.data or "all",
        )  # fmt: skip
    return sets


def scores_of(
    arguments: Any,
    networks: list["LoadedModel"],
    opened: "SetSources",
    protocol: "Protocol",
    skipped: dict[str, str],
    console: "Console",
) -> list["SetScores"]:
    """Of each network on one set; none if nothing can be learned from the set."""
    from esvit_jax.evaluate.transfer import transfer

    keys, workdirs = [arguments.key, None], [arguments.workdir, arguments.against]
    try:
        return [
            transfer(
                network, opened, protocol, keep_in=workdir, key=key,
                console=console,
            )
            for network, key, workdir in zip(networks, keys, workdirs, strict=False)
        ]  # fmt: skip
    except UserError as error:
        skip(opened.name, error, skipped, console)
        return []


def skip(name: str, error: UserError, skipped: dict[str, str], console: "Console") -> None:
    """Says why a set is left out."""
    from esvit_jax.runlog.alive import say

    skipped[name] = error.message
    say(console, f"{name} is left out: {error.message}")


def report_of(
    arguments: Any,
    loaded: "LoadedModel",
    found: list[list["SetScores"]],
    skipped: dict[str, str],
) -> dict[str, Any]:
    """What the file holds."""
    from esvit_jax.evaluate.transfer import scores_json, transfer_results, wins

    key = loaded.chosen(arguments.key)
    report: dict[str, Any] = {
        "step": loaded.step, "key": key, "protocol": arguments.protocol, "shots": arguments.shots,
        "sets": {one.name: scores_json(one) for one in found[0]}, "skipped": skipped,
    }  # fmt: skip
    if arguments.against:
        report["against"] = arguments.against
        report["sets_against"] = {one.name: scores_json(one) for one in found[1]}
        report["wins"] = wins(*found)
    for result in transfer_results(found[0], loaded.step):
        report |= {f"{result.evaluation}/{name}": x for name, x in result.values.items()}
    return report
