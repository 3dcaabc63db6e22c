"""Transfer: the table of sets against tensorflow-datasets, multilabel sets, the command."""

import json
import shutil
import types
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds
from test_knn_command import save_random
from tfds_files import write_set

from esvit_jax.checkpoint import load_model
from esvit_jax.commands.transfer import main
from esvit_jax.data.multilabel import open_multilabel
from esvit_jax.data.sources import open_source
from esvit_jax.errors import UserError
from esvit_jax.evaluate import transfer as transfer_module
from esvit_jax.evaluate.blocks import ArrayBlocks
from esvit_jax.evaluate.fast import fast_probe
from esvit_jax.evaluate.features import labelled_features
from esvit_jax.evaluate.metrics import METRICS, mean_average_precision
from esvit_jax.evaluate.result import Result
from esvit_jax.evaluate.sets import SETS, TransferSet, named_set
from esvit_jax.evaluate.transfer import SetScores, open_set, transfer_results, wins

MINI = "bundled/fashion_mnist_mini"


@pytest.mark.parametrize("name", [name for name, one in SETS.items() if one.place])
def test_sets_are_as_tensorflow_datasets_has_them(name, tmp_path):
    """By the installed version's builder: no data, no network."""
    place = SETS[name].place
    assert place is not None
    features: Any = tfds.builder(place, data_dir=tmp_path).info.features
    assert "image" in features
    label = features["label"] if "label" in features else features["labels"].feature
    assert label.num_classes == SETS[name].num_classes


def test_metrics_are_those_that_the_sets_ask_for():
    asked = {one.metric for one in SETS.values()}
    assert asked == {"top1", "mean_per_class", "map11", "roc_auc"} <= set(METRICS)
    special = {name: one.metric for name, one in SETS.items() if one.metric != "top1"}
    assert special == {
        "caltech101": "mean_per_class", "fgvc_aircraft": "mean_per_class",
        "oxford_flowers102": "mean_per_class", "oxford_iiit_pet": "mean_per_class",
        "voc2007": "map11", "hateful_memes": "roc_auc",
    }  # fmt: skip


def test_names():
    assert named_set("cifar10") == ("cifar10", SETS["cifar10"])
    name, about = named_set("resisc45=folder:/data/a=b")
    assert (name, about.place, about.train, about.test) == (
        "resisc45", "folder:/data/a=b", "train", "test",
    )  # fmt: skip
    assert about.num_classes == 45
    assert named_set("folder:/x=y")[1].place == "folder:/x=y"
    with pytest.raises(UserError, match="no set of the name 'cfar10'; any other set is written fo"):
        named_set("cfar10=folder:/data/a=b")
    with pytest.raises(UserError, match="it names no set"):
        named_set("")


# Several classes an image.

NAMES = ["hat", "shoe", "bag"]


def write_multilabel(directory: Path, images: int = 30) -> np.ndarray:
    """A TFDS set as VOC's is built; returns its targets. Image i of a class is brighter there."""
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(encoding_format="png"),
            "labels": tfds.features.Sequence(tfds.features.ClassLabel(names=NAMES)),
            "labels_no_difficult": tfds.features.Sequence(tfds.features.ClassLabel(names=NAMES)),
        }
    )
    rng = np.random.default_rng(0)
    targets = rng.integers(-1, 2, (2 * images, 3)).astype(np.int32)
    records = []
    for row in targets:
        image = rng.integers(0, 60, (12, 12, 3)).astype(np.uint8)
        for c in range(3):
            image[:, 4 * c : 4 * c + 4] += np.uint8(150 * (row[c] == 1))
        records.append(
            {
                "image": cv2.imencode(".png", image)[1].tobytes(),
                "labels": np.flatnonzero(row != 0).tolist(),
                "labels_no_difficult": np.flatnonzero(row == 1).tolist(),
            }
        )
    write_set(directory, features, {"train": records[:images], "test": records[images:]})
    return targets


@pytest.fixture(name="two", scope="module")
def _two(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data") / "two" / "1.0.0"
    return str(directory), write_multilabel(directory)


def test_classes_of_each_image(two):
    directory, targets = two
    split = open_multilabel(directory, "test")
    assert split.class_names == tuple(NAMES) and len(split.source) == 30
    for i in range(30):
        row = split.targets[split.source[i]["id"]]
        np.testing.assert_array_equal(row, targets[30 + i])
    with pytest.raises(UserError, match=f"name = '{MINI}': it has no feature labels_no_difficult"):
        open_multilabel(MINI, "test")


@pytest.fixture(name="workdir")
def _workdir(tmp_path, tiny_config):
    tiny_config.data.train_split = "train[:160]"
    return save_random(tmp_path / "run", tiny_config, seed=1)


def test_average_precision_of_several_classes(two, workdir):
    directory, targets = two
    about = TransferSet("two", directory, "train", "test", "map11", 3)
    loaded = load_model(workdir)
    protocol = transfer_module.Protocol(l2=(1e-2,))
    scores = transfer_module.transfer(
        loaded, open_set("two", about, None), protocol, keep_in=str(workdir)
    )
    train, test = (
        transfer_module.FeatureExtractor(
            transfer_module.view_features(loaded.model.backbone, loaded.config), loaded.config
        ).arrays(loaded.network()["backbone"], open_source(directory, split))[0]
        for split in ("train", "test")
    )
    probe = fast_probe(
        ArrayBlocks(train, targets[:30]), ArrayBlocks(test, targets[30:]), 3, metrics=("map11",),
        l2=(1e-2,),
    )  # fmt: skip
    expected = mean_average_precision(probe.model.scores(test)[0], targets[30:])
    assert scores.probe == pytest.approx([expected]) and scores.knn is None
    assert scores.images == (30, 30) and expected > 60
    with pytest.raises(UserError, match="images have several classes; shots are"):
        protocol = transfer_module.Protocol(shots=1)
        transfer_module.transfer(
            loaded, open_set("two", about, None), protocol, keep_in=str(workdir)
        )


# The command.


def folder_of(directory: Path, classes: int = 3, images: int = 12, seed: int = 0) -> str:
    """Pictures as folder:PATH/split/class/image; a class is a grey value."""
    rng = np.random.default_rng(seed)
    for split in ("train", "test"):
        for c in range(classes):
            (directory / split / f"class{c}").mkdir(parents=True)
            for i in range(images):
                image = np.clip(60 * c + rng.normal(size=(20, 20)) * 30, 0, 255).astype(np.uint8)
                cv2.imwrite(str(directory / split / f"class{c}" / f"{i}.png"), image)
    return f"folder:{directory}"


def test_command(workdir, tmp_path, tiny_config, capsys):
    other = save_random(tmp_path / "other", tiny_config, seed=2)
    greys = folder_of(tmp_path / "greys")
    signs = folder_of(tmp_path / "signs", classes=2)
    shutil.rmtree(tmp_path / "greys" / "test" / "class2")
    shutil.copytree(tmp_path / "greys" / "train" / "class2", tmp_path / "greys" / "test" / "class2")
    main(
        [f"--workdir={workdir}", f"--against={other}", "--protocol=benchmark", "--shots=5",
         f"--data={greys},hateful_memes={signs},gtsrb={greys},fer2013,cifar10",
         f"--data_dir={tmp_path}"]
    )  # fmt: skip
    said = capsys.readouterr().out
    report = json.loads((workdir / "transfer.json").read_text())
    assert list(report["sets"]) == [greys, "hateful_memes"]
    assert {name: why.split(";")[0] for name, why in report["skipped"].items()} == {
        "gtsrb": "it has 3 classes, and GTSRB has 43",
        "fer2013": "TFDS does not have it",
        "cifar10": f"it is not prepared in {tmp_path}",
    }
    assert "fer2013 is left out: TFDS does not have it; name a folder of it: fer2013=fold" in said
    memes = report["sets"]["hateful_memes"]
    assert (memes["metric"], memes["knn"], len(memes["probe_seeds"])) == ("roc_auc", None, 3)
    assert report["transfer/roc_auc/hateful_memes"] == pytest.approx(np.mean(memes["probe_seeds"]))
    won = sum(
        report["sets"][name]["probe"] > report["sets_against"][name]["probe"]
        for name in report["sets"]
    )
    assert report["wins"]["probe"] == [won, 2]
    assert f"better than {other} on {won} of 2 sets by probe" in said
    assert "mean" not in said and "ROC-AUC" in said


def test_command_equals_the_functions(workdir, tmp_path, capsys):
    greys = folder_of(tmp_path / "greys")
    out = tmp_path / "out.json"
    main([f"--workdir={workdir}", f"--data={greys}", f"--out={out}", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads(out.read_text()) and not (workdir / "transfer.json").exists()
    sources = [open_source(greys, split) for split in ("train", "test")]
    train, test = labelled_features(load_model(workdir), sources, "a probe")
    probe = fast_probe(ArrayBlocks(*train), ArrayBlocks(*test), 3)
    assert report["sets"][greys]["probe"] == pytest.approx(probe.values["top1"])
    assert report["sets"][greys]["l2"] == [probe.l2]


def test_the_published_protocol(workdir, tmp_path, capsys, monkeypatch):
    """It is `linear_probe`, for sets that ask for what that gives."""
    asked = []

    def probe(loaded, train, test, *, keep_in, key, console):
        asked.append((train.name, train.split, test.split, keep_in, key))
        return types.SimpleNamespace(result=Result("linear", {"top1": 12.5, "top5": 50.0}))

    monkeypatch.setattr(transfer_module, "linear_probe", probe)
    greys = folder_of(tmp_path / "greys")
    signs = folder_of(tmp_path / "signs", classes=2)
    data = f"--data={greys},hateful_memes={signs}"
    main([f"--workdir={workdir}", data, "--protocol=linear", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert asked == [(greys, "train", "test", f"{workdir}/linear", None)]
    assert report["sets"][greys]["probe"] == 12.5
    assert report["skipped"] == {
        "hateful_memes": "it asks for ROC-AUC, and the published protocol gives top-1; take "
        "another protocol"
    }
    with pytest.raises(UserError, match="^--shots=5: the protocol linear takes all labels"):
        main([f"--workdir={workdir}", data, "--protocol=linear", "--shots=5"])


def test_no_set_is_one_line(workdir, tmp_path):
    with pytest.raises(UserError, match="^--data=fer2013,gtsrb: none of the sets can be read"):
        main([f"--workdir={workdir}", "--data=fer2013,gtsrb"])
    with pytest.raises(UserError, match="nothing is no workdir: it has no config.json"):
        main([f"--workdir={workdir}", f"--against={tmp_path}/nothing"])
    greys = folder_of(tmp_path / "greys")
    with pytest.raises(UserError, match="no set is left to transfer to"):
        main([f"--workdir={workdir}", f"--data={greys}", "--shots=13"])
    with pytest.raises(UserError, match="it has one class; there is nothing to tell apart"):
        open_set("one", named_set(folder_of(tmp_path / "one", classes=1))[1], None)


def test_wins_and_results():
    def scores(probe, knn):
        return SetScores("a", "top1", (4, 4), probe, [0.1], knn)

    ours = [scores([50.0, 70.0], 40.0), scores([30.0], None), scores([20.0], 10.0)]
    others = [scores([55.0], 40.0), scores([30.0], None), scores([10.0], 9.0)]
    assert wins(ours, others) == {"probe": (2, 3), "knn": (1, 2)}
    probe, knn = transfer_results(ours[:1], 3)
    assert probe.scalars() == {"transfer/top1/a": 60.0}
    assert knn.scalars() == {"transfer_knn/top1/a": 40.0}
