"""What a run shows when it ends: a table for each evaluation, and figures."""

import os
from collections.abc import Sequence
from typing import NamedTuple

from etils import epath
from rich.console import Console
from rich.table import Table

from esvit_jax.analyze.figures import loss_figure, views_figure
from esvit_jax.analyze.views import views_of_images
from esvit_jax.config import ConfigDict
from esvit_jax.data.sources import open_source
from esvit_jax.errors import renamed
from esvit_jax.evaluate.result import (
    RAW_PIXELS,
    TITLES,
    Result,
    by_evaluation,
    heading,
    results_of_lines,
    value_title,
)
from esvit_jax.runlog.alive import say
from esvit_jax.runlog.writer import read_metrics


def summarize(config: ConfigDict, workdir: str | os.PathLike[str], console: Console) -> None:
    """Prints what a run has learned so far, draws its figures, and says where they are.

    A run that was stopped before it logged a loss is said to have none yet.
    """
    metrics = epath.Path(workdir) / "metrics.jsonl"
    lines = read_metrics(metrics) if metrics.exists() else []
    for table in tables(results_of_lines(lines)):
        console.print(table)
    figures = epath.Path(workdir) / "figures"
    figures.mkdir(exist_ok=True)

    if any("loss" in line for line in lines):
        loss_figure(metrics, figures / "loss.png")
        say(console, f"the loss: {figures / 'loss.png'}")
    else:
        say(console, f"no loss was logged yet: config.log_every_steps is {config.log_every_steps}")
    draw_views(config, figures / "views.png")
    say(console, f"the views of one image: {figures / 'views.png'}")
    say(console, f"all of it and more on one page: esvit report --workdir={workdir}")


def tables(results: Sequence[Result]) -> list[Table]:
    """A table for each evaluation: its first quantity, a row for each kind of features."""
    return [_table(of_one) for of_one in by_evaluation(results).values()]


class Progress(NamedTuple):
    """What one evaluation has measured of each kind of features, the newest of each.

    Attributes:
      title: the evaluation and its first quantity.
      columns: what tells the values apart.
      rows: the features, and numbers; "" where there is none.
    """

    title: str
    columns: list[str]
    rows: list[tuple[str, list[str]]]


def progress(results: Sequence[Result]) -> Progress:
    """The results of one evaluation as a table of its first quantity."""
    kinds: dict[str, Result] = {}
    for result in results:  # of several of a kind the last
        if result.subject == RAW_PIXELS:
            kinds["raw pixels"] = result
        elif result.step == 0:
            kinds["teacher before training"] = result
        else:
            kinds["teacher"] = result
    evaluation, quantity = results[0].evaluation, results[0].first_quantity
    columns = dict.fromkeys(which for kind in kinds.values() for which in kind.quantity(quantity))
    rows = []
    for name, result in kinds.items():
        title = f"teacher after {result.step} steps" if name == "teacher" else name
        values = result.quantity(quantity)
        rows.append((title, [f"{values[w]:.1f}" if w in values else "" for w in columns]))
    lone = TITLES.get(quantity, "value")
    titles = [value_title(evaluation, which) if which else lone for which in columns]
    return Progress(heading(evaluation, quantity), titles, rows)


def _table(results: Sequence[Result]) -> Table:
    found = progress(results)
    table = Table("features", *found.columns, title=found.title)
    for name, values in found.rows:
        table.add_row(name, *values)
    return table


def draw_views(config: ConfigDict, path: str | os.PathLike[str]) -> None:
    """Draws the views of the first training image that can be read."""
    with renamed(
        name="config.data.name", split="config.data.train_split", data_dir="config.data.data_dir"
    ):
        source = open_source(
            config.data.name, config.data.train_split, config.data.data_dir or None
        )
    (viewed,) = views_of_images(config, source, 1)
    views_figure(
        viewed.image, viewed.views, viewed.boxes, config.views.mean, config.views.std, path
    )
