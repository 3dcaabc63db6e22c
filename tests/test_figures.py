"""What the figures show: curves, pixels and labels, read back from the drawn figure."""

import json
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure

from esvit_jax.analyze.figures import loss_figure, views_figure
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
    assert curves == {"k = 20": [[0, 60], [30, 70]], "k = 100": [[0, 50], [30, 65]]}
    assert (losses.get_ylabel(), knn.get_ylabel()) == ("loss (nats)", "k-NN top-1 (%)")
    assert knn.get_xlabel() == "step"


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


@pytest.mark.parametrize("num_local", [0, 1, 4, 8, 10])
@pytest.mark.parametrize(("size", "local"), [((28, 28), 14), ((75, 100), 24)])
def test_views_figure(tmp_path, drawn, size, local, num_local):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    pixels = {
        "global": rng.random((2, size[0], size[0], 3)),
        "local": rng.random((num_local, local, local, 3)),
    }
    views = {name: ((v - MEAN) / STD).astype(np.float32) for name, v in pixels.items()}
    out = tmp_path / "views.png"
    views_figure(image, views, MEAN, STD, out)
    assert is_png(out)
    shown = {axes.get_title().split("  ")[0]: axes.get_images()[0] for axes in drawn[0].axes}
    names = ["image", "global 1", "global 2"] + [f"local {i + 1}" for i in range(num_local)]
    assert list(shown) == names
    np.testing.assert_array_equal(shown["image"].get_array(), image)
    np.testing.assert_allclose(shown["global 2"].get_array(), pixels["global"][1], atol=1e-6)
    for i in range(num_local):
        picture = shown[f"local {i + 1}"].get_array()
        np.testing.assert_allclose(picture, pixels["local"][i], atol=1e-6)
    # Tiny pictures keep their pixels.
    smooth = {28: "nearest", 75: "auto"}[size[0]]
    assert shown["image"].get_interpolation() == smooth
    # No two pictures overlap.
    boxes = [axes.get_position() for axes in drawn[0].axes]
    for i, a in enumerate(boxes):
        for b in boxes[i + 1 :]:
            inside_x = min(a.x1, b.x1) - max(a.x0, b.x0)
            inside_y = min(a.y1, b.y1) - max(a.y0, b.y0)
            assert min(inside_x, inside_y) <= 1e-6


def test_importing_does_not_load_matplotlib():
    code = "import sys, esvit_jax.analyze.figures; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
