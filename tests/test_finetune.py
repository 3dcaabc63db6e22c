"""`esvit finetune`: rates of layers, loss, resuming, and as a user runs it."""

import dataclasses
import io
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from rich.console import Console
from test_convert import random_params
from test_knn_command import PHOTOS, save_random
from test_loop import text_of

import esvit_jax
from esvit_jax import checkpoint, parallel
from esvit_jax.commands import finetune as command
from esvit_jax.commands import knn
from esvit_jax.config_file import read_config
from esvit_jax.data.sources import open_source
from esvit_jax.errors import RunError, UserError
from esvit_jax.evaluate import finetune as library
from esvit_jax.evaluate import tuning as tuning_module
from esvit_jax.evaluate.tuning import Tuning, finetune_loss, finetune_optimizer, layer_shares
from esvit_jax.models import Swin, create_backbone, create_model
from esvit_jax.optim import warmup_cosine_schedule
from esvit_jax.runlog.signals import Interrupted
from esvit_jax.runlog.writer import read_metrics

QUIET = Console(quiet=True)
FLAGS = [
    "--epochs=4", "--batch_size=20", "--warmup_epochs=1", "--learning_rate=0.05", "--drop_path=0.2",
]  # fmt: skip
TUNING = Tuning(epochs=4, batch_size=20, warmup_epochs=1, learning_rate=0.05)


@pytest.fixture
def config(tiny_config):
    tiny_config.data.train_split = "train[:60]"
    return tiny_config


@pytest.fixture
def workdir(tmp_path, config):
    return save_random(tmp_path / "run", config, seed=1, student_seed=2)


def lines(folder):
    """metrics.jsonl without what depends on the machine."""
    return [
        {name: x for name, x in line.items() if name in ("step", "loss", "learning_rate")}
        | {name: x for name, x in line.items() if name.startswith("finetune/")}
        for line in read_metrics(folder / "metrics.jsonl")
    ]


def test_learning_rates_of_layers(config):
    """Three blocks: 0.5 to the power of the layers above, by hand."""
    config.backbone.depths = (2, 1)
    params = {
        "backbone": random_params(config, 0)["backbone"],
        "head": {"kernel": np.zeros((16, 10)), "bias": np.zeros(10)},
    }
    backbone = create_model(config).backbone
    shares = layer_shares(backbone, params, 0.5)
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/"): share
        for path, share in jax.tree_util.tree_leaves_with_path(shares)
    }
    expected = {
        "backbone/patch_embed/": 0.5**4,
        "backbone/layers_0/blocks_0/": 0.5**3,
        "backbone/layers_0/blocks_1/": 0.5**2,
        "backbone/layers_0/downsample/": 0.5**2,
        "backbone/layers_1/blocks_0/": 0.5**1,
        "backbone/norm/": 1.0,
        "head/": 1.0,
    }
    of_prefix = {
        prefix: {share for name, share in found.items() if name.startswith(prefix)}
        for prefix in expected
    }
    assert of_prefix == {prefix: {share} for prefix, share in expected.items()}
    assert sum(name.startswith(tuple(expected)) for name in found) == len(found)
    assert set(jax.tree.leaves(layer_shares(backbone, params, 1.0))) == {1.0}


def test_learning_rates_of_a_resnet():
    """Three blocks; nothing but the head is above the last."""
    resnet = create_backbone("resnet50", depths=(2, 1), base_width=4)
    shapes = jax.eval_shape(resnet.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    shares = layer_shares(resnet, {"backbone": shapes}, 0.5)["backbone"]
    assert {name: set(jax.tree.leaves(x)) for name, x in shares.items()} == {
        "conv1": {0.5**4}, "bn1": {0.5**4}, "layer1_0": {0.5**3}, "layer1_1": {0.5**2},
        "layer2_0": {0.5},
    }  # fmt: skip


def test_the_first_update_is_adamws_times_the_layers_share():
    """Adam's first direction is the gradient's sign; decay acts on kernels alone."""
    params = {
        "backbone": {
            "patch_embed": {"kernel": jnp.full((2, 2), 3.0)},
            "layers_0": {"blocks_0": {"bias": jnp.full(2, 3.0)}},
        },
        "head": {"kernel": jnp.full((2, 3), 3.0)},
    }
    tuning = dataclasses.replace(TUNING, layer_decay=0.5, weight_decay=0.1)
    swin = Swin(embed_dim=2, depths=(1,), num_heads=(1,))
    optimizer = finetune_optimizer(swin, tuning, warmup_cosine_schedule(0.2, 0.0, 0, 10))
    gradients = jax.tree.map(lambda x: -jnp.ones_like(x), params)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params, step=0)
    leaves = [np.unique(np.round(x, 5)).tolist() for x in jax.tree.leaves(updates)]
    block, embed, head = -0.2 * 0.5 * -1, -0.2 * 0.25 * (-1 + 0.3), -0.2 * (-1 + 0.3)
    assert leaves == [[pytest.approx(x, abs=1e-5)] for x in (block, embed, head)]


def test_loss_is_the_cross_entropy_with_smoothed_targets(config):
    """Without mixing and drop path: -sum t log softmax(features @ kernel + bias), in NumPy."""
    config.backbone.drop_path_rate = 0.0
    backbone = create_model(config).backbone
    tuning = Tuning(mixup=0, cutmix=0, label_smoothing=0.2)
    rng = np.random.default_rng(0)
    params = {
        "backbone": random_params(config, 0)["backbone"],
        "head": {"kernel": rng.standard_normal((16, 5)), "bias": rng.standard_normal(5)},
    }
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    batch = {
        "canvas": jnp.asarray(rng.integers(0, 256, (4, 28, 28, 3)), jnp.uint8),
        "size": jnp.full((4, 2), 28),
        "label": jnp.array([0, 4, 2, 2]),
    }
    view_keys, drop_keys = jax.random.split(jax.random.key(0), (2, 4))
    loss, _ = finetune_loss(backbone, config, tuning)(params, {}, batch, (view_keys, drop_keys))

    crop_keys, _ = jax.vmap(jax.random.split, out_axes=1)(view_keys)
    images = tuning_module.classifier_views(config, crop_keys, batch)
    features = np.asarray(backbone.forward(params["backbone"], images).view_features, np.float64)
    logits = features @ np.asarray(params["head"]["kernel"]) + np.asarray(params["head"]["bias"])
    log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    wanted = np.full((4, 5), 0.2 / 5) + 0.8 * np.eye(5)[batch["label"]]
    assert float(loss) == pytest.approx(-(wanted * log_probs).sum(1).mean(), rel=1e-4)


def test_as_a_user_and_what_takes_the_result(workdir, tmp_path, capsys):
    out = tmp_path / "tuned"
    command.main([f"--workdir={workdir}", f"--out={out}", *FLAGS, "--json"])
    stdout, stderr = capsys.readouterr()
    report = json.loads(stdout)
    assert (report["workdir"], report["step"]) == (str(out), 12)
    metrics = lines(out)
    assert [line["step"] for line in metrics if "loss" in line] == list(range(1, 13))
    tested = [line for line in metrics if "finetune/top1/test" in line]
    assert [line["step"] for line in tested] == [3, 6, 9, 12]
    quantities = ("top1/test", "top5/test", "top1/train", "top5/train")
    assert {name: report[name] for name in quantities} == {
        name: tested[-1][f"finetune/{name}"] for name in quantities
    }
    # 3 steps an epoch: one of warm-up, from 0 to the peak of 0.05 · 20 / 256, then the cosine.
    peak = 0.05 * 20 / 256
    cosine = 1e-6 + 0.5 * (peak - 1e-6) * (1 + np.cos(np.pi * np.arange(9) / 9))
    rates = [line["learning_rate"] for line in metrics if "loss" in line]
    np.testing.assert_allclose(rates, [0, peak / 2, peak, *cosine], rtol=1e-4, atol=1e-9)
    assert "60 images of 10 classes, 12 steps of 20" in stderr

    # The backbone is one for `load`, and with the classifier it gives the accuracy of the report.
    backbone, variables, _ = esvit_jax.load(str(out))
    started = checkpoint.load_model(workdir).teacher["backbone"]
    assert not np.array_equal(
        variables["params"]["patch_embed"]["proj"]["kernel"],
        started["patch_embed"]["proj"]["kernel"],
    )
    config, origin = read_config(out) or (None, {})
    assert config and config.backbone.drop_path_rate == 0.2
    assert origin["source"] == f"teacher of {workdir} at step 6"
    classifier = np.load(out / "classifier.npz")
    found = esvit_jax.embed(str(out), "bundled/fashion_mnist_mini", split="test[:40]")
    logits = found.view_features @ classifier["kernel"] + classifier["bias"]
    assert found.label is not None
    assert 100 * (logits.argmax(1) == found.label).mean() == pytest.approx(report["top1/test"])
    assert tuple(classifier["class_names"]) == open_source(config.data.name, "test").class_names
    knn.main([f"--workdir={out}", "--json"])
    assert json.loads(capsys.readouterr().out)["train_images"] == 60

    command.main([f"--workdir={workdir}", f"--out={out}", *FLAGS])
    assert "there is nothing left to train" in capsys.readouterr().out
    assert lines(out) == metrics
    with pytest.raises(UserError, match=r"it holds another run: epochs was 4.0 and is 5.0 now"):
        command.main([f"--workdir={workdir}", f"--out={out}", *FLAGS, "--epochs=5"])
    with pytest.raises(UserError, match=r"^--out=\S+/run: it holds another run; give a folder"):
        command.main([f"--workdir={workdir}", f"--out={workdir}", *FLAGS])


def finetune(out, config, backbone, console=QUIET):
    sources = [open_source(config.data.name, x) for x in ("train[:60]", "test[:40]")]
    return library.finetune(
        out, config, *sources, backbone=backbone, tuning=TUNING, console=console
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A whole run with drop path, its network and its config."""
    config = tiny.tiny_config()
    config.backbone.drop_path_rate = 0.2
    backbone = parallel.replicate(random_params(config, 1)["backbone"], "pmap")
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    return folder, finetune(folder, config, backbone), config, backbone


@pytest.mark.parametrize("where", ["step 5", "the evaluation after step 6"])
def test_an_interrupted_run_goes_on_exactly(tmp_path, undisturbed, monkeypatch, where):
    folder, expected, config, backbone = undisturbed
    check, evaluate = library.finite_loss, library._Finetune._evaluate

    def stop(now):
        if now:
            os.kill(os.getpid(), signal.SIGTERM)

    def check_and_stop(done, scalars):
        stop(where == f"step {done}")
        return check(done, scalars)

    def evaluate_and_stop(self, done, state):
        stop(where == f"the evaluation after step {done}")
        return evaluate(self, done, state)

    out, step = tmp_path / "run", 5 if where == "step 5" else 6
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match=f"step {step} of 12"):
        patch.setattr(library, "finite_loss", check_and_stop)
        patch.setattr(library._Finetune, "_evaluate", evaluate_and_stop)
        finetune(out, config, backbone)
    assert [line["step"] for line in lines(out) if "finetune/top1/test" in line] == [3]
    console = Console(file=io.StringIO(), width=200)
    resumed = finetune(out, config, backbone, console)
    assert f"going on from step {step} of 12" in text_of(console)
    assert resumed.result == expected.result
    assert lines(out) == lines(folder)
    assert not (out / "lock.json").exists()
    ours, theirs = (checkpoint.load_model(run).teacher for run in (out, folder))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_from_scratch_by_a_config_is_as_from_a_workdirs_architecture(workdir, tmp_path, capsys):
    config = os.path.join(os.path.dirname(__file__), "tiny.py")
    flags = [*FLAGS, "--epochs=1", "--warmup_epochs=0", "--train_split=train[:60]", "--json"]
    reports = []
    for i, network in enumerate(
        [[f"--config={config}"], [f"--workdir={workdir}", "--from_scratch"]]
    ):
        command.main([*network, f"--out={tmp_path / str(i)}", *flags])
        reports.append(json.loads(capsys.readouterr().out))
    first, second = ({k: x for k, x in report.items() if k != "workdir"} for report in reports)
    assert first == second
    _, origin = read_config(tmp_path / "0") or (None, {})
    assert origin["source"] == "random" and origin["finetune"]["layer_decay"] == 1.0


def test_a_loss_that_is_not_finite():
    assert library.finite_loss(3, {"loss": 2.0}) == {"loss": 2.0}
    with pytest.raises(RunError, match=r"^step 3: the loss is not finite; take another workdir"):
        library.finite_loss(3, {"loss": np.inf})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--epochs=0"], r"^--epochs=0.0: it must be more than 0"),
        (["--epochs=1"], r"^--warmup_epochs=5: it must be less than epochs, which is 1"),
        (["--mixup=-1"], r"^--mixup=-1.0: it must be at least 0"),
        (["--learning_rate=nan"], r"^--learning_rate=nan: it must be more than 0"),
        (["--layer_decay=1.5"], r"^--layer_decay=1.5: it must be at most 1"),
        (["--label_smoothing=1"], r"^--label_smoothing=1.0: it must be less than 1"),
        (["--drop_path=1"], r"^--drop_path=1.0: it must be"),
        ([f"--data=folder:{PHOTOS}", "--train_split=train", "--test_split=train"],
         r"^--data=folder:\S+: train has no labels; fine-tuning needs them"),
        (["--step=7"], r"has no checkpoint of step 7"),
    ],
)  # fmt: skip
def test_what_cannot_be_tuned(workdir, tmp_path, flags, message, monkeypatch):
    monkeypatch.setattr(library, "Fit", None)
    with pytest.raises(UserError, match=message):
        command.main([f"--workdir={workdir}", f"--out={tmp_path}/out", *flags])
    assert not (tmp_path / "out").exists()
