"""What the figures show: curves, pixels and labels, read back from the drawn figure."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from esvit_jax.analyze.figures import Curve, first_rise, loss_figure, views_figure
from esvit_jax.analyze.pictures import Neighbours, map_figure, neighbours_figure
from esvit_jax.errors import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, in order; they are still written to disk."""
    figures = []
    save = Figure.savefig

    def keep(self, *args, **kwargs):
        figures.append(self)
        return save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def is_png(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_loss_figure_with_knn(tmp_path, drawn):
    metrics, out = tmp_path / "metrics.jsonl", tmp_path / "loss.png"
    write_lines(
        metrics,
        [
            {"step": 0, "raw_pixels/knn/top1/20": 80.0, "raw_pixels/knn/top1/100": 79.0},
            {"step": 0, "knn/top1/20": 60.0, "knn/top1/100": 50.0, "knn/top5/20": 90.0},
            {"step": 10, "loss": 5.0, "view_loss": 4.0, "region_loss": 6.0},
            {"step": 20, "loss": None, "view_loss": 3.0, "region_loss": 5.0},
            {"step": 30, "loss": 4.0, "view_loss": 3.5, "region_loss": 4.5},
            {"step": 30, "knn/top1/20": 70.0, "knn/top1/100": 65.0, "knn/top5/20": 95.0},
        ],
    )
    with metrics.open("a") as file:
        file.write('{"step": 40, "lo')  # a run that is still writing
    loss_figure(metrics, out)
    assert is_png(out)
    losses, knn = drawn[0].axes
    curves = {line.get_label(): line.get_xydata().tolist() for line in losses.get_lines()}
    assert list(curves) == ["loss", "view loss", "region loss"]
    np.testing.assert_equal(curves["loss"], [[10, 5], [20, np.nan], [30, 4]])
    assert curves["region loss"] == [[10, 6], [20, 5], [30, 4.5]]
    curves = {line.get_label(): line.get_xydata().tolist() for line in knn.get_lines()}
    assert curves == {
        "raw pixels": [[0, 80], [1, 80]],  # from edge to edge
        "untrained": [[0, 60], [1, 60]],
        "k = 20": [[0, 60], [30, 70]],
        "k = 100": [[0, 50], [30, 65]],
    }
    assert (losses.get_ylabel(), knn.get_ylabel()) == ("loss (nats)", "k-NN top-1 (%)")
    assert knn.get_xlabel() == "step"
    colors = [{to_hex(line.get_color()) for line in axes.get_lines()} for axes in drawn[0].axes]
    assert not colors[0] & colors[1]  # no colour means two things


def test_every_evaluation_has_a_panel(tmp_path, drawn):
    metrics = tmp_path / "metrics.jsonl"
    lines = [
        {"step": 5, "loss": 5.0},
        {"step": 5, "knn/top1/20": 60.0},
        {"step": 5, "depth/x": 2.0},
    ]
    write_lines(metrics, lines)
    loss_figure(metrics, tmp_path / "loss.png")
    labels = ["loss (nats)", "k-NN top-1 (%)", "depth x"]
    assert [axes.get_ylabel() for axes in drawn[0].axes] == labels


def test_the_first_rise_is_explained(tmp_path, drawn):
    """Down to step 40, up to step 120, then down for good."""
    losses = np.interp(range(0, 400, 5), [0, 40, 120, 400], [4.0, 2.5, 4.5, 3.0])
    lines = [{"step": 5 * i, "loss": loss} for i, loss in enumerate(losses)]
    write_lines(tmp_path / "metrics.jsonl", lines)
    loss_figure(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    (axes,) = drawn[0].axes
    (note,) = axes.texts
    assert "harder to predict: the loss rises" in note.get_text()
    assert 30 <= note.xy[0] <= 50
    (span,) = axes.patches
    assert 30 <= span.get_x() <= 50 and 100 <= span.get_x() + span.get_width() <= 125
    assert axes.get_ylim()[1] > 4.5 + 0.1 * 2  # room for the note


@pytest.mark.parametrize(
    "losses",
    [
        np.linspace(6, 3, 100),  # it only falls
        6 + 0.1 * np.random.default_rng(0).normal(size=100) - np.linspace(0, 3, 100),  # with noise
        [4.0, 2.5, 4.5, 3.0],  # too short to tell
        np.interp(range(100), [0, 80, 99], [6, 3, 5]),  # late: something went wrong
        [5.0] * 100,
    ],
)
def test_no_other_rise_is_explained(losses):
    assert first_rise(Curve(list(range(len(losses))), [float(x) for x in losses])) is None


def test_steps_that_were_not_finite_do_not_hide_the_rise():
    losses = np.interp(range(0, 400, 5), [0, 40, 120, 400], [4.0, 2.5, 4.5, 3.0])
    losses[3] = np.nan
    rise = first_rise(Curve(list(range(0, 400, 5)), losses.tolist()))
    assert rise is not None and 30 <= rise[0] <= 50


def test_loss_figure_of_one_line(tmp_path, drawn):
    metrics, out = tmp_path / "metrics.jsonl", tmp_path / "loss.png"
    write_lines(metrics, [{"step": 10, "loss": 5.5}])
    loss_figure(metrics, out)
    (axes,) = drawn[0].axes
    (line,) = axes.get_lines()
    assert line.get_marker() == "."  # or nothing would be seen
    assert axes.get_legend() is None
    assert axes.get_xlabel() == "step"


def test_loss_figure_of_many_lines_has_no_markers(tmp_path, drawn):
    metrics = tmp_path / "metrics.jsonl"
    write_lines(metrics, [{"step": step, "loss": 5 - step / 100} for step in range(40)])
    loss_figure(metrics, tmp_path / "loss.png")
    (line,) = drawn[0].axes[0].get_lines()
    assert line.get_marker() == "None"
    assert len(line.get_xdata()) == 40


def test_loss_figure_refuses(tmp_path):
    metrics, out = tmp_path / "metrics.jsonl", tmp_path / "loss.png"
    with pytest.raises(UserError, match=r"metrics\.jsonl: no such file"):
        loss_figure(metrics, out)
    write_lines(metrics, [{"step": 0, "knn/top1/20": 60.0}])
    with pytest.raises(UserError, match="no line has a loss yet"):
        loss_figure(metrics, out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("size", "local", "num_local"),
    [((28, 28), 14, n) for n in (0, 4, 9)] + [((75, 100), 24, n) for n in (1, 8, 10)],
)
def test_views_figure(tmp_path, drawn, size, local, num_local):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    pixels = {
        "global": rng.random((2, size[0], size[0], 3)),
        "local": rng.random((num_local, local, local, 3)),
    }
    views = {name: ((v - MEAN) / STD).astype(np.float32) for name, v in pixels.items()}
    out = tmp_path / "views.png"
    boxes = rng.integers(1, [[10, 10, 18, 18]] * (2 + num_local))
    views_figure(image, views, boxes, MEAN, STD, out)
    assert is_png(out)
    shown = {axes.get_title().split("  ")[0]: axes.get_images()[0] for axes in drawn[0].axes}
    names = ["image", "global 1", "global 2"] + [f"local {i + 1}" for i in range(num_local)]
    assert list(shown) == names
    np.testing.assert_array_equal(shown["image"].get_array(), image)
    np.testing.assert_allclose(shown["global 2"].get_array(), pixels["global"][1], atol=1e-6)
    for i in range(num_local):
        picture = shown[f"local {i + 1}"].get_array()
        np.testing.assert_allclose(picture, pixels["local"][i], atol=1e-6)
    # The part of each view, where its pixels are, in the colour of its title.
    sheet, *others = drawn[0].axes
    frames = [
        (p.get_y() + 0.5, p.get_x() + 0.5, p.get_height(), p.get_width()) for p in sheet.patches
    ]
    np.testing.assert_allclose(frames, boxes)
    for frame, axes in zip(sheet.patches, others, strict=True):
        assert to_hex(frame.get_edgecolor()) == to_hex(axes.title.get_color())
    # Tiny pictures keep their pixels.
    smooth = {28: "nearest", 75: "auto"}[size[0]]
    assert shown["image"].get_interpolation() == smooth
    # Rows are filled: no place is left empty, and no two pictures overlap.
    places = [axes.get_position() for axes in drawn[0].axes]
    rows = [list(row) for _, row in itertools.groupby(places[3:], lambda place: round(place.y1, 2))]
    assert max(map(len, rows), default=0) - min(map(len, rows), default=0) <= 1
    for i, a in enumerate(places):
        for b in places[i + 1 :]:
            inside_x = min(a.x1, b.x1) - max(a.x0, b.x0)
            inside_y = min(a.y1, b.y1) - max(a.y0, b.y0)
            assert min(inside_x, inside_y) <= 1e-6


def test_names_are_drawn_as_they_are(tmp_path, drawn):
    """Neither formulas nor, as of labels that begin with _, nothing."""
    names = [r"$\frac$", "_hidden", "5$ and $x^2$"]
    points = np.arange(6, dtype=np.float32).reshape(3, 2)
    map_figure(points, np.arange(3), names, names[0], tmp_path / "map.png")
    axes = drawn[0].axes[0]
    legend = axes.get_legend()
    assert legend is not None and [text.get_text() for text in legend.get_texts()] == names
    assert [text.get_parse_math() for text in [axes.title, *legend.get_texts()]] == [False] * 4
    picture = np.zeros((4, 4, 3), np.float32)
    row = Neighbours(picture, names[0], [picture], names[:1], None)
    neighbours_figure([row], tmp_path / "new" / "neighbours.png")
    assert is_png(tmp_path / "new" / "neighbours.png")


def test_importing_does_not_load_matplotlib():
    code = "import sys, esvit_jax.analyze.figures; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
