"""`esvit correspond` and `esvit attention`, as a user starts them."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from test_knn_command import save_random

from esvit_jax import checkpoint
from esvit_jax.analyze.attention import Attention
from esvit_jax.analyze.matches import matches_of_two
from esvit_jax.commands import attention, correspond
from esvit_jax.data.loader import eval_batches
from esvit_jax.data.sources import open_source
from esvit_jax.errors import RunError, UserError
from esvit_jax.evaluate.correspondence import correspond as match
from esvit_jax.evaluate.correspondence import evaluate_correspondence, mirrored_pairs
from esvit_jax.interop.load import preprocessor

PHOTOS = Path(__file__).parent / "data" / "photos"


@pytest.fixture
def workdir(tmp_path, tiny_config):
    tiny_config.evaluate.batch_size = 16
    return save_random(tmp_path / "run", tiny_config, seed=1, student_seed=2)


def width(file):
    with Image.open(file) as image:
        return image.width


def by_hand(workdir, network, count):
    """Share of hits and mean distance, pixels, of the first images, one by one."""
    loaded = checkpoint.load_model(workdir)
    source = open_source(loaded.config.data.name, f"test[:{count}]")
    batch = next(eval_batches(source, batch_size=count, canvas_size=28, num_threads=1))
    canvases = {name: jnp.asarray(batch[name]) for name in ("canvas", "size")}
    views = mirrored_pairs(canvases, loaded.config, 0, 8)
    params = getattr(loaded, network)["backbone"]
    maps = [np.asarray(loaded.model.backbone.forward(params, v).region_features) for v in views]
    rows, columns = maps[0].shape[1:3]
    hits, distances = [], []
    for first, second in zip(*maps, strict=True):
        found = match(*(jnp.asarray(x.reshape(1, rows * columns, -1)) for x in (first, second)))
        for i in np.asarray(found.top[0])[:10]:
            j = int(found.match[0, i])
            apart = np.hypot(j // columns - i // columns, j % columns - (columns - 1 - i % columns))
            hits.append(apart == 0)
            distances.append(apart)
    stride = loaded.config.views.global_size // rows
    return 100 * np.mean(hits), stride * np.mean(distances)


def test_numbers_and_figure_of_the_run(workdir, capsys):
    correspond.main([f"--workdir={workdir}"])
    (report,) = json.loads((workdir / "correspondence.json").read_text())
    hits, distance = by_hand(workdir, "teacher", 40)
    assert report["accuracy"] == pytest.approx(hits) and 0 < hits < 100
    assert report["distance"] == pytest.approx(distance)
    assert {name: report[name] for name in ("step", "key", "split", "images")} == {
        "step": 6, "key": "teacher", "split": "test[:40]", "images": 40
    }  # fmt: skip
    assert width(workdir / "correspondence.png") > 500
    assert f"{hits:.1f}" in capsys.readouterr().out


def test_two_networks_as_json(workdir, tmp_path, tiny_config, capsys):
    """Of other images and the student: nothing is written where nobody asked."""
    other = save_random(tmp_path / "other", tiny_config, seed=3)
    correspond.main([
        f"--workdir={workdir}", f"--against={other}", "--key=student", "--split=test[:8]", "--json"
    ])  # fmt: skip
    out = capsys.readouterr()
    ours, theirs = json.loads(out.out)
    assert (ours["workdir"], theirs["workdir"]) == (str(workdir), str(other))
    assert ours["accuracy"] == pytest.approx(by_hand(workdir, "student", 8)[0])
    assert ours["distance"] != theirs["distance"]
    assert "give --out=FOLDER" in out.err and not (workdir / "correspondence.json").exists()


@pytest.mark.parametrize("files", ["astronaut.jpg", "astronaut.jpg,coffee.jpg"])
def test_lines_on_photos(workdir, tmp_path, files):
    paths = ",".join(str(PHOTOS / name) for name in files.split(","))
    correspond.main([f"--workdir={workdir}", f"--images={paths}", f"--out={tmp_path / 'drawn'}"])
    assert width(tmp_path / "drawn" / "matches.png") > 500


def test_what_is_refused(workdir, tmp_path):
    for flags, message in [
        (["--images=a.jpg,b.jpg,c.jpg", f"--out={tmp_path}"], "one or two files"),
        (["--images=missing.jpg", f"--out={tmp_path}"], "missing.jpg cannot be read"),
        (["--images=missing.jpg"], "--out is missing"),
        (["--data=bundled/nothing"], "--data=bundled/nothing"),
        (["--images=a.jpg", "--json"], "--json has no numbers to print; leave it out"),
    ]:
        with pytest.raises(UserError, match=message):
            correspond.main([f"--workdir={workdir}", *flags])
    with pytest.raises(UserError, match="no workdir"):
        correspond.main([f"--workdir={tmp_path}"])


def test_features_that_are_not_finite(workdir):
    loaded = checkpoint.load_model(workdir)
    loaded.teacher["backbone"]["norm"]["bias"] = np.full(16, np.nan, np.float32)
    source = open_source(loaded.config.data.name, "test[:8]")
    with pytest.raises(RunError, match="not finite"):
        evaluate_correspondence(loaded, source)
    images = preprocessor(loaded.config)([np.zeros((16, 16, 3), np.uint8)] * 2)
    with pytest.raises(RunError, match="not finite"):
        matches_of_two(loaded, images[0], images[1], title="")
    with pytest.raises(RunError, match="not finite"):
        Attention(loaded.model.backbone, loaded.teacher["backbone"], images)


def test_attention_of_the_run(workdir, capsys):
    attention.main([f"--workdir={workdir}", "--count=2", "--at=0,0", "--at=0.9,0.5", "--json"])
    blocks = json.loads(capsys.readouterr().out)
    assert [(block["stage"], block["keys"], len(block["entropy"])) for block in blocks] == [
        (0, 4, 1), (1, 4, 2)
    ]  # fmt: skip
    assert all(0 < bits < 2 for block in blocks for bits in block["entropy"])
    assert {file.name for file in (workdir / "attention").iterdir()} == {
        "entropy.json", "entropy.png", "regions.png", "block_0_image_0.png",
        "block_0_image_1.png", "block_1_image_0.png", "block_1_image_1.png",
    }  # fmt: skip


def test_attention_in_photos(workdir, tmp_path, capsys):
    attention.main([
        f"--workdir={workdir}", f"--images={PHOTOS / 'coffee.jpg'}", "--block=-1",
        f"--out={tmp_path / 'drawn'}",
    ])  # fmt: skip
    assert (tmp_path / "drawn" / "block_1_image_0.png").exists()
    assert "entropy of attention" in capsys.readouterr().out


def test_what_attention_refuses(workdir, tmp_path):
    for flags, message in [
        (["--block=2"], "--block=2: there are blocks 0 to 1"),
        (["--at=2,0"], "--at"),
        (["--mass=0"], "--mass"),
        (["--images=a.jpg,"], "^--images: it is empty; name a file"),
        ([f"--images={PHOTOS / 'coffee.jpg'}"], "--out is missing"),
    ]:
        with pytest.raises(UserError, match=message):
            attention.main([f"--workdir={workdir}", *flags])


def test_a_resnet_has_no_attention(tmp_path, tiny_config):
    fields = dict.fromkeys(tiny_config.backbone) | {"name": "resnet50", "depths": (1,)}
    tiny_config.backbone.update(fields | {"base_width": 4})
    save_random(tmp_path / "run", tiny_config, seed=1, student_seed=2)
    with pytest.raises(UserError, match="^a ResNet has no attention to look at$"):
        attention.main([f"--workdir={tmp_path / 'run'}", f"--out={tmp_path}"])
