"""Figures of a run, as PNG files: its curves, and the views that one image is cut into.

Figures are made without pyplot, so that nothing global is touched and no display is needed.
matplotlib is imported where it is used: a training run draws only at its end.
"""

import io
import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float, Int, UInt8

from esvit_jax.errors import UserError
from esvit_jax.evaluate.result import (
    RAW_PIXELS,
    TEACHER,
    Result,
    by_evaluation,
    heading,
    results_of_lines,
    value_title,
)
from esvit_jax.runlog.writer import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that most colour-blind readers tell apart (Okabe & Ito 2008). Each means one thing in a
# figure: losses and views have hues, what an evaluation measured has shades of green.
BLACK, BLUE, ORANGE, GREY = "#000000", "#0072B2", "#D55E00", "#777777"
SKY, YELLOW, PURPLE = "#56B4E9", "#E69F00", "#CC79A7"
LIGHT_GREEN, DARK_GREEN = (0.55, 0.83, 0.65), (0.0, 0.35, 0.22)
LOSSES = {"loss": ("loss", BLACK, 2.0), "view_loss": ("view loss", BLUE, 1.2),
          "region_loss": ("region loss", ORANGE, 1.2)}  # fmt: skip
SMALL = {"fontsize": 8, "color": "0.35"}
File = str | os.PathLike[str] | io.BytesIO  # where a figure goes
# A rise of the loss is told from noise by this share of all that the loss moves, in a run of at
# least so many points.
CLEAR_RISE, ENOUGH_POINTS = 0.2, 20


def loss_figure(metrics_path: str | os.PathLike[str], out_path: str | os.PathLike[str]) -> None:
    """Draws the losses of a `metrics.jsonl` over the steps and, below, what evaluations measured.

    Plotted are `loss`, `view_loss` and `region_loss` (in nats; a gap where a step was not
    finite). Each evaluation has a panel of its own with its first quantity (of k-NN: top-1) of the
    teacher, and horizontal lines for what it is compared with, at their best: raw pixels, and the
    teacher before training.

    Raises:
      UserError: the file is not there or no line has a `loss`.
    """
    from matplotlib.figure import Figure

    if not epath.Path(metrics_path).is_file():
        raise UserError(f"{metrics_path}: no such file; give the metrics.jsonl of a workdir")
    lines = read_metrics(metrics_path)
    losses = {name: curve(lines, name) for name in LOSSES}
    if not losses["loss"].steps:
        raise UserError(f"{metrics_path}: no line has a loss yet; train for a log interval")
    evaluations = by_evaluation(results_of_lines(lines))

    figure = Figure(figsize=(8, 4 + 2.6 * len(evaluations)), layout="constrained")
    panels = figure.subplots(
        1 + len(evaluations), sharex=True, squeeze=False,
        height_ratios=[3] + [2] * len(evaluations),
    )[:, 0]  # fmt: skip
    for name, (label, color, width) in LOSSES.items():
        of_one = losses[name]
        if of_one.steps:
            marker = "." if len(of_one.steps) < 30 else None  # a lone point makes no line
            panels[0].plot(*of_one, color=color, linewidth=width, marker=marker, label=label)
    _explain_rise(panels[0], losses["loss"])
    _finish(panels[0], "loss (nats)")
    for axes, results in zip(panels[1:], evaluations.values(), strict=True):
        _draw_evaluation(axes, results)
    panels[-1].set_xlabel("step")
    write_figure(figure, out_path)


class Curve(NamedTuple):
    """Values over steps; nan where there is none."""

    steps: list[int]
    values: list[float]


def curve(lines: Sequence[Mapping[str, Any]], name: str) -> Curve:
    """One scalar of the lines of a metrics.jsonl that have it; one that was not finite is nan."""
    points = [(line["step"], line[name]) for line in lines if name in line]
    return Curve([step for step, _ in points], [math.nan if x is None else x for _, x in points])


def first_rise(curve: Curve) -> tuple[int, int] | None:
    """The steps from which and to which a loss clearly rises in the first half of a run.

    None for a loss that only falls or only jumps about.
    """
    values = np.asarray(curve.values)
    steps = np.asarray(curve.steps)[np.isfinite(values)]
    values = values[np.isfinite(values)]
    if len(values) < ENOUGH_POINTS:
        return None
    reach = max(1, len(values) // 20)
    smooth = np.array(
        [values[max(0, i - reach) : i + reach + 1].mean() for i in range(len(values))]
    )
    lowest = np.minimum.accumulate(smooth)
    rise = (smooth - lowest).max()
    top = int(np.argmax(smooth - lowest >= 0.95 * rise))
    bottom = int(np.argmin(smooth[: top + 1]))
    if not rise or rise < CLEAR_RISE * np.ptp(smooth) or bottom > len(values) // 2:
        return None
    return int(steps[bottom]), int(steps[top])


def _explain_rise(axes: "Axes", loss: Curve) -> None:
    """Marks the rise that puzzles whoever sees the loss of such a run for the first time.

    A new teacher says much the same of every image, which a student soon learns; then the centers
    have caught up and take just that away.
    """
    if not (rise := first_rise(loss)):
        return
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.17 * (high - low))
    axes.axvspan(*rise, color="0.93", zorder=0)
    axes.annotate(
        "the centers take away what the teacher says of all images alike;\n"
        "how images differ is harder to predict: the loss rises before it falls",
        (rise[0], 0.985), xycoords=("data", "axes fraction"), xytext=(4, 0),
        textcoords="offset points", va="top", **SMALL,
    )  # fmt: skip


def evaluation_curves(
    results: Sequence[Result], quantity: str
) -> tuple[dict[str, Curve], dict[str, float]]:
    """One quantity of the results of one evaluation, in order.

    Returns:
      The teacher's curves by what tells its values apart, {"10": …}, and what they are compared
      with, at its best: raw pixels, and the teacher before training.
    """
    curves: dict[str, Curve] = {}
    compared: dict[str, float] = {}
    for result in results:
        values = result.quantity(quantity)
        if result.subject != TEACHER or result.step is None:
            name = "raw pixels" if result.subject == RAW_PIXELS else result.subject
            compared[name] = max(values.values())
            continue
        if result.step == 0:
            compared["untrained"] = max(values.values())
        for which, value in values.items():
            of_one = curves.setdefault(which, Curve([], []))
            of_one.steps.append(result.step)
            of_one.values.append(value)
    return curves, compared


def _draw_evaluation(axes: "Axes", results: Sequence[Result]) -> None:
    """The first quantity of one evaluation: the teacher's curves, and lines to compare with."""
    quantity = results[0].first_quantity
    curves, compared = evaluation_curves(results, quantity)
    for (name, value), style in zip(compared.items(), ("--", ":", "-."), strict=False):
        axes.axhline(value, color=GREY, linewidth=1.2, linestyle=style, label=name)
    for index, (which, of_one) in enumerate(curves.items()):
        share = index / max(1, len(curves) - 1)
        color = tuple((1 - share) * np.array(DARK_GREEN) + share * np.array(LIGHT_GREEN))
        label = value_title(results[0].evaluation, which)
        axes.plot(*of_one, color=color, marker="o", markersize=3.5, linewidth=1.4, label=label)
    _finish(axes, heading(results[0].evaluation, quantity))


def views_figure(
    image: UInt8[np.ndarray, "h w 3"],
    views: Mapping[str, Float[np.ndarray, "v s s 3"]],
    boxes: Int[np.ndarray, "n 4"],
    mean: Sequence[float],
    std: Sequence[float],
    out_path: str | os.PathLike[str],
) -> None:
    """Draws one image with the boxes that its views show, and the views, each with its name.

    Args:
      image: the image that the views were cut from; any size.
      views: `{"global": [2, g, g, 3], "local": [L, l, l, 3]}`, normalised; L may be 0.
      boxes: y, x, height, width in pixels of the image, of the global views and then the local
        ones.
      mean, std: of red, green, blue in 0..1, by which the views were normalised.
    """
    from matplotlib.figure import Figure

    def pixels(view: np.ndarray) -> np.ndarray:
        return np.clip(view * np.asarray(std) + np.asarray(mean), 0, 1)

    global_views = {f"global {i + 1}": pixels(view) for i, view in enumerate(views["global"])}
    local_views = {f"local {i + 1}": pixels(view) for i, view in enumerate(views["local"])}
    # At most eight in a row, and rows of equal length, or as near to it as can be.
    rows = math.ceil(len(local_views) / 8)
    columns = max(4, math.ceil(len(local_views) / max(rows, 1)))
    cell = 9.0 / columns
    figure = Figure(figsize=(9, 3.3 + rows * (cell + 0.25)), layout="constrained")
    heights = [3.0] + [cell] * rows
    grid = figure.add_gridspec(1 + rows, 1, height_ratios=heights)
    colors = dict(zip((*global_views, *local_views), _box_colors(len(local_views)), strict=True))
    top = grid[0].subgridspec(1, 3, wspace=0.03)
    axes = figure.add_subplot(top[0])
    _show(axes, image, "image")
    for (name, color), box in zip(colors.items(), boxes, strict=True):
        _draw_box(axes, box, color, name)
    for index, (name, picture) in enumerate(global_views.items()):
        _show(figure.add_subplot(top[1 + index]), picture, name, colors[name])
    names = np.array_split(list(local_views), rows) if rows else []
    for row, in_row in enumerate(names):
        cells = grid[1 + row].subgridspec(1, len(in_row), wspace=0.03)
        for column, name in enumerate(in_row):
            _show(figure.add_subplot(cells[column]), local_views[name], name, colors[name])
    write_figure(figure, out_path)


def _box_colors(num_local: int) -> list[str]:
    """A colour of its own for each global view, and four in turn for the local ones."""
    local = (SKY, YELLOW, PURPLE, "#009E73")
    return [BLUE, ORANGE, *(local[i % len(local)] for i in range(num_local))]


def _draw_box(axes: "Axes", box: np.ndarray, color: str, name: str) -> None:
    from matplotlib.patches import Rectangle

    y, x, height, width = (float(number) for number in box)
    style = {"linewidth": 2.2 if name.startswith("global") else 1.3, "fill": False}
    rectangle = Rectangle((x - 0.5, y - 0.5), width, height, edgecolor=color, **style)
    rectangle.set_clip_on(False)  # half of a line at the edge of the image lies beside it
    axes.add_patch(rectangle)


def write_figure(figure: "Figure", path: File) -> None:
    """Writes a figure as PNG: to memory, or a file whose folder is made, local or in a bucket."""
    png = path if isinstance(path, io.BytesIO) else io.BytesIO()
    figure.savefig(png, dpi=150)
    if not isinstance(path, io.BytesIO):
        epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
        epath.Path(path).write_bytes(png.getvalue())


def _finish(axes: "Axes", label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_ylabel(label)
    axes.grid(color="0.92")
    axes.spines[["top", "right"]].set_visible(False)
    locator = MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)
    axes.xaxis.set_major_locator(locator)
    if len(axes.get_lines()) > 1:
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def smoothing(picture: np.ndarray) -> str:
    """The pixels of a tiny picture are what there is to see; a large one is better smoothed."""
    return "nearest" if max(picture.shape[:2]) <= 64 else "auto"


def _show(axes: "Axes", picture: np.ndarray, title: str, color: str = BLACK) -> None:
    axes.imshow(picture, interpolation=smoothing(picture))
    height, width = picture.shape[:2]
    axes.set_title(f"{title}  ({width} × {height})", fontsize=8, color=color)
    axes.set_axis_off()
