"""Figures of a run, as PNG files: its loss curve, and the views that one image is cut into.

Figures are made without pyplot, so that nothing global is touched and no display is needed.
matplotlib is imported where it is used: a training run draws only at its end.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, UInt8

from esvit_jax.errors import UserError
from esvit_jax.runlog.writer import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours that most colour-blind readers tell apart (Okabe & Ito 2008).
BLACK, BLUE, ORANGE, GREEN, PURPLE = "#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7"
KNN_PREFIX = "knn/top1/"


def loss_figure(metrics_path: str | Path, out_path: str | Path) -> None:
    """Draws the losses of a `metrics.jsonl` over the steps and, if it has any, k-NN accuracy.

    Plotted are `loss`, `view_loss` and `region_loss` (in nats; a gap where a step was not
    finite) and, in a second panel, every `knn/top1/{k}` (in percent).

    Raises:
      UserError: the file is not there or no line has a `loss`.
    """
    from matplotlib.figure import Figure

    if not Path(metrics_path).is_file():
        raise UserError(f"{metrics_path}: no such file; give the metrics.jsonl of a workdir")
    records = read_metrics(metrics_path)
    losses = _curves(records, ("loss", "view_loss", "region_loss"))
    if "loss" not in losses:
        raise UserError(f"{metrics_path}: no line has a loss yet; train for a log interval")
    knn_names = {name for record in records for name in record if name.startswith(KNN_PREFIX)}
    knn = _curves(records, sorted(knn_names, key=lambda name: int(name.split("/")[-1])))

    heights = [3, 2] if knn else [1]
    figure = Figure(figsize=(8, 6 if knn else 4), layout="constrained")
    panels = figure.subplots(len(heights), sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    figure.suptitle("Training", fontweight="bold")
    labels = {"loss": "loss", "view_loss": "view loss", "region_loss": "region loss"}
    for name, color, width in zip(losses, (BLACK, BLUE, ORANGE), (2, 1.2, 1.2), strict=False):
        marker = "." if len(losses[name][0]) < 30 else None  # a lone point makes no line
        style = {"color": color, "linewidth": width, "marker": marker}
        panels[0].plot(*losses[name], **style, label=labels[name])
    _finish(panels[0], "loss (nats)")
    colors = (GREEN, PURPLE, BLUE, ORANGE, BLACK)
    for index, (name, curve) in enumerate(knn.items()):
        label = f"k = {name.removeprefix(KNN_PREFIX)}"
        color = colors[index % len(colors)]
        panels[1].plot(*curve, color=color, marker="o", markersize=4, label=label)
    if knn:
        _finish(panels[1], "k-NN top-1 (%)")
    panels[-1].set_xlabel("step")
    figure.savefig(out_path, dpi=150)


def views_figure(
    image: UInt8[np.ndarray, "h w 3"],
    views: Mapping[str, Float[np.ndarray, "v s s 3"]],
    mean: Sequence[float],
    std: Sequence[float],
    out_path: str | Path,
) -> None:
    """Draws one image and its views on a contact sheet, each view labelled with its name.

    Args:
      image: the image that the views were cut from; any size.
      views: `{"global": [2, g, g, 3], "local": [L, l, l, 3]}`, normalised; L may be 0.
      mean, std: of red, green, blue in 0..1, by which the views were normalised.
    """
    from matplotlib.figure import Figure

    def pixels(view: np.ndarray) -> np.ndarray:
        return np.clip(view * np.asarray(std) + np.asarray(mean), 0, 1)

    global_views = {f"global {i + 1}": pixels(view) for i, view in enumerate(views["global"])}
    local_views = {f"local {i + 1}": pixels(view) for i, view in enumerate(views["local"])}
    # At least four and at most eight in a row, and rows of equal length: local views are drawn
    # smaller than global ones, as they are.
    rows = math.ceil(len(local_views) / 8)
    columns = max(4, math.ceil(len(local_views) / max(rows, 1)))

    cell = 9.0 / columns
    figure = Figure(figsize=(9, 3.3 + rows * (cell + 0.2)), layout="constrained")
    # A third of the width holds a global view, and one part in `columns` a local view.
    grid = figure.add_gridspec(1 + rows, 3 * columns, height_ratios=[3.0] + [cell] * rows)
    large = {"image": image} | global_views
    for index, (title, picture) in enumerate(large.items()):
        axes = figure.add_subplot(grid[0, columns * index : columns * (index + 1)])
        _show(axes, picture, title)
    for index, (title, picture) in enumerate(local_views.items()):
        row, column = divmod(index, columns)
        axes = figure.add_subplot(grid[1 + row, 3 * column : 3 * (column + 1)])
        _show(axes, picture, title)
    figure.savefig(out_path, dpi=150)


def _curves(
    records: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values of each name that occurs; null becomes nan, which a plot leaves out."""
    curves = {}
    for name in names:
        points = [(line["step"], line[name]) for line in records if name in line]
        if points:
            values = [math.nan if value is None else value for _, value in points]
            curves[name] = ([step for step, _ in points], values)
    return curves


def _finish(axes: "Axes", label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_ylabel(label)
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    locator = MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)
    axes.xaxis.set_major_locator(locator)
    if len(axes.get_lines()) > 1 or label.startswith("k-NN"):
        axes.legend(frameon=False, ncols=5)


def _show(axes: "Axes", picture: np.ndarray, title: str) -> None:
    # The pixels of a tiny picture are what there is to see; a large one is better smoothed.
    interpolation = "nearest" if max(picture.shape[:2]) <= 64 else "auto"
    axes.imshow(picture, interpolation=interpolation)
    height, width = picture.shape[:2]
    axes.set_title(f"{title}  ({width} × {height})", fontsize=8)
    axes.set_axis_off()
