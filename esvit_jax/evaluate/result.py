"""What an evaluation measured: one type, from which lines, tables, JSON and figures are made."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

# Whose features were evaluated. The teacher's are what one gets without asking; the names of all
# others stand before the evaluation's in a line of metrics.
TEACHER, RAW_PIXELS = "teacher", "raw_pixels"
SUBJECTS = (TEACHER, RAW_PIXELS)
# Units of quantities, by the first part of their names; what is not here has none.
PERCENTS = (
    "top1", "top5", "top1_spread", "top5_spread", "mean_per_class", "map11", "roc_auc", "miou",
    "accuracy",
)  # fmt: skip
UNITS: dict[str, str] = dict.fromkeys(PERCENTS, "%") | {"distance": "px"}
# Quantities that reports have and that are mere numbers.
NUMBERS = ("rmse", "distance_cells", "cutoff_similarity")
# How tables and figures write evaluations, quantities, and what tells an evaluation's values of one
# quantity apart; what is not here is written as it is.
TITLES = {
    "knn": "k-NN",
    "linear": "linear probe",
    "finetune": "fine-tuning",
    "linear_fast": "fast linear probe",
    "fewshot": "few labels",
    "transfer": "transfer, probe",
    "transfer_knn": "transfer, k-NN",
    "top1": "top-1",
    "top5": "top-5",
    "mean_per_class": "mean per class",
    "map11": "11-point mAP",
    "roc_auc": "ROC-AUC",
    "dense": "dense probe",
    "miou": "mean IoU",
    "rmse": "RMSE",
    "accuracy": "hits",
    "distance_cells": "distance in cells",
    "cutoff_similarity": "similarity of the 11th match",
}
PARAMETERS = {"knn": ("k", "temperature")}


@dataclasses.dataclass(frozen=True)
class Result:
    """Numbers of one evaluation of one subject.

    Attributes:
      evaluation: its name, such as "knn".
      values: {"top1/10": 68.5, …}; the part before the first slash is the quantity, whose unit
        `unit` knows.
      subject: one of `SUBJECTS`.
      step: training steps behind the subject; None where it was not trained.
    """

    evaluation: str
    values: Mapping[str, float]
    subject: str = TEACHER
    step: int | None = None

    def scalars(self) -> dict[str, float]:
        """Names and numbers as in a line of metrics: {"knn/top1/10": 68.5, …}."""
        prefix = "" if self.subject == TEACHER else f"{self.subject}/"
        return {f"{prefix}{self.evaluation}/{name}": x for name, x in self.values.items()}

    @property
    def first_quantity(self) -> str:
        """The one to show where there is room for one."""
        return next(iter(self.values)).split("/")[0]

    def quantity(self, name: str) -> dict[str, float]:
        """The values of one quantity by what follows it: {"10": 68.5, "20": 67.7, …}.

        {"": 68.5} where nothing follows.
        """
        parts = {key: key.partition("/") for key in self.values}
        return {rest: self.values[key] for key, (first, _, rest) in parts.items() if first == name}

    def json(self) -> dict[str, Any]:
        """All of it, with units, as JSON holds it."""
        values = {name: {"value": x, "unit": unit(name)} for name, x in self.values.items()}
        return dataclasses.asdict(self) | {"values": values}

    def __str__(self) -> str:
        """The values with their units, on one line."""
        return ", ".join(f"{name} {x:.1f} {unit(name)}".rstrip() for name, x in self.values.items())


def unit(name: str) -> str:
    """The unit of a value by its name, "" for a mere number."""
    return UNITS.get(name.split("/")[0], "")


def heading(evaluation: str, quantity: str) -> str:
    """For tables and axes: "k-NN top-1 (%)"."""
    words = f"{TITLES.get(evaluation, evaluation)} {TITLES.get(quantity, quantity)}"
    return words + (f" ({UNITS[quantity]})" if quantity in UNITS else "")


def value_title(evaluation: str, which: str) -> str:
    """For columns and legends, what tells a value of a quantity from the others: "k = 10"."""
    if not which:
        return "teacher"
    if evaluation == "fewshot":
        return "1 shot" if which == "1_shots" else which.replace("_", " ")
    if evaluation not in PARAMETERS:
        return which
    named = zip(PARAMETERS[evaluation], which.split("/"), strict=False)
    return ", ".join(f"{name} = {value}" for name, value in named)


def results_of_line(line: Mapping[str, Any]) -> list[Result]:
    """The results whose `scalars` are among those of a line of metrics, in order.

    Scalars of training have no slash in their names, those of evaluations have.
    """
    found: dict[tuple[str, str], dict[str, float]] = {}
    for name, value in line.items():
        parts = name.split("/")
        subject = parts.pop(0) if parts[0] in SUBJECTS else TEACHER
        if len(parts) > 1 and value is not None:
            found.setdefault((subject, parts[0]), {})["/".join(parts[1:])] = value
    return [
        Result(evaluation, values, subject, line["step"] if subject == TEACHER else None)
        for (subject, evaluation), values in found.items()
    ]


def results_of_lines(lines: Iterable[Mapping[str, Any]]) -> list[Result]:
    """Those of all lines, in order."""
    return [result for line in lines for result in results_of_line(line)]


def result_of_report(evaluation: str, report: Mapping[str, Any]) -> Result | None:
    """The result whose values are among the entries of a report, as commands write it.

    None where it has none. What else a report holds (which network, which data) is left out.
    """
    values = {
        name: float(value)
        for name, value in report.items()
        if (name.split("/")[0] in UNITS or name.split("/")[0] in NUMBERS)
        and isinstance(value, int | float)
    }
    return Result(evaluation, values, step=report.get("step")) if values else None


def by_evaluation(results: Iterable[Result]) -> dict[str, list[Result]]:
    """The results of each evaluation, in order."""
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.evaluation, []).append(result)
    return found
