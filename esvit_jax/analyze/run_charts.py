"""Which curves of a run are worth a look, and what to look for in each."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from esvit_jax.analyze.charts import STYLES, Chart, has_points
from esvit_jax.analyze.figures import Curve, curve, evaluation_curves
from esvit_jax.evaluate.result import Result, by_evaluation, heading, value_title


class Kind(NamedTuple):
    """A chart of scalars of training.

    Attributes:
      title: with the unit.
      about: what to look for.
      names: of the scalars, and how they are called in the chart.
    """

    title: str
    about: str
    names: Mapping[str, str]


KINDS = (
    Kind(
        "Loss (nats)", "It may rise before it falls; at ln K nothing is learned.",
        {"loss": "loss", "view_loss": "view loss", "region_loss": "region loss"},
    ),
    Kind(
        "Entropy (share of ln K)", "At 1 all prototypes are alike, at 0 there is one answer.",
        {"teacher_entropy": "teacher", "student_entropy": "student"},
    ),
    Kind(
        "KL, teacher to student (nats)", "What is left to learn; at 0 nothing is.",
        {"teacher_student_kl": "KL"},
    ),
    Kind(
        "Spread of features", "1 is evenly over all directions; below 0.05 images look alike.",
        {"feature_std": "spread"},
    ),
    Kind(
        "Effective rank of features", "How many directions they fill; 1 is a collapse.",
        {"feature_rank": "rank"},
    ),
    Kind(
        "Norms", "Of the gradient before it is clipped, and of the view head's center.",
        {"gradient_norm": "gradient", "center_norm": "center"},
    ),
    Kind("Learning rate", "A line up, then half a cosine.", {"learning_rate": "learning rate"}),
    Kind("Teacher temperature", "Lower is sharper.", {"teacher_temp": "temperature"}),
    Kind("Teacher momentum", "At 1 the teacher stands still.", {"teacher_momentum": "momentum"}),
    Kind("Weight decay", "Rises to the end.", {"weight_decay": "weight decay"}),
    Kind("Pace (images/s)", "Without evaluations.", {"img_per_s": "images/s"}),
    Kind(
        "Shares of time", "Goodput is time spent on steps; waiting is for images.",
        {"goodput": "goodput", "data_wait_share": "waiting", "mfu": "MFU"},
    ),
    Kind("Skipped steps", "Not finite, so far.", {"skipped_steps": "skipped"}),
)  # fmt: skip


def training_charts(lines: Sequence[Mapping[str, Any]], num_prototypes: int | None) -> list[Chart]:
    """The curves that lines of metrics have; `skipped_steps` only where there are any.

    Args:
      lines: of a metrics.jsonl, numbers or None.
      num_prototypes: K; None where nobody knows.
    """
    charts = []
    for kind in KINDS:
        curves = {label: curve(lines, name) for name, label in kind.names.items()}
        curves = {label: found for label, found in curves.items() if has_points(found)}
        if not curves or (kind.title == "Skipped steps" and not any(curves["skipped"].values)):
            continue
        about, levels = kind.about, {}
        if num_prototypes and "view loss" in curves:
            levels = {"ln K": math.log(num_prototypes)}
        elif "loss" in curves:  # of another kind, where ln K says nothing
            about = ""
        charts.append(Chart(kind.title, about, curves, levels))
    return charts


def evaluation_charts(results: Sequence[Result]) -> Iterator[Chart]:
    """The first quantity of each evaluation over the steps, as far as there is one to see."""
    for evaluation, found in by_evaluation(results).items():
        quantity = found[0].first_quantity
        of_it = [result for result in found if result.quantity(quantity)]
        curves, levels = evaluation_curves(of_it, quantity)
        named = {value_title(evaluation, which): of_one for which, of_one in curves.items()}
        shown: dict[str, Curve] = dict(list(named.items())[:STYLES])
        if any(len(of_one.steps) > 1 for of_one in shown.values()):
            about = "Beside it what it is compared with, at its best." if levels else ""
            yield Chart(heading(evaluation, quantity), about, shown, levels)
