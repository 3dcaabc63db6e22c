"""`esvit attention`: where a backbone looks, and what its regions have in common."""

import json
import os
from collections.abc import Sequence
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
    write_json,
)
from esvit_jax.errors import UserError, renamed

if TYPE_CHECKING:
    import jax
    from rich.table import Table

    from esvit_jax.analyze.attention import Attention, HeadsOfBlock
    from esvit_jax.checkpoint import LoadedModel

# Shares of the height and width of the image of the tokens that look, where no flag names them.
QUERIES = ((0.5, 0.5), (0.25, 0.25), (0.75, 0.6))


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
        "--block", type=int, action="append", metavar="N",
        help="to draw, from 0; -1 is the last; may be given again (default: the last of each of "
        "the last two stages)",
    )  # fmt: skip
    parser.add_argument(
        "--at", type=_point, action="append", metavar="Y,X",
        help="a token that looks, by its place in shares of the image's height and width; may be "
        "given again (default: three)",
    )  # fmt: skip
    parser.add_argument(
        "--mass", type=_share, default=0.6, help="that the outlined tokens hold (default: 0.6)"
    )
    parser.add_argument(
        "--out", type=path, metavar="FOLDER",
        help="for the figures (default: attention in the workdir, if network and data are the "
        "run's own)",
    )  # fmt: skip
    add_json(parser)
    arguments = parser.parse_args(argv)

    from rich.console import Console

    from esvit_jax.analyze.attention import Attention
    from esvit_jax.runlog.alive import say, signs_of_life

    quiet_libraries()
    console = Console(stderr=arguments.json)
    folder = output_folder(arguments, own=not arguments.images)
    if not folder:
        raise UserError("--out is missing: the folder to draw in, as the images are not the run's")
    if not arguments.out:
        folder = os.path.join(folder, "attention")
    loaded = open_network(arguments)
    blocks = _blocks(loaded, arguments.block)
    names, images = _images(loaded, arguments)
    with signs_of_life(lambda: f"attention in {len(names)} images", console):
        backbone, params = loaded.model.backbone, loaded.network(arguments.key)["backbone"]
        attention = Attention(backbone, params, images)
        heads = attention.heads()
        files = _draw(loaded, attention, names, images, blocks, arguments, folder)

    report = [block._asdict() | {"entropy": block.entropy.tolist()} for block in heads]
    write_json(os.path.join(folder, "entropy.json"), report)
    if arguments.json:
        print(json.dumps(report))
    else:
        console.print(_table(heads))
    say(console, f"drawn in {folder}: {', '.join(files)}")


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


def _blocks(loaded: "LoadedModel", wanted: list[int] | None) -> list[int]:
    """Numbers of the blocks to draw.

    Raises:
      UserError: there is no such block, or none at all.
    """
    blocks = loaded.model.backbone.blocks
    if not blocks:
        raise UserError(f"a {type(loaded.model.backbone).__name__} has no attention to look at")
    if wanted is None:
        last = {block.stage: i for i, block in enumerate(blocks)}
        return list(last.values())[-2:]
    for block in wanted:
        if not -len(blocks) <= block < len(blocks):
            raise UserError(
                f"there are blocks 0 to {len(blocks) - 1}", argument="--block", value=block
            )
    return [block % len(blocks) for block in wanted]


def _images(loaded: "LoadedModel", arguments: Any) -> "tuple[list[str], jax.Array]":
    """Names, and what a backbone takes.

    Raises:
      UserError: one is no image, or there is no such data.
    """
    import jax
    import jax.numpy as jnp

    from esvit_jax.analyze.pictures import short_name
    from esvit_jax.data.look import first_images
    from esvit_jax.evaluate.features import evaluation_images
    from esvit_jax.interop.load import preprocessor

    if arguments.images:
        files = arguments.images
        with renamed(images="--images"):
            return [os.path.basename(file) for file in files], preprocessor(loaded.config)(files)
    source, data = open_split(arguments, loaded), loaded.config.data
    ids, canvases = first_images(
        source, arguments.count, canvas_size=data.canvas_size, num_threads=data.num_threads
    )
    if not ids:
        raise UserError(f"{source.name} {source.split}: none of the first records is an image")
    views = evaluation_images(loaded.config, jax.tree.map(jnp.asarray, canvases))
    return list(map(short_name, ids)), views


def _draw(
    loaded: "LoadedModel",
    attention: "Attention",
    names: list[str],
    images: "jax.Array",
    blocks: list[int],
    arguments: Any,
    folder: str,
) -> list[str]:
    """All figures; returns the names of the files."""
    import numpy as np

    from esvit_jax.analyze import pictures
    from esvit_jax.analyze.components import component_colors

    views = loaded.config.views
    shown = [pictures.to_picture(np.asarray(x), views.mean, views.std) for x in images]
    heads = attention.heads()
    pictures.entropy_figure(
        [block.entropy for block in heads], [block.keys for block in heads],
        [block.stage for block in heads], os.path.join(folder, "entropy.png"),
    )  # fmt: skip
    maps = [np.asarray(x) for x in attention.output.stage_maps]
    pictures.components_figure(
        shown, [component_colors(list(x)) for x in maps],
        [stage.stride for stage in loaded.model.backbone.stages],
        [f"stage {i + 1}" for i in range(len(maps))], os.path.join(folder, "regions.png"),
    )  # fmt: skip
    files = ["entropy.png", "regions.png"]
    for block in blocks:
        queries = _queries(attention, block, arguments.at or QUERIES)
        for i, picture in enumerate(shown):
            rows = []
            for title, query in queries.items():
                found, kept, bits = attention.seen_from(block, i, query, arguments.mass)
                place = picture, attention.stride(block)
                rows.append(pictures.AttendedPicture(*place, found, kept, query, bits, title))
            files.append(f"block_{block}_image_{i}.png")
            title = f"{names[i]}: block {block} (stage {attention.blocks[block].stage + 1})"
            pictures.attention_figure(rows, title, os.path.join(folder, files[-1]))
    return files


def _queries(
    attention: "Attention", block: int, points: Sequence[tuple[float, float]]
) -> dict[str, tuple[int, int] | None]:
    """What looks, by its title: the class token where a block has one, and tokens of the map."""
    queries: dict[str, tuple[int, int] | None] = {}
    if attention.blocks[block].num_global and attention.blocks[block].window_size is None:
        queries["from the class token"] = None
    for point in points:
        row, column = attention.token_at(block, *point)
        queries[f"from row {row}, column {column}"] = row, column
    return queries


def _table(heads: "list[HeadsOfBlock]") -> "Table":
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
        bits = (block.entropy.mean(), block.entropy.min(), block.entropy.max(), np.log2(block.keys))
        table.add_row(
            str(i), str(block.stage + 1), str(block.window_size or "map"), str(block.shift),
            str(len(block.entropy)), *(f"{x:.2f}" for x in bits),
        )  # fmt: skip
    return table
