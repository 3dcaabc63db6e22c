"""`esvit linear`: as a user runs it, what it refuses, and that a broken probe goes on exactly."""

import io
import json
import os
import signal

import cv2
import jax
import numpy as np
import pytest
from rich.console import Console
from test_knn_command import PHOTOS, save_random
from test_loop import text_of

from esvit_jax import checkpoint
from esvit_jax.commands.linear import main
from esvit_jax.data.sources import open_source
from esvit_jax.errors import RUN_ERROR, RunError, UserError
from esvit_jax.evaluate import linear
from esvit_jax.evaluate.sweep import Head, Sweep

QUIET = Console(quiet=True)
FLAGS = ["--blocks=1,2", "--learning_rates=0.1,1", "--epochs=4", "--batch_size=20"]
SWEEP = Sweep(blocks=(1, 2), learning_rates=(0.1, 1.0))


@pytest.fixture
def workdir(tmp_path, tiny_config):
    tiny_config.data.train_split = "train[:60]"
    return save_random(tmp_path / "run", tiny_config, seed=1, student_seed=2)


@pytest.fixture
def colours(tmp_path):
    """Images of one colour each, three classes: any network tells them apart."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("test", 4)):
        for name, colour in (
            ("blue", (230, 20, 20)),
            ("green", (20, 230, 20)),
            ("red", (9, 9, 230)),
        ):
            folder = tmp_path / "colours" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                image = np.full((20, 24, 3), colour) + rng.integers(-9, 10, (20, 24, 3))
                cv2.imwrite(str(folder / f"{i}.png"), image.astype(np.uint8))
    return tmp_path / "colours"


def probe(workdir, **fields):
    """Without the command, and the trained heads."""
    loaded = checkpoint.load_model(workdir)
    sources = [open_source(loaded.config.data.name, x) for x in ("train[:60]", "test[:40]")]
    fields = {"sweep": SWEEP, "epochs": 4, "batch_size": 20, "console": QUIET} | fields
    return linear.linear_probe(loaded, *sources, keep_in=workdir / "linear", **fields)


@pytest.fixture
def trained(monkeypatch):
    """The heads of every probe that comes to its evaluation."""
    heads, evaluate = [], linear._Probe.evaluate

    def recording(self, state, console):
        heads.append(jax.tree.map(np.asarray, state.params["head"]))
        return evaluate(self, state, console)

    monkeypatch.setattr(linear._Probe, "evaluate", recording)
    return heads


def test_the_run_on_its_own_data(workdir, trained, capsys):
    main([f"--workdir={workdir}", *FLAGS])
    report = json.loads((workdir / "linear.json").read_text())
    sweep = report.pop("sweep")
    assert [Head(x["blocks"], x["learning_rate"], x["weight_decay"]) for x in sweep] == [
        head for n in (1, 2) for head in SWEEP.heads(n)
    ]
    best = max(range(8), key=lambda i: sweep[i]["top1"])
    picked = {name: sweep[best][name] for name in Head._fields}
    tested = accuracy_by_numpy(workdir, trained[0], picked)
    assert report == {
        "step": 6, "key": "teacher", "data": "bundled/fashion_mnist_mini",
        "train_split": "train[:60]", "test_split": "test[:40]",
        "train_images": 60, "test_images": 40, "test_unreadable": 0,
        "epochs": 4.0, "batch_size": 20, "held_out_images": 6, "picked": picked,
        "top1": pytest.approx(tested[0]), "top5": pytest.approx(tested[1]),
    }  # fmt: skip
    said = capsys.readouterr().out
    assert "8 heads on 54 images of 10 classes, 8 steps of 20; 6 are held out" in said
    assert f"picked: {Head(**picked)}" in said and f"{sweep[best]['top1']:.2f} *" in said
    assert f"test: top1 {report['top1']:.1f} %, top5 {report['top5']:.1f} %" in said
    assert f"written to {workdir / 'linear.json'}" in said
    assert list((workdir / "linear").iterdir()) == []  # what was kept on the way is gone


def accuracy_by_numpy(workdir, heads, picked):
    """Top-1 and top-5 of a head on the test images, from the features that `embed` would write."""
    loaded = checkpoint.load_model(workdir)
    from esvit_jax.evaluate.features import FeatureExtractor, evaluation_images

    def extract(params, batch):
        images = evaluation_images(loaded.config, batch)
        return loaded.model.backbone.forward(params, images).block_means

    extractor = FeatureExtractor(extract, loaded.config)
    source = open_source(loaded.config.data.name, "test[:40]")
    (batch,) = extractor.batches(loaded.teacher["backbone"], source)
    features = np.concatenate(batch["features"][-picked["blocks"] :], axis=1)
    head = heads[str(picked["blocks"])]
    i = SWEEP.heads(picked["blocks"]).index(Head(**picked))
    order = np.argsort(-(features @ head["kernel"][i] + head["bias"][i]), axis=1)
    hits = order == batch["label"][:, None]
    return 100 * hits[:, 0].mean(), 100 * hits[:, :5].any(1).mean()


def test_separable_data_are_separated(workdir, colours, capsys):
    main(
        [f"--workdir={workdir}", f"--data=folder:{colours}", "--train_split=train",
         "--test_split=test", "--json", "--blocks=2", "--learning_rates=0.03,1",
         "--epochs=20", f"--out={colours}/probe.json"]
    )  # fmt: skip
    stdout, stderr = capsys.readouterr()
    report = json.loads(stdout)
    assert (report["top1"], report["top5"]) == (100.0, 100.0)
    assert report == json.loads((colours / "probe.json").read_text())
    assert max(x["top1"] for x in report["sweep"]) == 100.0
    assert "30 training and 12 test images" in stderr


def test_an_interrupted_probe_goes_on_exactly(workdir, trained, monkeypatch, capsys):
    undisturbed = probe(workdir)
    log = linear.best_loss

    def log_and_stop(done, scalars):
        if done == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return log(done, scalars)

    def end(status):
        raise SystemExit(status)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match=str(RUN_ERROR)):
        patch.setattr(linear, "best_loss", log_and_stop)
        patch.setattr(os, "_exit", end)
        main([f"--workdir={workdir}", *FLAGS])
    assert capsys.readouterr().err == (
        "esvit linear: stopped by a signal after step 3 of 8; the same command goes on from there\n"
    )
    (kept,) = (workdir / "linear").iterdir()
    assert checkpoint.has_checkpoint(kept) and len(trained) == 1
    other = probe(workdir, epochs=2)  # of another length: not gone on with
    assert kept.exists()

    console = Console(file=io.StringIO(), width=200)
    assert probe(workdir, console=console) == undisturbed != other
    assert "going on from step 3 of 8" in text_of(console)
    jax.tree.map(np.testing.assert_array_equal, trained[0], trained[2])
    assert list((workdir / "linear").iterdir()) == []


def test_a_student_has_heads_of_its_own(workdir, trained):
    assert probe(workdir) != probe(workdir, key="student")
    kernels = [heads["1"]["kernel"] for heads in trained]
    assert not np.array_equal(*kernels)


def test_features_that_are_not_finite(workdir):
    loaded = checkpoint.load_model(workdir)
    loaded.teacher["backbone"]["norm"]["bias"] *= np.nan
    sources = [open_source(loaded.config.data.name, x) for x in ("train[:60]", "test[:40]")]
    with pytest.raises(RunError, match=r"^step 1: features are not finite; the network diverged"):
        linear.linear_probe(
            loaded, *sources, keep_in=workdir / "linear", sweep=SWEEP, console=QUIET
        )


def test_heads_that_diverge_are_not_picked():
    losses = {"1": np.array([np.nan, 2.0]), "2": np.array([np.inf, 3.0])}
    assert linear.best_loss(4, {"finite": 1.0, "loss": losses}) == {"loss": 2.0}
    with pytest.raises(RunError, match=r"^step 4: the loss of no head is finite; lower the learn"):
        linear.best_loss(4, {"finite": 1.0, "loss": {"1": np.array([np.nan, np.inf])}})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], r"^--blocks=1,4: the network has 2 blocks; numbers from 1 to 2 will do"),
        (["--epochs=0"], r"^--epochs=0.0: it must be more than 0"),
        (["--epochs=many"], r"^--epochs: 'many' is no number"),
        (["--blocks=1,x"], r"^--blocks: 'x' is no whole number from 1 up"),
        (["--blocks=1", "--learning_rates=0"], r"^--learning_rates=0.0: they must be more"),
        (["--blocks=1", "--train_split=train[:1]"], r"train\[:1\] has 1 record"),
        (["--train_split=train[:0]"], r"^--train_split=train\[:0\]: .* selects none"),
        (["--data=imagenet2012"], r"^--data=imagenet2012: it is not prepared in"),
        ([f"--data=folder:{PHOTOS}", "--train_split=train", "--test_split=train"],
         r"^--data=folder:\S+: train has no labels; a linear probe needs them"),
        (["--step=7"], r"has no checkpoint of step 7"),
    ],
)  # fmt: skip
def test_what_cannot_be_probed(workdir, flags, message, monkeypatch):
    monkeypatch.setattr(linear, "Fit", None)
    with pytest.raises(UserError, match=message):
        main([f"--workdir={workdir}", *flags])


def test_one_class_is_none(workdir, colours):
    for split in ("train", "test"):
        (colours / split / "blue").rename(colours / f"one_{split}")
    for split in ("train", "test"):
        (colours / "one" / split).mkdir(parents=True)
        (colours / f"one_{split}").rename(colours / "one" / split / "blue")
    with pytest.raises(UserError, match=r"one class; a linear probe needs two classes or more"):
        main(
            [f"--workdir={workdir}", f"--data=folder:{colours}/one", "--train_split=train",
             "--test_split=test"]
        )  # fmt: skip
