"""What a run shows when it ends: a table for each evaluation, and figures."""

import os
from collections.abc import Sequence

import jax
import numpy as np
from etils import epath
from rich.console import Console
from rich.table import Table

from esvit_jax.analyze.figures import loss_figure, views_figure
from esvit_jax.config import ConfigDict
from esvit_jax.data.augment import augment, sample_parameters
from esvit_jax.data.loader import eval_batches
from esvit_jax.data.sources import open_source
from esvit_jax.errors import renamed
from esvit_jax.evaluate.result import (
    RAW_PIXELS,
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


def tables(results: Sequence[Result]) -> list[Table]:
    """A table for each evaluation: its first quantity, a row for each kind of features."""
    return [_table(of_one) for of_one in by_evaluation(results).values()]


def _table(results: Sequence[Result]) -> Table:
    rows: dict[str, Result] = {}
    for result in results:  # of several of a kind the last
        if result.subject == RAW_PIXELS:
            rows["raw pixels"] = result
        elif result.step == 0:
            rows["teacher before training"] = result
        else:
            rows["teacher"] = result
    evaluation, quantity = results[0].evaluation, results[0].first_quantity
    columns = dict.fromkeys(which for row in rows.values() for which in row.quantity(quantity))
    titles = (value_title(evaluation, which) for which in columns)
    table = Table("features", *titles, title=heading(evaluation, quantity))
    for name, result in rows.items():
        title = f"teacher after {result.step} steps" if name == "teacher" else name
        values = result.quantity(quantity)
        table.add_row(title, *(f"{values[w]:.1f}" if w in values else "" for w in columns))
    return table


def draw_views(config: ConfigDict, path: str | os.PathLike[str]) -> None:
    """Draws the views of the first training image that can be read."""
    with renamed(
        name="config.data.name", split="config.data.train_split", data_dir="config.data.data_dir"
    ):
        source = open_source(
            config.data.name, config.data.train_split, config.data.data_dir or None
        )
    batches = eval_batches(source, batch_size=1, canvas_size=config.data.canvas_size, num_threads=1)
    batch = next(batch for batch in batches if batch["mask"][0])

    @jax.jit
    def cut(key, canvas, size):
        views = augment(key[None], canvas, size, config.views)
        return views, sample_parameters(key, size[0], config.views).box

    key = jax.random.split(jax.random.key(config.seed), 1)[0]
    views, boxes = cut(key, batch["canvas"], batch["size"])
    height, width = batch["size"][0]
    views_figure(
        batch["canvas"][0, :height, :width],
        {name: np.asarray(stack[:, 0]) for name, stack in views.items()},
        np.asarray(boxes),
        config.views.mean,
        config.views.std,
        path,
    )
