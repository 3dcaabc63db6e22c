"""What a finished run shows: a table of accuracies, and figures."""

from pathlib import Path

import jax
import numpy as np
from rich.table import Table

from esvit_jax.analyze.figures import loss_figure, views_figure
from esvit_jax.config import ConfigDict
from esvit_jax.data.augment import augment
from esvit_jax.data.loader import eval_batches
from esvit_jax.data.sources import open_source
from esvit_jax.evaluate.result import RAW_PIXELS, Result, results_of_lines
from esvit_jax.runlog.writer import read_metrics


def knn_summary(workdir: str) -> Table | None:
    """What the run's k-NN evaluations say it learned, a row each; None if there were none."""
    lines = read_metrics(Path(workdir) / "metrics.jsonl")
    results = [r for r in results_of_lines(lines) if r.evaluation == "knn"]
    if not results:
        return None
    rows: dict[str, Result] = {}
    for result in results:  # of several of a kind the last
        if result.subject == RAW_PIXELS:
            rows["raw pixels"] = result
        elif result.step == 0:
            rows["teacher before training"] = result
        else:
            rows["teacher"] = result
    ks = results[-1].quantity("top1")
    table = Table("features", *(f"k = {k}" for k in ks), title="k-NN top-1 on the test split, %")
    for name, result in rows.items():
        title = f"teacher after {result.step} steps" if name == "teacher" else name
        table.add_row(title, *(f"{x:.1f}" for x in result.quantity("top1").values()))
    return table


def draw_figures(config: ConfigDict, workdir: str) -> list[Path]:
    """Draws the loss curve and the views of the first training image; returns their paths."""
    directory = Path(workdir) / "figures"
    directory.mkdir(exist_ok=True)
    source = open_source(config.data.name, config.data.train_split, config.data.data_dir or None)
    batches = eval_batches(source, batch_size=1, canvas_size=config.data.canvas_size, num_threads=1)
    batch = next(batches)
    make_views = jax.jit(lambda keys, canvas, size: augment(keys, canvas, size, config.views))
    keys = jax.random.split(jax.random.key(config.seed), 1)
    views = make_views(keys, batch["canvas"], batch["size"])
    views = {name: np.asarray(stack[:, 0]) for name, stack in views.items()}
    paths = [directory / "loss.png", directory / "views.png"]
    loss_figure(Path(workdir) / "metrics.jsonl", paths[0])
    height, width = batch["size"][0]
    image = batch["canvas"][0, :height, :width]
    views_figure(image, views, config.views.mean, config.views.std, paths[1])
    return paths
