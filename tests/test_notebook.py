"""launch/colab.ipynb: what its source says, without outputs; it runs and shows what it should."""

import ast
import io
import json
import re
from pathlib import Path

import jupytext
import nbformat
import numpy as np
import pytest
from conftest import QUICK_COMPILE
from nbclient import NotebookClient
from PIL import Image
from rich.console import Console

from esvit_jax.runlog.alive import say

LAUNCH = Path(__file__).parent.parent / "launch"
PHOTOS = Path(__file__).parent / "data" / "photos"
# A widget, which is empty when a saved notebook is opened, or a program, which is refused there.
NOT_SAVED = {"application/vnd.jupyter.widget-view+json", "application/javascript"}


@pytest.fixture(scope="module", name="notebook")
def _notebook():
    return nbformat.read(LAUNCH / "colab.ipynb", as_version=4)


@pytest.fixture(scope="module", name="executed")
def _executed(notebook, tmp_path_factory):
    """All cells as they are, with a short training and a folder of photos, in an empty folder."""
    folder = tmp_path_factory.mktemp("colab")
    write_photos(folder / "photos", count=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", QUICK_COMPILE)  # and one device, as in Colab
        patch.setenv("EPOCHS", "0.1")
        patch.setenv("PHOTOS", f"folder:{folder / 'photos'}")
        resources = {"metadata": {"path": str(folder)}}
        return NotebookClient(notebook, timeout=480, resources=resources).execute(), folder


def write_photos(folder, count):
    """Pieces of four photos, all different."""
    folder.mkdir()
    photos = [Image.open(path).convert("RGB") for path in sorted(PHOTOS.glob("*.jpg"))]
    draw = np.random.default_rng(0)
    for i in range(count):
        photo = photos[i % len(photos)]
        x, y = (int(draw.integers(side - 160)) for side in photo.size)
        photo.crop((x, y, x + 160, y + 128)).save(folder / f"{i}.jpg")


def cells(notebook):
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def test_the_notebook_is_its_source_and_has_no_outputs(notebook):
    made = jupytext.read(LAUNCH / "colab.py")
    assert cells(notebook) == cells(made), "jupytext --update --to ipynb launch/colab.py"
    assert notebook.metadata.kernelspec == made.metadata.kernelspec
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None


def shown(executed, code):
    """The outputs of the cell whose code has these words: text, and HTML."""
    (cell,) = [cell for cell in executed[0].cells if code in cell.source and "outputs" in cell]
    text = "".join(out.text for out in cell.outputs if out.output_type == "stream")
    data = [out.data for out in cell.outputs if "data" in out]
    return text, "".join(bundle.get("text/html", "") for bundle in data), data


def test_what_is_said_is_text_and_no_html():
    file = io.StringIO()
    say(Console(file=file, force_jupyter=True, width=20), "[a line] longer than the console is")
    say(Console(file=file, force_jupyter=True, quiet=True), "nothing")
    assert file.getvalue() == "[a line] longer than the console is\n"


def test_training_is_a_few_lines_of_text(executed):
    text, html, data = shown(executed, "esvit_jax.train(config, RUN)")
    lines = text.splitlines()
    assert html == "" and 8 < len(lines) < 40 and not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)
    assert re.search(r"^step [1-9]\d*: knn of teacher: top1/10 ", text, re.MULTILINE)
    (line,) = data  # the live one, as it was left
    assert re.match(r"step (\d+)/\1  loss +\d", line["text/plain"])


@pytest.mark.parametrize(
    ("code", "pictures"),
    [
        ("esvit_jax.attention(RUN", 6),
        ("esvit_jax.correspond(RUN", 1),
        ('esvit_jax.attention("runs/photos"', 4),
        ('esvit_jax.correspond("runs/photos"', 1),
        ('esvit_jax.attention("runs/converted"', 3),
    ],
)
def test_pictures(executed, code, pictures):
    _, html, _ = shown(executed, code)
    assert len(re.findall('<img src="data:image/(webp|png);base64,', html)) == pictures


def test_parts_of_the_report(executed):
    for code, words in {
        'only("images")': "local 1", 'only("findings"': "Loss (nats)", 'only("progress")':
        "teacher before training", 'report.write("report.html")': "Do regions find each other?",
    }.items():  # fmt: skip
        _, html, _ = shown(executed, code)
        assert html.startswith("<iframe srcdoc=") and words in html
    page = (executed[1] / "report.html").read_text()
    assert "attention/regions.png" in page and "correspondence.png" in page


def test_k_nn_by_hand_is_what_training_measured(executed):
    metrics = (executed[1] / "runs" / "quickstart" / "metrics.jsonl").read_text().splitlines()
    measured = [line["knn/top1/10"] for line in map(json.loads, metrics) if "knn/top1/10" in line]
    *_, by_hand = shown(executed, "esvit_jax.knn_accuracy(")[2]
    found = ast.literal_eval(by_hand["text/plain"])["top1/10"]
    assert found == pytest.approx(measured[-1], abs=0.2)


def test_exports(executed):
    text, _, _ = shown(executed, 'format="stablehlo"')
    assert re.search(r"view features \(1, (\d+)\) region features \(1, \d+, \d+, \1\)", text)
    text, _, _ = shown(executed, "esvit_jax.convert(")
    assert text.startswith("checkpoint.safetensors: ")


def test_what_is_saved_is_small_and_shows_again(executed):
    saved = nbformat.writes(executed[0])
    assert len(saved) < 4_000_000
    for cell in executed[0].cells:
        for out in cell.get("outputs", []):
            assert out.output_type != "error" and not NOT_SAVED & set(out.get("data", {}))
            assert out.get("name") != "stderr", out.text
