"""A tiny ViT, trained for two steps, evaluated, looked into and fine-tuned by the commands."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console
from test_convert import random_params

from esvit_jax import checkpoint, loop
from esvit_jax.analyze.attention import Attention
from esvit_jax.commands import attention, bench, correspond, finetune, knn, linear
from esvit_jax.errors import UserError
from esvit_jax.evaluate.tuning import layer_shares
from esvit_jax.interop.load import load
from esvit_jax.models import create_model

PHOTO = Path(__file__).parent / "data" / "photos" / "coffee.jpg"


def vit_config(config):
    """16-px views are 4 x 4 patches, 8-px ones 2 x 2."""
    config.backbone.name = "vit_tiny"
    config.backbone.depths, config.backbone.num_heads = (2,), (2,)
    config.backbone.window_size, config.backbone.patch_size = None, 4
    config.total_steps = config.checkpoint_every_steps = 2
    config.data.train_split = "train[:80]"
    config.data.test_split = "test[:20]"
    return config


@pytest.fixture(name="workdir", scope="module")
def _workdir(tmp_path_factory):
    import tiny

    workdir = tmp_path_factory.mktemp("vit") / "run"
    loop.train(vit_config(tiny.tiny_config()), workdir, console=Console(quiet=True))
    return workdir


def test_two_steps_move_every_tensor(workdir):
    loaded = checkpoint.load_model(workdir)
    assert loaded.step == 2 and loaded.student is not None
    flat = dict(jax.tree_util.tree_leaves_with_path(loaded.student["backbone"]))
    names = {jax.tree_util.keystr(path, simple=True, separator="/") for path in flat}
    assert {"cls_token", "pos_embed", "patch_embed/proj/kernel", "norm/scale"} < names
    teacher = dict(jax.tree_util.tree_leaves_with_path(loaded.teacher["backbone"]))
    assert all(np.any(flat[path] != teacher[path]) for path in flat)


def test_knn(workdir, capsys):
    knn.main([f"--workdir={workdir}", "--json"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["step"] == 2 and report["train_images"] == 80 and 0 <= report["top1/10"] <= 100


def test_attention(workdir, tmp_path):
    """Of one window over the map; what the class token gets is not on it."""
    attention.main([f"--workdir={workdir}", "--count=1", f"--out={tmp_path}", "--at=0.3,0.9"])
    report = json.loads((tmp_path / "entropy.json").read_text())
    assert [(b["window_size"], b["shift"], b["keys"]) for b in report] == [(None, 0, 17)] * 2
    assert all(0 < bits <= np.log2(17) for b in report for bits in b["entropy"])
    assert (tmp_path / "block_1_image_0.png").exists() and (tmp_path / "regions.png").exists()

    backbone, variables, preprocess = load(workdir)
    images = preprocess([PHOTO])
    found = Attention(backbone, variables["params"], images)
    weights = np.asarray(found.output.attention[1])[0, 0]  # [heads, 17, 17]
    seen, _, bits = found.seen_from(1, 0, (1, 3), 0.6)
    np.testing.assert_array_equal(seen.reshape(2, 16), weights[:, 1 + 1 * 4 + 3, 1:])
    seen, _, _ = found.seen_from(1, 0, None, 0.6)
    np.testing.assert_array_equal(seen.reshape(2, 16), weights[:, 0, 1:])
    rows = weights[:, 8]
    np.testing.assert_allclose(bits, -(rows * np.log2(rows)).sum(-1), rtol=1e-5)


def test_linear(workdir, capsys):
    linear.main([f"--workdir={workdir}", "--fast", "--json"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["step"] == 2 and 0 <= report["top1"] <= 100


def test_correspond(workdir, capsys):
    correspond.main([f"--workdir={workdir}", "--split=test[:4]", "--json"])
    (report,) = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["distance"] == pytest.approx(4 * report["distance_cells"])


def test_finetune(workdir, tmp_path):
    flags = ["--epochs=1", "--batch_size=40", "--warmup_epochs=0"]
    tuned = tmp_path / "tuned"
    finetune.main([f"--workdir={workdir}", f"--out={tuned}", *flags])
    before, after = (checkpoint.load_model(x).network()["backbone"] for x in (workdir, tuned))
    for name in ("cls_token", "pos_embed"):
        assert np.any(before[name] != after[name])


def test_learning_rates_of_layers(tiny_config):
    """Two blocks: 0.5 to the power of the layers above, by hand."""
    config = vit_config(tiny_config)
    backbone, params = create_model(config).backbone, random_params(config, 0)["backbone"]
    shares = layer_shares(backbone, {"backbone": params, "head": {"bias": np.zeros(3)}}, 0.5)
    found = {name: set(jax.tree.leaves(x)) for name, x in shares["backbone"].items()}
    assert found == {
        "cls_token": {0.125}, "pos_embed": {0.125}, "patch_embed": {0.125},
        "blocks_0": {0.25}, "blocks_1": {0.5}, "norm": {1.0},
    }  # fmt: skip
    assert shares["head"] == {"bias": 1.0}


def test_the_peer_that_is_a_swin_is_refused():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    with pytest.raises(UserError, match="--peer=torch: the peer is a Swin, and .* is vit_tiny"):
        bench.main(["--config=quickstart", "--config.backbone.name=vit_tiny", "--peer=torch"])
