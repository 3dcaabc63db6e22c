"""What evaluations have left in a workdir: reports as tables, figures as pictures."""

import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from esvit_jax.analyze.inline import Inlined, inlined_file
from esvit_jax.data.decode import DecodeError
from esvit_jax.evaluate.result import (
    TITLES,
    Result,
    result_of_report,
    results_of_line,
    unit,
    value_title,
)

# Figures of one kind that stand in a page; where there are more, it says so.
MOST_FIGURES = 6
PICKED = {"l2": "ℓ2", "learning_rate": "learning rate", "weight_decay": "weight decay"}


class Table(NamedTuple):
    """A table to read.

    Attributes:
      title, about: what it is of, and what with.
      columns: heads, the first over the names of the rows.
      rows: names and values, as text.
    """

    title: str
    about: str
    columns: list[str]
    rows: list[list[str]]


class Figure(NamedTuple):
    """A picture that a command has drawn.

    Attributes:
      name: of the file, in the workdir.
      alt: what is to be seen, for those who do not see it.
      picture: the pixels.
    """

    name: str
    alt: str
    picture: Inlined


class Kind(NamedTuple):
    """What one command leaves.

    Attributes:
      command: its name and flags.
      title: of its section in a page.
      about: how to read it.
      reports: JSON files and the evaluation that each is of.
      figures: patterns of files, and what is to be seen in one.
      labels: whether it needs them.
    """

    command: str
    title: str
    about: str
    reports: Mapping[str, str] = {}
    figures: Mapping[str, str] = {}
    labels: bool = False


KINDS = (
    Kind(
        "knn", "k-NN", "Test images are classified by their nearest training images in feature "
        "space; nothing is trained for it.",
        {"knn.json": "knn"}, labels=True,
    ),
    Kind(
        "linear --fast", "Linear probe", "A linear classifier on the frozen backbone; which one is "
        "chosen on held-out training images.",
        {"linear.json": "linear", "linear_fast.json": "linear_fast"}, labels=True,
    ),
    Kind(
        "fewshot", "Few labels", "Linear classifiers on a few labelled images of each class, or on "
        "a share of them: the mean over several choices of images, ± their standard deviation.",
        {"fewshot.json": "fewshot"}, labels=True,
    ),
    Kind(
        "transfer --data=NAME,…", "Transfer",
        "A classifier, and k-NN, on each of several data sets.",
        {"transfer.json": "transfer"},
    ),
    Kind(
        "dense --data=NAME --target=FEATURE", "Dense probe",
        "One linear layer on frozen region features says what each pixel is, or how far.",
        {"dense.json": "dense"},
    ),
    Kind(
        "correspond", "Do regions find each other?", "Regions of an image are matched with those "
        "of its mirror image, jittered and grey. A hit is a match with the cell that is truly "
        "the same; lines are blue for hits, orange and dashed for misses.",
        {"correspondence.json": "correspondence"},
        {"correspondence.png": "images beside their mirror images, with lines between regions "
         "that were matched"},
    ),
    Kind(
        "attention", "Where does it look?", "For each head of a block, what a token (marked +) "
        "attends to; what is outlined holds most of the attention. Fewer bits are a narrower "
        "look. Regions that are alike have the same colour.",
        {},
        {"attention/regions.png": "images, and the maps of each stage in the colours of their "
         "first three principal components",
         "attention/entropy.png": "the entropy of attention of every head, over the blocks",
         **dict.fromkeys(
             ("attention/block_*_image_0.png", "attention/block_*_image_1.png",
              "attention/block_*.png"),
             "maps of where each head looks from some tokens of an image"),
        },
    ),
    Kind(
        "neighbours", "What is alike?", "Each row has an image, and those that are most like it "
        "in feature space, with their cosine similarity; a blue frame has the same label, an "
        "orange one another.",
        {}, {"neighbours.png": "images, each with its nearest neighbours beside it"},
    ),
    Kind(
        "map", "All images in a plane", "Each point is an image; like ones lie close together.",
        {}, {"map.png": "a scatter of points, in the colours of their classes"},
    ),
)  # fmt: skip


class Section(NamedTuple):
    """What one command has left.

    Attributes:
      kind: which.
      tables, figures: to show.
      left_out: figures for which there was no room.
    """

    kind: Kind
    tables: list[Table]
    figures: list[Figure]
    left_out: int


def sections(workdir: epath.Path, lacks: list[str]) -> list[Section]:
    """What there is of each of `KINDS`, without those of which there is nothing.

    Args:
      workdir: of a run, or a converted checkpoint.
      lacks: is told of files that cannot be read.
    """
    found = []
    for kind in KINDS:
        tables = [*_tables(workdir, kind, lacks)]
        figures, left_out = _figures(workdir, kind, lacks)
        if tables or figures:
            found.append(Section(kind, tables, figures, left_out))
    return found


def _tables(workdir: epath.Path, kind: Kind, lacks: list[str]) -> Iterator[Table]:
    for file, evaluation in kind.reports.items():
        path = workdir / file
        if not path.exists():
            continue
        try:
            content = json.loads(path.read_text())
            yield from tables_of(evaluation, content if isinstance(content, list) else [content])
        except (ValueError, TypeError, AttributeError, OSError):
            lacks.append(f"{file} is no report that can be read; run esvit {kind.command} again")
    entropy = workdir / "attention" / "entropy.json"
    if kind.command == "attention" and entropy.exists():
        try:
            yield entropy_table(json.loads(entropy.read_text()))
        except (ValueError, TypeError, KeyError, OSError):
            lacks.append("attention/entropy.json cannot be read; run esvit attention again")


def tables_of(evaluation: str, reports: Sequence[Mapping[str, Any]]) -> list[Table]:
    """The numbers of one evaluation: a row for each amount, set or network.

    Args:
      evaluation: its name, as in a `Result`.
      reports: as its command writes them, one a network.
    """
    if evaluation == "transfer":
        results = [("", result) for result in results_of_line(reports[0])]
    else:
        results = [
            (_subject(report) if len(reports) > 1 else "", result)
            for report in reports
            if (result := result_of_report(evaluation, report))
        ]
    if not results:
        return []
    about = _about(reports[0])
    if len(reports) > 1:
        columns = [*dict.fromkeys(name for _, result in results for name in result.values)]
        rows = [
            [subject, *(_number(name, result.values.get(name)) for name in columns)]
            for subject, result in results
        ]
        return [Table(TITLES.get(evaluation, evaluation), about, ["network", *map(_head, columns)],
                      rows)]  # fmt: skip
    return [_table(result, about) for _, result in results]


def _table(result: Result, about: str) -> Table:
    """Quantities as columns; what tells the values of one apart as rows."""
    quantities = dict.fromkeys(name.split("/")[0] for name in result.values)
    quantities = [name for name in quantities if not name.endswith("_spread")]
    by_row: dict[str, dict[str, str]] = {}
    for quantity in quantities:
        spreads = result.quantity(f"{quantity}_spread")
        for which, value in result.quantity(quantity).items():
            spread = f" ± {_number(quantity, spreads[which])}" if which in spreads else ""
            by_row.setdefault(which, {})[quantity] = _number(quantity, value) + spread
    first = {"knn": "neighbours", "fewshot": "labels"}.get(result.evaluation, "")
    if not first:
        first = "data set" if result.evaluation.startswith("transfer") else "features"
    rows = [
        [value_title(result.evaluation, which), *(values.get(q, "–") for q in quantities)]
        for which, values in by_row.items()
    ]
    title = TITLES.get(result.evaluation, result.evaluation)
    return Table(title, about, [first, *map(_head, quantities)], rows)


def _head(name: str) -> str:
    quantity = name.split("/")[0]
    title = TITLES.get(quantity, quantity)
    return f"{title} ({unit(quantity)})" if unit(quantity) else title


def _number(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.1f}" if unit(name) else f"{value:.3g}"


def _subject(report: Mapping[str, Any]) -> str:
    return f"{report.get('workdir', '')}, {report.get('key')} at step {report.get('step')}"


def _about(report: Mapping[str, Any]) -> str:
    """Which network, which data, and what was chosen."""
    parts = [f"{report.get('key', 'teacher')} at step {report.get('step')}"]
    if "train_images" in report and "test_images" in report:
        parts.append(
            f"{report['train_images']:,} training and {report['test_images']:,} test images of "
            f"{report['data']}"
        )
    elif "images" in report:
        parts.append(f"{report['images']:,} images of {report['data']} {report['split']}")
    if picked := report.get("picked"):
        words = (f"{PICKED.get(name, name)} {value}" for name, value in picked.items())
        parts.append("picked: " + ", ".join(words))
    if report.get("protocol"):
        parts.append(f"protocol {report['protocol']}")
    for name, (won, of) in report.get("wins", {}).items():
        parts.append(f"better than {report['against']} on {won} of {of} sets by {name}")
    return "; ".join(parts)


def entropy_table(blocks: Sequence[Mapping[str, Any]]) -> Table:
    """How widely heads look, a row a block, from what `esvit attention` writes."""
    rows = []
    for i, block in enumerate(blocks):
        bits = [float(x) for x in block["entropy"]]
        mean = sum(bits) / len(bits)
        numbers = (mean, min(bits), max(bits), math.log2(block["keys"]))
        rows.append([str(i), str(block["stage"] + 1), *(f"{x:.2f}" for x in numbers)])
    columns = ["block", "stage", "mean of the heads", "least", "most", "possible"]
    return Table("entropy of attention", "bits", columns, rows)


def _figures(workdir: epath.Path, kind: Kind, lacks: list[str]) -> tuple[list[Figure], int]:
    """The first of those that there are, and how many are left out."""
    paths: dict[epath.Path, str] = {}
    for pattern, alt in kind.figures.items():
        for path in sorted(workdir.glob(pattern), key=_in_order):
            paths.setdefault(path, alt)
    figures = []
    for path, alt in itertools.islice(paths.items(), MOST_FIGURES):
        name = f"attention/{path.name}" if path.parent.name == "attention" else path.name
        try:
            figures.append(Figure(name, alt, inlined_file(path)))
        except (DecodeError, OSError):
            lacks.append(f"{name} is no picture; run esvit {kind.command} again")
    return figures, max(0, len(paths) - MOST_FIGURES)


def _in_order(path: epath.Path) -> list[int | str]:
    """Block 9 before block 10."""
    return [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", path.name)]
