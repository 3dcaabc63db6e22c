"""Probes on few labels: which images, what chooses ℓ2, and the command."""

import json

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from test_knn_command import save_random
from test_logistic import overlapping, standardized

from esvit_jax.checkpoint import load_model
from esvit_jax.commands import linear
from esvit_jax.commands.fewshot import main
from esvit_jax.data.sources import open_source
from esvit_jax.errors import UserError
from esvit_jax.evaluate.blocks import ArrayBlocks
from esvit_jax.evaluate.fast import (
    DEFAULT_L2,
    L2_GRID,
    fast_linear,
    fast_probe,
    fast_table,
    held_out,
    of_each_class,
)
from esvit_jax.evaluate.features import labelled_features
from esvit_jax.evaluate.fewshot import Labels, few_shot, few_shot_result


def accuracy(train, labels, test, truth, l2):
    """Of scikit-learn's regression, with the train split's mean and deviation."""
    mean, deviation = train.mean(axis=0, dtype=np.float64), train.std(axis=0, dtype=np.float64)
    model = LogisticRegression(C=1 / (len(labels) * l2), tol=1e-8, max_iter=10_000)
    model.fit(standardized(train), labels)
    return 100 * np.mean(model.predict((test - mean) / deviation) == truth)


@pytest.fixture(name="splits", scope="module")
def _splits():
    features, labels = overlapping(n=500, d=30, classes=5, seed=3, gap=0.3)
    return (features[:200], labels[:200]), (features[200:], labels[200:])


def test_fast_probe_chooses_on_the_training_split_alone(splits):
    (train, labels), (test, truth) = splits
    l2 = (1e-4, 1e-2, 1.0)
    probe = fast_probe(ArrayBlocks(train, labels, 64), ArrayBlocks(test, truth, 64), 5, l2=l2)
    held = held_out(labels, seed=0)
    expected = {x: accuracy(train[~held], labels[~held], train[held], labels[held], x) for x in l2}
    assert probe.choices == pytest.approx(expected)
    assert len(set(expected.values())) > 1
    assert probe.l2 == max(l2, key=lambda x: (expected[x], x))
    assert probe.held_out == held.sum()
    assert probe.values["top1"] == pytest.approx(accuracy(train, labels, test, truth, probe.l2))
    # Whatever the test labels are, the choice is the same.
    other = fast_probe(ArrayBlocks(train, labels), ArrayBlocks(test, (truth + 1) % 5), 5, l2=l2)
    assert (other.l2, other.choices) == (probe.l2, probe.choices)


def test_what_is_held_out_is_a_fifth_of_each_class():
    labels = np.repeat([2, 0, 1], [4, 10, 17])
    held = held_out(labels, seed=1)
    assert np.bincount(labels[held], minlength=3).tolist() == [2, 3, 0]
    assert held_out(np.zeros((20, 3), int), seed=0).sum() == 4


def test_choices_depend_on_the_seed_and_nest():
    labels = np.random.default_rng(0).integers(0, 3, 90)
    few, more = (of_each_class(labels, lambda _, n=n: n, seed=4) for n in (2, 5))
    assert np.bincount(labels[few]).tolist() == [2, 2, 2]
    assert np.bincount(labels[more]).tolist() == [5, 5, 5]
    assert (few <= more).all()
    np.testing.assert_array_equal(few, of_each_class(labels, lambda _: 2, seed=4))
    assert (few != of_each_class(labels, lambda _: 2, seed=5)).any()


@pytest.mark.parametrize(
    ("labels", "images", "count"),
    [(Labels(shots=5), 200, 5), (Labels(percent=1.0), 260, 3), (Labels(percent=1.0), 20, 1)],
)
def test_amounts(labels, images, count):
    assert labels.count(images) == count
    assert str(Labels(percent=0.5)) == "0.5_percent"


def test_few_shots_equal_scikit_learn(splits):
    (train, labels), (test, truth) = splits
    one, five = few_shot(
        ArrayBlocks(train, labels), ArrayBlocks(test, truth), 5, [Labels(1), Labels(5)],
        seeds=(0, 7), metrics=("top1",),
    )  # fmt: skip
    for i, seed in enumerate((0, 7)):
        keep = of_each_class(labels, lambda _: 1, seed)
        expected = accuracy(train[keep], labels[keep], test, truth, DEFAULT_L2)
        assert one.values["top1"][i] == pytest.approx(expected)
    assert (one.images, one.l2) == (5, [DEFAULT_L2] * 2)
    assert five.images == 25 and set(five.l2) <= set(L2_GRID)
    result = few_shot_result([one], 3)
    assert result.values == {
        "top1/1_shots": np.mean(one.values["top1"]),
        "top1_spread/1_shots": np.std(one.values["top1"], ddof=1),
    }
    with pytest.raises(UserError, match=r"amounts = '99_shots': 5 of 5 classes have fewer than 99"):
        few_shot(ArrayBlocks(train, labels), ArrayBlocks(test, truth), 5, [Labels(99)])


def test_fast_linear_is_the_probe_of_view_features(workdir):
    loaded = load_model(workdir)
    train, test = (
        open_source("bundled/fashion_mnist_mini", x) for x in ("train[:160]", "test[:40]")
    )
    found = fast_linear(loaded, train, test, l2=(1e-2, 1.0))
    arrays = labelled_features(loaded, (train, test), "a probe")
    first, second = (ArrayBlocks(*split) for split in arrays)
    probe = fast_probe(first, second, 10, l2=(1e-2, 1.0))
    assert found.result.values == probe.values and set(probe.values) == {"top1", "top5"}
    assert (found.result.step, found.images) == (6, (160, 40))
    report = found.json()
    assert report["picked"] == {"l2": probe.l2} and report["held_out_images"] == probe.held_out
    assert report["sweep"] == [{"l2": x, "top1": percent} for x, percent in probe.choices.items()]
    cells = [list(column.cells) for column in fast_table(found).columns]
    assert cells[0] == ["0.01", "1"] and sum("←" in str(cell) for cell in cells[1]) == 1


@pytest.fixture(name="workdir")
def _workdir(tmp_path, tiny_config):
    tiny_config.data.train_split = "train[:160]"
    return save_random(tmp_path / "run", tiny_config, seed=1)


def test_linear_fast_command(workdir, capsys):
    linear.main([f"--workdir={workdir}", "--fast"])
    said = capsys.readouterr().out
    report = json.loads((workdir / "linear_fast.json").read_text())
    loaded = load_model(workdir)
    sources = (open_source("bundled/fashion_mnist_mini", x) for x in ("train[:160]", "test[:40]"))
    found = fast_linear(loaded, *sources)
    assert {name: report[name] for name in ("top1", "top5")} == pytest.approx(found.result.values)
    assert report["picked"] == {"l2": found.probe.l2} and len(report["sweep"]) == len(L2_GRID)
    assert (report["train_images"], report["test_images"]) == (160, 40)
    assert f"test: {found.result}" in said and "linear_fast.json" in said
    assert not (workdir / "linear.json").exists()


def test_command(workdir, capsys):
    main([f"--workdir={workdir}", "--seeds=2"])
    said = capsys.readouterr().out
    report = json.loads((workdir / "fewshot.json").read_text())
    assert [one["labels"] for one in report["amounts"]] == [
        "1_shots", "2_shots", "5_shots", "10_shots", "1_percent", "10_percent",
    ]  # fmt: skip
    assert (
        "20 shots are left out: 8 of 10 classes have fewer than 20 images, class 0 only 13" in said
    )
    assert [one["images"] for one in report["amounts"]][:3] == [10, 20, 50]
    five = report["amounts"][2]
    assert report["top1/5_shots"] == pytest.approx(np.mean(five["top1"])) and len(five["l2"]) == 2
    assert "│ 5 shots" in said and f"written to {workdir / 'fewshot.json'}" in said


def test_command_says_what_cannot_be(workdir):
    arguments = [f"--workdir={workdir}"]
    with pytest.raises(UserError, match=r"^--shots=2,50: 10 of 10 classes have fewer than 50 ima"):
        main([*arguments, "--shots=2,50"])
    with pytest.raises(UserError, match=r"^--percents=1,101: there are no more than 100$"):
        main([*arguments, "--percents=1,101"])
    with pytest.raises(UserError, match=r"^--shots: '0' is no whole number from 1 up$"):
        main([*arguments, "--shots=0"])
