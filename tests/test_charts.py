"""Curves as SVG: where the points lie, and what is said of them."""

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from esvit_jax.analyze.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Chart,
    has_points,
    in_words,
    thinned,
)
from esvit_jax.analyze.figures import Curve
from esvit_jax.analyze.run_charts import evaluation_charts, training_charts
from esvit_jax.evaluate.result import RAW_PIXELS, Result


def paths(chart, kind):
    root = ElementTree.fromstring(chart.svg)
    found = [path.attrib for path in root.iter("path")]
    return [path["d"] for path in found if path["class"].startswith(kind)]


def test_points_lie_where_they_should():
    chart = Chart("loss", "", {"a": Curve([0, 50, 100], [0.0, 4.0, 1.0])}, {"top": 4.0})
    bottom, top = HEIGHT - BOTTOM, TOP  # of 0 and 4, which are round numbers
    middle = (LEFT + WIDTH - RIGHT) / 2
    y = bottom - 0.25 * (bottom - top)
    assert paths(chart, "curve") == [
        f"M{LEFT} {bottom}L{middle:g} {top}L{WIDTH - RIGHT} {y:g}"
    ]  # fmt: skip
    assert paths(chart, "level") == [f"M{LEFT} {top}.0H{WIDTH - RIGHT}"]
    assert len(paths(chart, "grid")) == 5  # 0 to 4
    assert chart.last == {"a": "1"} and chart.level_values == {"top": "4"}


def test_a_number_that_is_not_finite_breaks_the_line():
    curve = Curve([1, 2, 3, 4], [1.0, math.nan, 2.0, 3.0])
    (path,) = paths(Chart("", "", {"a": curve}), "curve")
    assert re.sub(r"[\d. ]", "", path) == "MML"
    assert not has_points(Curve([1, 2], [math.nan, math.inf]))
    assert Chart("", "", {"a": Curve([1, 2], [3.0, math.nan])}).last == {"a": "3"}


@pytest.mark.parametrize("values", [[0.0], [0.04, 0.04], [0.0, 0.0, 0.0], [-5e-9, -5e-9], [1e9]])
def test_a_level_curve_and_a_lone_point_have_a_place(values):
    chart = Chart("", "", {"a": Curve(list(range(len(values))), values)})
    numbers = [float(x) for x in re.findall(r"[\d.]+", "".join(paths(chart, "curve")))]
    assert all(LEFT <= x <= WIDTH - RIGHT for x in numbers[::2])
    assert all(TOP < y < HEIGHT - BOTTOM for y in numbers[1::2])


def test_words_escape_and_are_read_to_those_who_do_not_see():
    chart = Chart('a "<b>"', "", {"x & y": Curve([10, 2000], [1.5, 1234.0])})
    root = ElementTree.fromstring(chart.svg)
    assert root.get("aria-label") == 'a "<b>". ' + in_words("x & y", chart.curves["x & y"])
    assert chart.words == (
        "x & y: 1.5 at step 10, 1,234 at step 2,000; lowest 1.5, highest 1,234"
    )  # fmt: skip
    assert in_words("a", Curve([7], [2.0])) == "a: 2 at step 7"
    # Few points say what they are; of many there would be no end.
    assert [title.text for title in root.iter("title")] == ["step 10: 1.5", "step 2,000: 1,234"]
    long = Chart("", "", {"a": Curve(list(range(31)), [1.0] * 31)})
    assert "<title>" not in long.svg


def test_a_long_curve_is_thinned_and_keeps_its_peaks_and_gaps():
    values = [math.sin(i / 100) for i in range(50_000)]
    values[12_345], values[31_111], values[40_000] = 9.0, -9.0, math.nan
    curve = thinned(Curve(list(range(50_000)), values))
    assert len(curve.steps) <= 301
    kept = dict(zip(*curve, strict=True))
    assert (kept[12_345], kept[31_111]) == (9.0, -9.0) and math.isnan(kept[40_000])
    assert curve.steps == sorted(curve.steps)
    assert all(math.isnan(y) or values[x] == y for x, y in kept.items())
    assert len(Chart("", "", {"a": Curve(list(range(50_000)), values)}).svg) < 8_000
    short = Curve([1, 2], [3.0, 4.0])
    assert thinned(short) is short


def test_charts_of_what_there_is():
    lines = [{"step": 1, "loss": 3.0, "view_loss": 4.0, "skipped_steps": 0.0, "mfu": None}]
    (loss,) = training_charts(lines, 256)
    assert list(loss.curves) == ["loss", "view loss"]
    assert loss.levels == {"ln K": math.log(256)}
    lines = [{"step": 1, "loss": 3.0, "skipped_steps": 2.0, "goodput": 0.5}]
    loss, time, skipped = training_charts(lines, 256)
    assert (loss.about, loss.levels, list(time.curves)) == ("", {}, ["goodput"])  # another loss
    assert skipped.last == {"skipped": "2"}
    assert training_charts([], 256) == []


def test_charts_of_evaluations():
    results = [
        Result("knn", {"top1/10": 80.0}, RAW_PIXELS),
        Result("knn", {"top1/10": 60.0, "top5/10": 90.0}, step=0),
        Result("knn", {"top1/10": 70.0}, step=10),
        Result("once", {"top1": 70.0}, step=10),
    ]
    (knn,) = evaluation_charts(results)
    assert knn.title == "k-NN top-1 (%)"
    assert knn.curves == {"k = 10": Curve([0, 10], [60.0, 70.0])}
    assert knn.levels == {"raw pixels": 80.0, "untrained": 60.0}
