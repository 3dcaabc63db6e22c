"""`esvit attention`: where a backbone looks, and what its regions have in common."""

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
    positive,
    quiet_libraries,
    several,
)
from esvit_jax.errors import UserError, renamed

if TYPE_CHECKING:
    from rich.table import Table


def main(argv: list[str]) -> None:
    """`esvit attention`."""
    parser = Parser(
        "attention",
        "Draws where the heads of a backbone look from some tokens of images, how widely they do, "
        "and the principal components of its regions as colours.",
    )
    add_network(parser)
    add_key(parser)
    add_split(parser)
    parser.add_argument(
        "--images", type=several(path), metavar="A,B,…", help="image files, in place of a data set"
    )
    parser.add_argument(
        "--count", type=positive, default=4, help="images of the data set (default: 4, the first)"
    )
    parser.add_argument(
        "--block", type=int, action="append", metavar="N", dest="blocks",
        help="to draw, from 0; -1 is the last; may be given again (default: the last of each of "
        "the last two stages)",
    )  # fmt: skip
    parser.add_argument(
        "--at", type=_point, action="append", metavar="Y,X", dest="points",
        help="a token that looks, by its place in shares of the image's height and width; may be "
        "given again (default: three)",
    )  # fmt: skip
    parser.add_argument("--mass", type=_share, help="that the outlined tokens hold (default: 0.6)")
    parser.add_argument(
        "--out", type=path, metavar="FOLDER",
        help="for the figures (default: attention in the workdir, if network and data are the "
        "run's own)",
    )  # fmt: skip
    add_json(parser)
    arguments = parser.parse_args(argv)

    from rich.console import Console

    from esvit_jax.analyze.looks import attention
    from esvit_jax.runlog.alive import say, signs_of_life

    quiet_libraries()
    console = Console(stderr=arguments.json)
    folder = output_folder(arguments, own=not arguments.images)
    if not folder:
        raise UserError("--out is missing: the folder to draw in, as the images are not the run's")
    if not arguments.out:
        folder = os.path.join(folder, "attention")
    loaded = open_network(arguments)
    given = {name: getattr(arguments, name) for name in ("points", "blocks", "mass")}
    given = {name: value for name, value in given.items() if value is not None}
    with (
        signs_of_life(lambda: "looking at attention", console),
        renamed(images="--images", blocks="--block"),
    ):
        drawn = attention(
            loaded, arguments.images, key=arguments.key, count=arguments.count,
            data=None if arguments.images else open_split(arguments, loaded), **given,
        )  # fmt: skip
    drawn.write(folder)
    if arguments.json:
        print(json.dumps(drawn.numbers))
    else:
        console.print(_table(drawn.numbers))
    say(console, f"drawn in {folder}: {', '.join(drawn.pictures)}")


def _point(text: str) -> tuple[float, float]:
    y, x = (float(number) for number in text.split(","))
    if not (0 <= y <= 1 and 0 <= x <= 1):
        raise ValueError
    return y, x


_point.__name__ = "pair of shares in 0..1, such as 0.5,0.5"


def _share(text: str) -> float:
    share = float(text)
    if not 0 < share <= 1:
        raise ValueError
    return share


_share.__name__ = "share in 0..1"


def _table(heads: list[dict[str, Any]]) -> "Table":
    import numpy as np
    from rich.table import Table

    columns = (
        "block",
        "stage",
        "window",
        "shift",
        "heads",
        "bits",
        "least",
        "most",
        "possible",
    )
    table = Table(*columns, title="entropy of attention")
    for column in table.columns:
        column.justify = "right"
    for i, block in enumerate(heads):
        entropy = block["entropy"]
        bits = (np.mean(entropy), min(entropy), max(entropy), np.log2(block["keys"]))
        table.add_row(
            str(i), str(block["stage"] + 1), str(block["window_size"] or "map"),
            str(block["shift"]), str(len(entropy)), *(f"{x:.2f}" for x in bits),
        )  # fmt: skip
    return table
