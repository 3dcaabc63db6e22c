"""`esvit_jax.attention` and `esvit_jax.correspond`: what a backbone sees in some images."""

import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from rich.console import Console

from esvit_jax.analyze import pictures
from esvit_jax.analyze.attention import Attention, HeadsOfBlock
from esvit_jax.analyze.components import component_colors
from esvit_jax.analyze.matches import matches_in_images, matches_in_split
from esvit_jax.analyze.shown import Drawn, as_png
from esvit_jax.checkpoint import LoadedModel
from esvit_jax.data.look import first_images
from esvit_jax.data.sources import Source, open_source
from esvit_jax.errors import UserError, renamed
from esvit_jax.evaluate.correspondence import evaluate_correspondence
from esvit_jax.evaluate.features import evaluation_images
from esvit_jax.interop.exported import load_network
from esvit_jax.interop.load import names_of, preprocessor

# Shares of the height and width of an image: the tokens that look, where none are named.
POINTS = ((0.5, 0.5), (0.25, 0.25), (0.75, 0.6))
MASS = 0.6


def attention(
    network: LoadedModel | str | os.PathLike[str],
    images: Sequence[Any] | None = None,
    *,
    data: Source | str | None = None,
    split: str | None = None,
    key: str | None = None,
    count: int = 4,
    blocks: Sequence[int] | None = None,
    points: Sequence[tuple[float, float]] = POINTS,
    mass: float = MASS,
) -> Drawn:
    """Draws where the heads of a backbone look, and what its regions have in common.

        esvit_jax.attention("runs/first", ["cat.jpg", "dog.jpg"])

    Args:
      network: a workdir, a converted checkpoint or an export, or what was loaded of it.
      images: a list, each as `LoadedBackbone.preprocess` takes it; None takes some of a data set.
      data: as `config.data.name`, or an open source; None is what the run was evaluated on.
      split: as in TFDS; None is "train", or without `data` the run's test split.
      key: "teacher" or "student"; None is the one that evaluation uses.
      count: images of the data set, the first that can be read.
      blocks: to draw, from 0, negative ones from the last; None is the last of each of the last two
        stages.
      points: the tokens that look, by their place in shares of an image's height and width.
      mass: the share of a head's attention that the outlined tokens hold, in (0, 1].

    Returns:
      The regions of each stage in colours, "regions.png", their first three principal components;
      of each block and image, a picture of where each head looks from the points (of a ViT from the
      class token, too), "block_3_image_0.png"; and how widely every head of every block looks,
      "entropy.png", bits over all windows and tokens, which are the numbers, too.

    Raises:
      UserError: there is no such network, data, image or block, or the backbone has no attention.
      RunError: features are not finite.
    """
    if not all(0 <= share <= 1 for point in points for share in point):
        raise UserError("they must be shares in 0..1", argument="points", value=points)
    if not 0 < mass <= 1:
        raise UserError("it must be above 0 and at most 1", argument="mass", value=mass)
    loaded = _opened(network)
    drawn_blocks = _blocks(loaded, blocks)
    names, views = _images(loaded, images, data, split, count)
    found = Attention(loaded.model.backbone, loaded.network(key)["backbone"], views)
    heads = found.heads()
    numbers = [block._asdict() | {"entropy": block.entropy.tolist()} for block in heads]
    drawn = _where_heads_look(loaded, found, names, views, drawn_blocks, points, mass)
    drawn = _regions(loaded, found, views) | drawn | _entropy(heads)
    return Drawn(numbers, "entropy.json", drawn)


def correspond(
    network: LoadedModel | str | os.PathLike[str],
    images: Sequence[Any] | None = None,
    *,
    data: Source | str | None = None,
    split: str | None = None,
    key: str | None = None,
    count: int = 6,
    seed: int = 0,
) -> Drawn:
    """Matches the regions of images with those of their mirror images, jittered and grey.

        esvit_jax.correspond("runs/first")
        esvit_jax.correspond("runs/first", ["cat.jpg", "dog.jpg"])

    The paper's test of what the region loss teaches: of the ten surest matches of an image, how
    many hit the place that is truly the same?

    Args:
      network: a workdir, a converted checkpoint or an export, or what was loaded of it.
      images: one, to be matched with its mirror image, or two, with each other, as
        `LoadedBackbone.preprocess` takes them; None takes those of a data set.
      data: as `config.data.name`, or an open source; None is what the run was evaluated on.
      split: as in TFDS; None is "train", or without `data` the run's test split.
      key: "teacher" or "student"; None is the one that evaluation uses.
      count: images of the data set that are drawn, the first that can be read.
      seed: of the colours of the mirror images.

    Returns:
      A picture with lines between what was matched, blue for hits; of a data set "accuracy" (hits
      in percent), "distance" (pixels), "distance_cells" and "cutoff_similarity" of all its images.

    Raises:
      UserError: there is no such network, data or image.
      RunError: features are not finite.
    """
    loaded = _opened(network)
    if images is not None:
        pairs = matches_in_images(loaded, images, key=key, seed=seed)
        return Drawn([], "", {"matches.png": as_png(pictures.matches_figure, pairs)})
    source = _source(loaded, data, split)
    numbers = hits_in_split(loaded, source, key=key, seed=seed)
    pairs = matches_in_split(loaded, source, count, key=key, seed=seed)
    drawn = {"correspondence.png": as_png(pictures.matches_figure, pairs)} if pairs else {}
    return Drawn([numbers], "correspondence.json", drawn)


def hits_in_split(
    loaded: LoadedModel,
    source: Source,
    *,
    key: str | None = None,
    seed: int = 0,
    console: Console | None = None,
) -> dict[str, Any]:
    """What `evaluate_correspondence` measures, and of what."""
    result, images = evaluate_correspondence(loaded, source, key=key, seed=seed, console=console)
    return {
        "step": result.step,
        "key": loaded.chosen(key),
        "data": source.name,
        "split": source.split,
        "images": images,
        **result.values,
    }


def _opened(network: LoadedModel | str | os.PathLike[str]) -> LoadedModel:
    if isinstance(network, LoadedModel):
        return network
    with renamed(workdir="network"):
        return load_network(network)


def _source(loaded: LoadedModel, data: Source | str | None, split: str | None) -> Source:
    if isinstance(data, Source):
        return data
    own = loaded.config.data
    names = {
        "name": "data" if data else "config.data.name",
        "split": "split" if split or data else "config.data.test_split",
        "data_dir": "config.data.data_dir",
    }
    wanted = split or ("train" if data else own.test_split)
    with renamed(**names):
        return open_source(data or own.name, wanted, own.data_dir or None)


def _blocks(loaded: LoadedModel, wanted: Sequence[int] | None) -> list[int]:
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
                f"there are blocks 0 to {len(blocks) - 1}", argument="blocks", value=block
            )
    return [block % len(blocks) for block in wanted]


def _images(
    loaded: LoadedModel,
    images: Sequence[Any] | None,
    data: Source | str | None,
    split: str | None,
    count: int,
) -> tuple[list[str], Float[Array, "b h w 3"]]:
    """Names, and what a backbone takes.

    Raises:
      UserError: one is no image, or there is no such data.
    """
    if images is not None:
        return names_of(images), preprocessor(loaded.config)(images)
    source, own = _source(loaded, data, split), loaded.config.data
    ids, canvases = first_images(
        source, count, canvas_size=own.canvas_size, num_threads=own.num_threads
    )
    if not ids:
        raise UserError(f"{source.name} {source.split}: none of the first records is an image")
    views = evaluation_images(loaded.config, jax.tree.map(jnp.asarray, canvases))
    return list(map(pictures.short_name, ids)), views


def _shown(loaded: LoadedModel, views: Float[Array, "b h w 3"]) -> list[pictures.Picture]:
    normal = loaded.config.views
    return [pictures.to_picture(np.asarray(x), normal.mean, normal.std) for x in views]


def _entropy(heads: list[HeadsOfBlock]) -> dict[str, bytes]:
    figure = as_png(
        pictures.entropy_figure, [block.entropy for block in heads],
        [block.keys for block in heads], [block.stage for block in heads],
    )  # fmt: skip
    return {"entropy.png": figure}


def _regions(
    loaded: LoadedModel, found: Attention, views: Float[Array, "b h w 3"]
) -> dict[str, bytes]:
    """Those of all stages in colours."""
    maps = [np.asarray(x) for x in found.output.stage_maps]
    figure = as_png(
        pictures.components_figure, _shown(loaded, views),
        [component_colors(list(x)) for x in maps],
        [stage.stride for stage in loaded.model.backbone.stages],
        [f"stage {i + 1}" for i in range(len(maps))],
    )  # fmt: skip
    return {"regions.png": figure}


def _where_heads_look(
    loaded: LoadedModel,
    found: Attention,
    names: list[str],
    views: Float[Array, "b h w 3"],
    blocks: list[int],
    points: Sequence[tuple[float, float]],
    mass: float,
) -> dict[str, bytes]:
    """A figure for each block and image, with a row for each token that looks."""
    drawn = {}
    for block in blocks:
        queries = _queries(found, block, points)
        for i, picture in enumerate(_shown(loaded, views)):
            rows = []
            for title, query in queries.items():
                seen, kept, bits = found.seen_from(block, i, query, mass)
                place = picture, found.stride(block)
                rows.append(pictures.AttendedPicture(*place, seen, kept, query, bits, title))
            title = f"{names[i]}: block {block} (stage {found.blocks[block].stage + 1})"
            figure = as_png(pictures.attention_figure, rows, title)
            drawn[f"block_{block}_image_{i}.png"] = figure
    return drawn


def _queries(
    found: Attention, block: int, points: Sequence[tuple[float, float]]
) -> dict[str, tuple[int, int] | None]:
    """What looks, by its title: the class token where a block has one, and tokens of the map."""
    queries: dict[str, tuple[int, int] | None] = {}
    if found.blocks[block].num_global and found.blocks[block].window_size is None:
        queries["from the class token"] = None
    for point in points:
        row, column = found.token_at(block, *point)
        queries[f"from row {row}, column {column}"] = row, column
    return queries
