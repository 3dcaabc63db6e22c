"""Figures of what a backbone sees in images: matches, attention, features, neighbours.

Like `figures.py` these are made without pyplot. Pictures are f32[h, w, 3] in 0..1. Names of files
and classes are drawn as they are: what stands between two $ is no formula (`parse_math`).
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from esvit_jax.analyze.cells import middle, over_picture
from esvit_jax.analyze.figures import BLUE, GREY, ORANGE, SKY, SMALL, File, smoothing, write_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Picture = Float[np.ndarray, "_ _ 3"]


def to_picture(
    view: Float[np.ndarray, "_ _ 3"], mean: Sequence[float], std: Sequence[float]
) -> Picture:
    """Undoes the normalisation of a view."""
    return np.clip(view * np.asarray(std) + np.asarray(mean), 0, 1).astype(np.float32)


def short_name(id: str) -> str:
    """The id of a record, to stand above a picture: TFDS's without the name of its file.

    >>> short_name("mnist-test.array_record-00000-of-00001__7"), short_name("cats/tom.jpg")
    ('test 7', 'cats/tom.jpg')
    """
    found = re.fullmatch(r".*-([^-]+)\.[^-]+-(\d+)-of-\d+__(\d+)", id)
    if not found:
        return id
    split, shard, number = found.groups()
    return f"{split} {number}" if not int(shard) else f"{split} {int(shard)}/{number}"


class MatchedPair(NamedTuple):
    """Two pictures, and cells of their maps that were matched.

    Attributes:
      first, second: the pictures.
      widths: columns of the map of each.
      stride: pixels along a side of a cell.
      start, end: int[k], cells of the first and of the second, counted row by row.
      hit: bool[k], whether a match is the true one; None where nobody knows.
      title: to stand above them.
    """

    first: Picture
    second: Picture
    widths: tuple[int, int]
    stride: int
    start: Int[np.ndarray, " k"]
    end: Int[np.ndarray, " k"]
    hit: np.ndarray | None
    title: str


def matches_figure(pairs: Sequence[MatchedPair], out_path: File) -> None:
    """Draws pairs of pictures with a line for each match; two pairs in a row.

    Hits are blue, misses are orange and dashed; where nobody knows, all are blue.
    """
    from matplotlib.figure import Figure

    columns = min(2, len(pairs))
    rows = -(-len(pairs) // columns)
    figure = Figure(figsize=(5.2 * columns, 2.85 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, pair in zip(grid.flat, pairs, strict=False):
        _draw_pair(axes, pair)
    write_figure(figure, out_path)


def _draw_pair(axes: "Axes", pair: MatchedPair) -> None:
    from matplotlib.patches import ConnectionPatch

    gap = 0.06
    both = pair.first, pair.second
    heights = [picture.shape[0] / picture.shape[1] for picture in both]
    tallest = max(heights)
    axes.set_xlim(0, 2 + gap)
    axes.set_ylim(tallest, 0)
    axes.set_aspect("equal")
    axes.set_title(pair.title, fontsize=9, parse_math=False)
    offsets = (0.0, 1 + gap)
    for picture, left, height in zip(both, offsets, heights, strict=True):
        extent = (left, left + 1, height, 0)
        axes.imshow(picture, extent=extent, interpolation=smoothing(picture))

    def place(cell: int | np.integer, which: int) -> tuple[float, float]:
        height, width = both[which].shape[:2]
        row, column = divmod(int(cell), pair.widths[which])
        x, y = middle(column, pair.stride, width), middle(row, pair.stride, height)
        return offsets[which] + x / width, y / width

    hits = np.ones(len(pair.start), bool) if pair.hit is None else pair.hit
    for start, end, hit in zip(pair.start, pair.end, hits, strict=True):
        ends = place(start, 0), place(end, 1)
        color, style = (BLUE, "-") if hit else (ORANGE, (0, (4, 2)))
        # Bent, so that lines of one row do not hide each other.
        line = ConnectionPatch(
            *ends, "data", "data", color=color, linestyle=style, linewidth=1.3,
            connectionstyle="arc3,rad=-0.06",
        )  # fmt: skip
        line.set_path_effects(_halo(2.6))
        axes.add_artist(line)
        axes.plot(*zip(*ends, strict=True), "o", color=color, markersize=3.2,
                  markeredgecolor="white", markeredgewidth=0.7)  # fmt: skip


def _halo(width: float) -> list:
    """White around a line, so that it is seen on any picture."""
    from matplotlib import patheffects

    return [patheffects.withStroke(linewidth=width, foreground="white", alpha=0.75)]


class AttendedPicture(NamedTuple):
    """One picture, and where each head looks from one of its tokens.

    Attributes:
      picture: the image.
      stride: pixels of it along a side of a token.
      maps: f32[heads, h, w], what each token of the map gets.
      kept: bool[heads, h, w], the tokens that hold a share of the mass.
      query: row and column of the token that looks; None where it is not on the map.
      entropy: f32[heads], bits.
      title: to stand before them.
    """

    picture: Picture
    stride: int
    maps: Float[np.ndarray, "heads h w"]
    kept: np.ndarray
    query: tuple[int, int] | None
    entropy: Float[np.ndarray, " heads"]
    title: str


def attention_figure(rows: Sequence[AttendedPicture], title: str, out_path: File) -> None:
    """Draws a row of pictures, one a head, for each query: heads by falling entropy.

    A picture glows where a head looks; the tokens that hold a share of its mass have an outline,
    the token that looks has a mark. What no token covers is plain grey.
    """
    from matplotlib.figure import Figure

    most = max(len(row.maps) for row in rows)
    columns = -(-most // -(-most // 8))  # at most eight, and rows of one length if it can be
    lines = [-(-len(row.maps) // columns) for row in rows]
    cell = 1.35
    figure = Figure(
        figsize=(cell * (columns + 1), (cell + 0.24) * sum(lines)), layout="constrained"
    )
    figure.suptitle(title, fontsize=10, parse_math=False)
    grid = figure.subplots(sum(lines), columns + 1, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    top = 0
    for row, count in zip(rows, lines, strict=True):
        plain = grid[top, 0]
        plain.imshow(row.picture, interpolation=smoothing(row.picture))
        plain.set_title(row.title, fontsize=8)
        _mark(plain, row)
        for i, head in enumerate(np.argsort(-row.entropy, kind="stable")):
            axes = grid[top + i // columns, 1 + i % columns]
            _draw_attended(axes, row, int(head))
        top += count
    write_figure(figure, out_path)


def _draw_attended(axes: "Axes", row: AttendedPicture, head: int) -> None:
    from matplotlib import colormaps

    weights = row.maps[head] / max(row.maps[head].max(), 1e-12)
    size = row.picture.shape[:2]
    weights = over_picture(weights, row.stride, size)
    gray = row.picture.mean(-1, keepdims=True)
    heat = 0.45 * gray + 0.55 * colormaps["inferno"](weights)[..., :3]
    shown = np.where(np.isnan(weights)[..., None], gray, heat)
    axes.imshow(shown, interpolation=smoothing(row.picture))
    axes.set_title(f"head {head}  {row.entropy[head]:.1f} bits", fontsize=7)
    _outline(axes, row.kept[head], row.stride, size)
    _mark(axes, row)


def _outline(axes: "Axes", kept: np.ndarray, stride: int, size: tuple[int, int]) -> None:
    """The border between the tokens that are kept and all others, as far as it is on a picture."""
    from matplotlib.collections import LineCollection

    padded = np.pad(kept, 1)
    corners = [((y, x - 1), (y, x)) for y, x in np.argwhere(padded[:-1] != padded[1:])]
    corners += [((y - 1, x), (y, x)) for y, x in np.argwhere(padded[:, :-1] != padded[:, 1:])]
    height, width = size
    lines = [
        [(min(x * stride, width) - 0.5, min(y * stride, height) - 0.5) for y, x in ends]
        for ends in corners
    ]
    axes.add_collection(LineCollection(lines, colors=SKY, linewidths=1.1))


def _mark(axes: "Axes", row: AttendedPicture) -> None:
    if row.query is None:
        return
    y, x = (
        middle(cell, row.stride, side)
        for cell, side in zip(row.query, row.picture.shape[:2], strict=True)
    )
    axes.plot(x - 0.5, y - 0.5, "+", color="white", markersize=9, markeredgewidth=2.6)
    axes.plot(x - 0.5, y - 0.5, "+", color=BLUE, markersize=8, markeredgewidth=1.4)


def entropy_figure(
    entropies: Sequence[Float[np.ndarray, " _"]],
    keys: Sequence[int],
    stages: Sequence[int],
    out_path: File,
) -> None:
    """Draws the entropy of every head over the blocks, and the most that there can be.

    Args:
      entropies: bits, of the heads of each block.
      keys: tokens that a token of each block can attend to.
      stages: of each block.
      out_path: PNG file.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.subplots()
    for block, (values, most) in enumerate(zip(entropies, keys, strict=True)):
        axes.plot([block - 0.4, block + 0.4], [np.log2(most)] * 2, color=GREY, linewidth=1.2,
                  label="all tokens of a window alike" if not block else None)  # fmt: skip
        axes.plot([block] * len(values), values, "o", color=BLUE, alpha=0.55, markersize=4.5,
                  label="a head" if not block else None)  # fmt: skip
        axes.plot([block - 0.25, block + 0.25], [np.mean(values)] * 2, color=ORANGE, linewidth=2,
                  label="mean of the heads" if not block else None)  # fmt: skip
    for block in range(1, len(stages)):
        if stages[block] != stages[block - 1]:
            axes.axvline(block - 0.5, color="0.9", linewidth=1)
    for stage in dict.fromkeys(stages):
        first = stages.index(stage)
        axes.annotate(f"stage {stage + 1}", (first - 0.4, 1.0), xycoords=("data", "axes fraction"),
                      xytext=(0, 3), textcoords="offset points", **SMALL)  # fmt: skip
    axes.set_xticks(range(len(entropies)))
    axes.set_xlabel("block")
    axes.set_ylabel("entropy of attention (bits)")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.92")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    write_figure(figure, out_path)


def components_figure(
    pictures: Sequence[Picture],
    colors: Sequence[Sequence[Picture]],
    strides: Sequence[int],
    titles: Sequence[str],
    out_path: File,
) -> None:
    """Draws each picture and, beside it, the colours that the cells of its maps have.

    Args:
      pictures: b of them.
      colors: for each map, the colours of its cells in every picture.
      strides: of each map, pixels along a side of a cell.
      titles: of the maps.
      out_path: PNG file.
    """
    from matplotlib.figure import Figure

    rows, columns, cell = len(pictures), 1 + len(colors), 1.9
    figure = Figure(figsize=(cell * columns, cell * rows + 0.3), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, title in zip(grid[0], ("image", *titles), strict=True):
        axes.set_title(title, fontsize=9)
    for i, picture in enumerate(pictures):
        grid[i, 0].imshow(picture, interpolation=smoothing(picture))
        for axes, of_map, stride in zip(grid[i, 1:], colors, strides, strict=True):
            height, width = of_map[i].shape[:2]
            extent = (0, width * stride, height * stride, 0)
            axes.imshow(of_map[i], interpolation="nearest", extent=extent)
            axes.set(xlim=(0, picture.shape[1]), ylim=(picture.shape[0], 0))
    for axes in grid.flat:
        axes.set_axis_off()
    write_figure(figure, out_path)


class Neighbours(NamedTuple):
    """A picture, and those that are most like it.

    Attributes:
      query, title: the picture, and what it is.
      found: the others, the most similar first.
      captions: of each.
      same: bool[k], whether each is of the query's class; None where nobody knows.
    """

    query: Picture
    title: str
    found: Sequence[Picture]
    captions: Sequence[str]
    same: np.ndarray | None


def neighbours_figure(rows: Sequence[Neighbours], out_path: File) -> None:
    """Draws a contact sheet: a row for each query; a frame says whether a class is the query's."""
    from matplotlib.figure import Figure

    columns, cell = 1 + max(len(row.found) for row in rows), 1.25
    figure = Figure(figsize=(cell * columns, (cell + 0.25) * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for line, row in zip(grid, rows, strict=True):
        _picture(line[0], row.query, row.title, None)
        for i, axes in enumerate(line[1 : 1 + len(row.found)]):
            color = None if row.same is None else BLUE if row.same[i] else ORANGE
            _picture(axes, row.found[i], row.captions[i], color)
    write_figure(figure, out_path)


def _picture(axes: "Axes", picture: Picture, title: str, frame: str | None) -> None:
    axes.imshow(picture, interpolation=smoothing(picture))
    axes.set_title(title, fontsize=7, color=frame or "black", parse_math=False)
    if frame:
        axes.set_axis_on()
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set(color=frame, linewidth=2)


def map_figure(
    points: Float[np.ndarray, "n 2"],
    labels: Int[np.ndarray, " n"] | None,
    class_names: Sequence[str],
    title: str,
    out_path: File,
) -> None:
    """Draws images as points, in the colours of their classes if there are at most 20.

    Args:
      points: where they are.
      labels: classes from 0, -1 for none; None where there are no labels.
      class_names: of the classes.
      title: to stand above it.
      out_path: PNG file.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots()
    size = float(np.clip(15_000 / len(points), 4, 40))
    if labels is None or len(class_names) > 20:
        axes.scatter(*points.T, s=size, color=BLUE, alpha=0.5, linewidths=0)
    else:
        colors = colormaps["tab10" if len(class_names) <= 10 else "tab20"]
        for label in range(len(class_names)):
            own = points[labels == label]
            axes.scatter(
                *own.T, s=size, color=colors(label), alpha=0.7, linewidths=0, label="class"
            )
        legend = axes.legend(
            frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), markerscale=2
        )
        for handle in filter(None, legend.legend_handles):
            handle.set_alpha(1.0)
        # Set as they are: a label that begins with _ would be left out.
        for text, name in zip(legend.get_texts(), class_names, strict=True):
            text.set(text=name, parse_math=False)
    axes.set_title(title, fontsize=10, parse_math=False)
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("0.85")
    write_figure(figure, out_path)
