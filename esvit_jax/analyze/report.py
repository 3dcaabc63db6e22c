"""All that is known of a run on one page of HTML, which loads nothing from anywhere.

Numbers and pictures are those that the run and the evaluations have left in the workdir; what is
computed here takes seconds (the views of some images). What is missing is said, with the command
that makes it.
"""

import os
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib import resources
from typing import TYPE_CHECKING, Any, NamedTuple

from etils import epath

from esvit_jax import buckets
from esvit_jax.analyze.charts import Chart
from esvit_jax.analyze.diagnosis import Finding, diagnose
from esvit_jax.analyze.inline import Inlined, inlined_file
from esvit_jax.analyze.leftovers import KINDS, Section, Table, sections
from esvit_jax.analyze.run_charts import evaluation_charts, training_charts
from esvit_jax.analyze.run_words import converted_words, is_run, run_words
from esvit_jax.analyze.shown import framed
from esvit_jax.analyze.summary import progress
from esvit_jax.analyze.views import Pictured, pictured, views_of_images
from esvit_jax.config import ConfigDict
from esvit_jax.config.show import Row, rows
from esvit_jax.data.decode import DecodeError
from esvit_jax.data.sources import Source, open_source
from esvit_jax.errors import RunError, UserError, renamed
from esvit_jax.evaluate.result import Result, by_evaluation, results_of_lines
from esvit_jax.interop.config_beside import read_config
from esvit_jax.runlog.writer import damaged_lines, read_metrics

if TYPE_CHECKING:
    from markupsafe import Markup

IMAGES = 3  # whose views are shown
Lines = list[dict[str, Any]]


class Lack(NamedTuple):
    """Something that the page does not have.

    Attributes:
      what: it is, and why.
      command: that would make it; "" where none would.
    """

    what: str
    command: str = ""


class Report(NamedTuple):
    """What stands on the page; in a notebook, the page itself.

    Attributes:
      name: of the workdir.
      trained: whether it holds a run, and no checkpoint from elsewhere.
      words: what was trained, by what is said of it.
      fields: of the config that are not the default.
      findings: the diagnosis, the worst first.
      charts: of training, and of evaluations.
      progress: tables of evaluations while it trained.
      images: some with their views.
      views: a figure of them, where there are no images.
      sections: what evaluations have left.
      lacks: what is missing.
    """

    name: str
    trained: bool
    words: Mapping[str, str]
    fields: list[Row]
    findings: list[Finding]
    charts: list[Chart]
    progress: list[Table]
    images: list[Pictured]
    views: Inlined | None
    sections: list[Section]
    lacks: list[Lack]

    def only(self, *parts: str) -> "Report":
        """A page without a head, of some parts alone, by the names of these attributes."""
        nothing = Report("", False, {}, [], [], [], [], [], None, [], [])
        return nothing._replace(**{part: getattr(self, part) for part in parts})

    def write(self, file: str | os.PathLike[str]) -> int:
        """Writes the page, local or in a bucket, which loads nothing; returns its size, bytes."""
        page = html_of(self).encode()
        with buckets.reaching(file):
            return epath.Path(os.path.expanduser(file)).write_bytes(page)

    def __repr__(self) -> str:
        return f"<report {self.name}>" if self.name else "<part of a report>"

    def _repr_html_(self) -> str:
        return framed(html_of(self))


@buckets.reads_bucket
def report(workdir: str | os.PathLike[str], images: int = IMAGES) -> Report:
    """All that is known of a run or a converted checkpoint: its page, which a notebook shows.

        esvit_jax.report("runs/first")
        esvit_jax.report("runs/first").only("charts")

    Args:
      workdir: local, or gs://….
      images: of the training data whose views are cut; 0 for none.

    Returns:
      What was trained, a diagnosis, curves, views, and all that evaluations and the commands of
      `esvit` have left in the workdir.

    Raises:
      UserError: it is no such folder.
    """
    path = buckets.ready_path(workdir)
    config, origin, why = _config(path)
    if why and not (path / "metrics.jsonl").exists():
        raise UserError(
            f"{why if path.is_dir() else 'it is no folder'}; give the workdir of a run, or a "
            "converted or exported checkpoint",
            argument="workdir", value=os.fspath(workdir),
        )  # fmt: skip
    lacks = [Lack(f"what was trained: {why}")] if why else []
    trained = is_run(origin)
    lines = _lines(path, trained or config is None, lacks)
    results = results_of_lines(lines)
    source = _source(config, lacks) if config and trained else None
    pictures = _images(config, source, images, lacks) if config and source and images else []
    damaged: list[str] = []
    found = sections(path, damaged)
    lacks += [Lack(what) for what in damaged]
    lacks += _evaluations_missing(path, found, source)
    num_prototypes = config.head.num_prototypes if config else None
    findings = diagnose(
        lines,
        num_prototypes=num_prototypes,
        warmup_steps=origin["warmup_steps"] if trained else 0,
        total_steps=origin["total_steps"] if trained else None,
        results=results,
    )
    return Report(
        name=os.path.basename(os.path.abspath(path)),  # of "." too
        trained=trained,
        words=_words(config, origin, lines),
        fields=[row for row in rows(config) if row.changed] if config else [],
        findings=findings,
        charts=[*training_charts(lines, num_prototypes), *evaluation_charts(results)],
        progress=_progress(results),
        images=pictures,
        views=None if pictures else _views_figure(path),
        sections=found,
        lacks=lacks,
    )


def html_of(report: Report) -> str:
    """The page."""
    import jinja2

    template = resources.files("esvit_jax.analyze").joinpath("report.html").read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["marked"] = _marked
    return environment.from_string(template).render(report._asdict())


def _marked(text: str) -> "Markup":
    """Text in which the fields of a config are code."""
    from markupsafe import Markup, escape

    fields = re.sub(r"(config\.[a-z_.]*[a-z])", r"<code>\1</code>", str(escape(text)))
    return Markup(fields)


def _config(path: epath.Path) -> tuple[ConfigDict | None, dict[str, Any], str]:
    """The config and its facts, and why there are none."""
    try:
        found = read_config(path)
    except UserError as error:
        return None, {}, str(error)
    if found is None:
        return None, {}, "there is no config.json"
    return found.config, found.origin, ""


def _lines(path: epath.Path, expected: bool, lacks: list[Lack]) -> Lines:
    """The metrics, numbers or None and nothing else."""
    metrics = path / "metrics.jsonl"
    if not metrics.exists():
        if expected:
            lacks.append(Lack("curves: there is no metrics.jsonl"))
        return []
    if damaged := damaged_lines(metrics):
        numbers = ", ".join(map(str, damaged[:10])) + (", …" if len(damaged) > 10 else "")
        lacks.append(Lack(f"damaged and left out: line {numbers} of metrics.jsonl"))
    lines = [_numbers(line) for line in read_metrics(metrics)]
    if not any("loss" in line for line in lines):
        lacks.append(Lack("curves: no loss was logged yet (config.log_every_steps)"))
    return lines


def _numbers(line: Mapping[str, Any]) -> dict[str, Any]:
    """What of a line is a number, or is none because it was not finite."""
    scalars = {
        name: None if x is None else float(x)
        for name, x in line.items()
        if x is None or isinstance(x, int | float)
    }
    return scalars | {"step": line["step"]}


def _words(config: ConfigDict | None, origin: Mapping[str, Any], lines: Lines) -> dict[str, str]:
    if config is None:
        return {}
    if is_run(origin):
        return run_words(config, origin, lines)
    return converted_words(config, origin)


def _progress(results: list[Result]) -> list[Table]:
    """What evaluations measured while it trained."""
    found = map(progress, by_evaluation(results).values())
    return [
        Table(one.title, "", ["features", *one.columns], [[row, *cells] for row, cells in one.rows])
        for one in found
    ]


def _source(config: ConfigDict, lacks: list[Lack]) -> Source | None:
    """The training images, if they are at hand."""
    data = config.data
    names = {"name": "name", "split": "train_split", "data_dir": "data_dir"}
    try:
        with renamed(**{name: f"config.data.{field}" for name, field in names.items()}):
            return open_source(data.name, data.train_split, data.data_dir or None)
    except (UserError, RunError) as error:
        lacks.append(Lack(f"views: the images are not at hand: {error}"))
    return None


def _images(config: ConfigDict, source: Source, count: int, lacks: list[Lack]) -> list[Pictured]:
    try:
        found = views_of_images(config, source, count)
    except (UserError, RunError) as error:
        lacks.append(Lack(f"views: {error}"))
        return []
    if not found:
        lacks.append(Lack("views: none of the records is an image"))
    return [pictured(image, config.views) for image in found]


def _views_figure(path: epath.Path) -> Inlined | None:
    """What the run drew at its end."""
    with suppress(DecodeError, OSError):
        return inlined_file(path / "figures" / "views.png")
    return None


def _evaluations_missing(
    path: epath.Path, found: list[Section], source: Source | None
) -> Iterator[Lack]:
    """What no command has left yet."""
    there = {section.kind.command for section in found}
    for kind in KINDS:
        if kind.command in there:
            continue
        if kind.labels and source is not None and not source.num_classes:
            yield Lack(
                f"{kind.title}: it needs labels, which {source.name} has none of; --data names "
                "other images",
            )
            continue
        yield Lack(kind.title, f"esvit {kind.command} --workdir={shlex.quote(str(path))}")
