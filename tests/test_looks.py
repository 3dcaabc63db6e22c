"""What `attention`, `correspond` and `report` show in a notebook and leave in files."""

import html
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_knn_command import save_random

import esvit_jax
from esvit_jax.analyze.shown import Drawn
from esvit_jax.commands import attention as attention_command
from esvit_jax.commands import correspond as correspond_command
from esvit_jax.errors import UserError

PHOTOS = Path(__file__).parent / "data" / "photos"


@pytest.fixture(name="workdir", scope="module")
def _workdir(tmp_path_factory):
    import tiny

    config = tiny.tiny_config()
    config.evaluate.batch_size = 16
    return save_random(tmp_path_factory.mktemp("looks") / "run", config, seed=1, student_seed=2)


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_attention_writes_what_the_command_writes(workdir, tmp_path):
    found = esvit_jax.attention(workdir, count=1, blocks=[-1], points=[(0.0, 0.0)], mass=0.9)
    assert found.write(tmp_path / "ours" / "attention") == [
        "entropy.json", "regions.png", "block_1_image_0.png", "entropy.png"
    ]  # fmt: skip
    flags = ["--count=1", "--block=-1", "--at=0,0", "--mass=0.9", f"--out={tmp_path / 'theirs'}"]
    attention_command.main([f"--workdir={workdir}", *flags])
    ours, theirs = files_of(tmp_path / "ours" / "attention"), files_of(tmp_path / "theirs")
    assert ours == theirs and found.numbers == json.loads(theirs["entropy.json"])
    # A point and a share have their say.
    for points, mass in ([(0.9, 0.0)], 0.9), ([(0.0, 0.0)], 0.2):
        other = esvit_jax.attention(workdir, count=1, blocks=[-1], points=points, mass=mass)
        assert other.pictures["block_1_image_0.png"] != found.pictures["block_1_image_0.png"]


def test_correspond_finds_what_the_command_finds(workdir, tmp_path):
    found = esvit_jax.correspond(workdir, data="bundled/fashion_mnist_mini", split="test[:8]")
    found.write(tmp_path / "ours")
    flags = ["--data=bundled/fashion_mnist_mini", "--split=test[:8]", f"--out={tmp_path}"]
    correspond_command.main([f"--workdir={workdir}", *flags])
    (line,) = json.loads((tmp_path / "correspondence.json").read_text())
    assert found.numbers == [{name: x for name, x in line.items() if name != "workdir"}]
    ours = files_of(tmp_path / "ours")
    assert ours["correspondence.png"] == (tmp_path / "correspondence.png").read_bytes()


def test_images_of_any_kind(workdir):
    path = PHOTOS / "coffee.jpg"
    with Image.open(path) as image:
        pixels = np.asarray(image)
    by_path = esvit_jax.attention(workdir, [path], blocks=[1])
    by_pixels = esvit_jax.attention(workdir, [pixels], blocks=[1])
    assert by_path.numbers == by_pixels.numbers
    assert by_path.pictures["regions.png"] == by_pixels.pictures["regions.png"]
    found = esvit_jax.correspond(workdir, [path, pixels])
    assert found.numbers == [] and list(found.pictures) == ["matches.png"]


def test_what_is_refused(workdir):
    for given, message in [
        ({"points": [(0.5, 1.5)]}, "^points = "),
        ({"mass": 0.0}, "^mass = 0.0: it must be above 0"),
        ({"blocks": [2]}, "^blocks = 2: there are blocks 0 to 1"),
        ({"data": "bundled/nothing"}, "^data = .bundled/nothing"),
        ({"split": "nothing"}, "^split = .nothing"),
        ({"images": []}, "takes a list of images"),
    ]:
        with pytest.raises(UserError, match=message):
            esvit_jax.attention(workdir, **given)
    with pytest.raises(UserError, match="^images = "):
        esvit_jax.correspond(workdir, [])


def png_of(width, height):
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "png")
    return file.getvalue()


def test_pictures_in_a_notebook(tmp_path):
    drawn = Drawn([], "numbers.json", {'a"b.png': png_of(300, 30), "tall.png": png_of(10, 2600)})
    assert repr(drawn) == '<a"b.png, tall.png>'
    shown = drawn._repr_html_()
    assert shown.count('<img src="data:image/webp;base64,') == 2
    assert 'alt="a&quot;b.png"' in shown and "width: 200px; max-width: 100%" in shown
    assert "width: 3px" in shown  # 10 pixels scaled down to 5, by half
    assert drawn.write(tmp_path) == ['a"b.png', "tall.png"]
    assert (tmp_path / 'a"b.png').read_bytes() == drawn.pictures['a"b.png']
    assert not (tmp_path / "numbers.json").exists()


def test_a_report_in_a_notebook_and_its_parts(workdir, tmp_path):
    lines = [{"step": step, "loss": 5.0 - step} for step in (1, 2)]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    whole = esvit_jax.report(workdir, images=1)
    assert repr(whole) == "<report run>"
    frame, _, page = whole._repr_html_().partition('<iframe srcdoc="')
    page, _, rest = page.partition('"')
    size = whole.write(tmp_path / "page.html")
    assert frame == "" and 'onload="' in rest and rest.endswith("</iframe>")
    alone = html.unescape(page).replace('<base href="about:srcdoc">\n', "", 1)
    assert alone == (tmp_path / "page.html").read_text() != html.unescape(page) and size > 10_000
    assert repr(whole.only("charts")) == "<part of a report>"
    curves = html.unescape(whole.only("charts")._repr_html_())
    assert "Loss (nats)" in curves and "<h1>" not in curves and "What it is" not in curves
    words = html.unescape(whole.only("words")._repr_html_())
    assert "What it is" in words and "<h1>" not in words and "Loss (nats)" not in words
