"""`esvit correspond`: whether regions find themselves again in another view of the image."""

import json
import os
from typing import TYPE_CHECKING, Any

from esvit_jax.commands.arguments import (
    Parser,
    add_json,
    add_key,
    add_network,
    add_split,
    open_network,
    open_split,
    output_folder,
    path,
    quiet_libraries,
    several,
    write_json,
)
from esvit_jax.errors import UserError, renamed

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from esvit_jax.checkpoint import LoadedModel

# Images of the split that are drawn.
DRAWN = 6


def main(argv: list[str]) -> None:
    """`esvit correspond`."""
    parser = Parser(
        "correspond",
        "Matches the regions of each image with those of its mirror image, jittered and grey, and "
        "says how many of the ten surest matches hit.",
    )
    add_network(parser)
    add_key(parser)
    add_split(parser)
    parser.add_argument(
        "--against", type=path, metavar="DIR", help="another network, to compare with"
    )
    parser.add_argument(
        "--images", type=several(path), metavar="A[,B]",
        help="only draw: one image file and its mirror image, or two image files",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the colours (default: 0)")
    parser.add_argument(
        "--out", type=path, metavar="FOLDER",
        help="for correspondence.json and .png (default: the workdir, if network and data are the "
        "run's own; else none)",
    )  # fmt: skip
    add_json(parser)
    arguments = parser.parse_args(argv)
    if arguments.images and arguments.json:
        raise UserError("--images only draws, so that --json has no numbers to print; leave it out")

    from rich.console import Console

    from esvit_jax.interop.exported import load_network
    from esvit_jax.runlog.alive import say

    quiet_libraries()
    console = Console(stderr=arguments.json)
    folder = output_folder(arguments, own=not arguments.images)
    loaded = {arguments.workdir: open_network(arguments)}
    if arguments.against:
        with renamed(workdir="--against"):
            loaded[arguments.against] = load_network(arguments.against, strict=arguments.strict)
    if arguments.images:
        if not folder:
            raise UserError("--out is missing: the folder to draw in")
        words = _draw_files(loaded[arguments.workdir], arguments, folder)
    else:
        words = _evaluate(loaded, arguments, folder, console)
    say(console, words)


def _evaluate(
    loaded: "dict[str, LoadedModel]", arguments: Any, folder: str | None, console: "Console"
) -> str:
    """The numbers of a split, for one network or two, and a figure; says where they are."""
    from esvit_jax.analyze.looks import hits_in_split
    from esvit_jax.analyze.matches import matches_in_split
    from esvit_jax.analyze.pictures import matches_figure

    source = open_split(arguments, loaded[arguments.workdir])
    key, seed = arguments.key, arguments.seed
    report = [
        {"workdir": workdir} | hits_in_split(network, source, key=key, seed=seed, console=console)
        for workdir, network in loaded.items()
    ]
    if arguments.json:
        print(json.dumps(report))
    else:
        console.print(_table(report))
    images = f"{report[0]['images']} images of {source.name} {source.split}"
    words = f"{images}, the ten surest matches of each"
    if not folder:
        return f"{words}; not written, as they are not the run's own: give --out=FOLDER"
    write_json(os.path.join(folder, "correspondence.json"), report)
    files = "correspondence.json"
    if pairs := matches_in_split(loaded[arguments.workdir], source, DRAWN, key=key, seed=seed):
        matches_figure(pairs, os.path.join(folder, "correspondence.png"))
        files += ", correspondence.png"
    return f"{words}; in {folder}: {files}"


def _draw_files(loaded: "LoadedModel", arguments: Any, folder: str) -> str:
    """One file and its mirror image, or two files; says where."""
    from esvit_jax.analyze.matches import matches_in_images
    from esvit_jax.analyze.pictures import matches_figure

    with renamed(images="--images"):
        pairs = matches_in_images(loaded, arguments.images, key=arguments.key, seed=arguments.seed)
    file = os.path.join(folder, "matches.png")
    matches_figure(pairs, file)
    return f"drawn: {file}"


def _table(report: list[dict[str, Any]]) -> "Table":
    from rich.table import Table

    columns = ("network", "hits %", "distance px", "cells", "similarity of the 11th")
    table = Table(*columns, title="correspondence")
    for column in table.columns[1:]:
        column.justify = "right"
    for line in report:
        table.add_row(
            f"{line['workdir']}, {line['key']} at step {line['step']}", f"{line['accuracy']:.1f}",
            f"{line['distance']:.1f}", f"{line['distance_cells']:.2f}",
            f"{line['cutoff_similarity']:.3f}",
        )  # fmt: skip
    return table
