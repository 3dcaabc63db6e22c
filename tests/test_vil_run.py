"""A tiny ViL, trained for two steps, evaluated and looked into by the commands."""

import json

import jax
import numpy as np
import pytest
from rich.console import Console
from test_swin import normal, random_params
from test_vil import TINY

from esvit_jax import checkpoint, loop
from esvit_jax.analyze.attention import Attention
from esvit_jax.commands import attention, knn
from esvit_jax.evaluate.tuning import layer_shares
from esvit_jax.interop.load import load

PHOTO = "tests/data/photos/coffee.jpg"


def vil_config(config):
    """16-px views are 8 x 8 cells, chunks of 3 x 3, then 4 x 4, all in one; local ones half."""
    backbone = config.backbone
    backbone.name, backbone.embed_dim, backbone.window_size = "vil_2262", None, None
    backbone.embed_dims, backbone.window_sizes = (8, 16), (3,)
    backbone.num_global, backbone.patch_sizes = (1, 0), (2, 2)
    config.total_steps = config.checkpoint_every_steps = 2
    config.data.train_split = "train[:80]"
    config.data.test_split = "test[:20]"
    return config


@pytest.fixture(name="workdir", scope="module")
def _workdir(tmp_path_factory):
    import tiny

    workdir = tmp_path_factory.mktemp("vil") / "run"
    loop.train(vil_config(tiny.tiny_config()), workdir, console=Console(quiet=True))
    return workdir


def test_two_steps_move_every_tensor(workdir):
    loaded = checkpoint.load_model(workdir)
    assert loaded.step == 2 and loaded.student is not None
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), loaded.student, loaded.teacher)
    assert all(jax.tree.leaves(moved["backbone"]))


def test_knn(workdir, capsys):
    knn.main([f"--workdir={workdir}", "--json"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["step"] == 2 and report["train_images"] == 80 and 0 <= report["top1/10"] <= 100


def test_attention(workdir, tmp_path):
    """Over the whole map; a cell of the sparse block sees nothing beyond the chunks around it."""
    attention.main([f"--workdir={workdir}", "--count=1", f"--out={tmp_path}", "--at=0.1,0.1"])
    report = json.loads((tmp_path / "entropy.json").read_text())
    assert [(b["window_size"], b["shift"], b["keys"]) for b in report] == [
        (None, 0, 65), (None, 0, 16),
    ]  # fmt: skip
    assert all(0 < x <= np.log2(b["keys"]) for b in report for x in b["entropy"])
    assert (tmp_path / "block_0_image_0.png").exists()

    backbone, variables, preprocess = load(workdir)
    found = Attention(backbone, variables["params"], preprocess([PHOTO]))
    weights = np.asarray(found.output.attention[0])[0, 0]  # [heads, 65, 65]
    seen, _, _ = found.seen_from(0, 0, (1, 2), 0.6)
    np.testing.assert_array_equal(seen.reshape(1, 64), weights[:, 1 + 8 + 2, 1:])
    assert np.all(seen[:, :6, :6] > 0)
    assert not np.any(seen[:, 6:]) and not np.any(seen[:, :, 6:])


def test_learning_rates_of_layers():
    """Three blocks: 0.5 to the power of the layers above, by hand."""
    params = random_params(TINY.init, normal(0, 1, 16, 16, 3))
    shares = layer_shares(TINY, {"backbone": params, "head": {"bias": np.zeros(3)}}, 0.5)
    found = {name: set(jax.tree.leaves(x)) for name, x in shares["backbone"].items()}
    assert found == {
        "layer1_0": {0.0625}, "layer1_1": {0.125}, "layer1_2": {0.125}, "layer2_0": {0.125},
        "layer2_1": {0.25}, "layer2_2": {0.25}, "layer2_3": {0.5}, "layer2_4": {0.5},
        "norm": {1.0},
    }  # fmt: skip
    assert shares["head"] == {"bias": 1.0}
