"""`esvit map`: all images of a data set in a plane."""

import os

from esvit_jax.commands.arguments import Parser
from esvit_jax.commands.embedded import add_flags, features_of, open_all
from esvit_jax.errors import renamed


def main(argv: list[str]) -> None:
    """`esvit map`."""
    parser = Parser("map", "Draws all images of a data set as points, like ones close together.")
    add_flags(parser, "map.png")
    parser.add_argument(
        "--method", choices=("pca", "tsne", "umap"), default="tsne",
        help="umap needs the extra umap (default: tsne)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of tsne and umap (default: 0)")
    arguments = parser.parse_args(argv)
    console, loaded, source, folder = open_all(arguments)
    kept = features_of(loaded, source, arguments, console)

    from esvit_jax.analyze.neighbours import map_images
    from esvit_jax.analyze.pictures import map_figure
    from esvit_jax.runlog.alive import say, signs_of_life

    with (
        signs_of_life(lambda: f"{arguments.method} of {len(kept.labels)} images", console),
        renamed(method="--method", seed="--seed"),
    ):
        points = map_images(kept.array(), arguments.method, arguments.seed)
    file = os.path.join(folder, "map.png")
    labels = kept.labels if source.num_classes else None
    title = f"{source.name} {source.split}, {arguments.method} of the view features"
    map_figure(points, labels, source.class_names, title, file)
    say(console, f"{len(points)} images: {file}")
