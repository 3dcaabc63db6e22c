"""`esvit neighbours`: which images a backbone takes for alike."""

import os
import re
from typing import TYPE_CHECKING, Any

from esvit_jax.commands.arguments import Parser, path, positive, several
from esvit_jax.commands.embedded import add_flags, features_of, open_all
from esvit_jax.errors import UserError, renamed

if TYPE_CHECKING:
    import numpy as np

    from esvit_jax.analyze.pictures import Neighbours
    from esvit_jax.checkpoint import LoadedModel
    from esvit_jax.data.sources import Source
    from esvit_jax.evaluate.cache import KeptFeatures

# Images of the data set whose neighbours are drawn where no flag names some, far from each other.
QUERIES = 6


def main(argv: list[str]) -> None:
    """`esvit neighbours`."""
    parser = Parser("neighbours", "Draws the images that are most like some image, on one sheet.")
    add_flags(parser, "neighbours.png")
    queries = parser.add_mutually_exclusive_group()
    queries.add_argument(
        "--images", type=several(path), metavar="A,B,…", help="image files to look for, in the data"
    )
    queries.add_argument("--of", metavar="I,J,…", help="or images of the data, by number from 0")
    parser.add_argument("--k", type=positive, default=8, help="neighbours (default: 8)")
    arguments = parser.parse_args(argv)
    console, loaded, source, folder = open_all(arguments)
    kept = features_of(loaded, source, arguments, console)
    rows = _rows(loaded, source, kept, arguments)

    from esvit_jax.analyze.pictures import neighbours_figure
    from esvit_jax.runlog.alive import say

    file = os.path.join(folder, "neighbours.png")
    neighbours_figure(rows, file)
    say(
        console,
        f"queries: {len(rows)}, each with those most like it of the {len(kept.labels)} images in "
        f"{source.name} {source.split}: {file}",
    )


def _rows(
    loaded: "LoadedModel", source: "Source", kept: "KeptFeatures", arguments: Any
) -> "list[Neighbours]":
    """The queries and what is found for them, ready to be drawn.

    Raises:
      UserError: an image cannot be read, is not in the data, or has nothing to be compared with.
    """
    import jax
    import numpy as np

    from esvit_jax.analyze.neighbours import nearest_images
    from esvit_jax.analyze.pictures import Neighbours, short_name, to_picture
    from esvit_jax.data.look import read_images
    from esvit_jax.evaluate.features import evaluation_images
    from esvit_jax.interop.load import read_canvases

    features, labels, config = kept.array(), kept.labels, loaded.config
    prepare = jax.jit(lambda canvases: evaluation_images(config, canvases))

    def pictures(canvases: "dict[str, np.ndarray]") -> "list[np.ndarray]":
        views = np.asarray(prepare(canvases))
        return [to_picture(view, config.views.mean, config.views.std) for view in views]

    if arguments.images:
        files = arguments.images
        backbone, params = loaded.model.backbone, loaded.network(arguments.key)["backbone"]
        with renamed(images="--images"):
            canvases = read_canvases(files, config.data.canvas_size)
        queries = np.asarray(jax.jit(backbone.forward)(params, prepare(canvases)).view_features)
        own = np.full(len(files), -1)
        shown, titles = pictures(canvases), [os.path.basename(file) for file in files]
    else:
        own = _numbers(arguments.of, len(features))
        if len(features) < 2:
            raise UserError(f"{source.name} {source.split} has one image, and so no neighbours")
        queries, titles = features[own], [short_name(str(kept.ids[i])) for i in own]
        shown = pictures(read_canvases(read_images(source, kept.ids, own), config.data.canvas_size))
    found, similarity = nearest_images(queries, features, arguments.k, leave_out=own)
    rows = []
    for i, (numbers, cosines) in enumerate(zip(found, similarity, strict=True)):
        label = labels[own[i]] if own[i] >= 0 else -1
        same = labels[numbers] == label if label >= 0 else None
        captions = [
            f"{source.class_names[labels[n]] if labels[n] >= 0 else ''} {cosine:.2f}".strip()
            for n, cosine in zip(numbers, cosines, strict=True)
        ]
        title = f"{titles[i]}\n{source.class_names[label]}" if label >= 0 else titles[i]
        images = read_images(source, kept.ids, numbers)
        like = pictures(read_canvases(images, config.data.canvas_size))
        rows.append(Neighbours(shown[i], title, like, captions, same))
    return rows


def _numbers(text: str | None, count: int) -> "np.ndarray":
    """Numbers of images; some from all over the data where no flag names any.

    Raises:
      UserError: there are no such images.
    """
    import numpy as np

    if not text:
        return np.unique(np.linspace(0, count - 1, QUERIES).astype(int))
    if not all(re.fullmatch("[0-9]+", x) and int(x) < count for x in text.split(",")):
        raise UserError(
            f"it must be numbers from 0 to {count - 1}, with commas", argument="--of", value=text
        )
    return np.array([int(part) for part in text.split(",")])
