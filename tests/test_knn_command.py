"""`esvit knn`: whose numbers it writes where, what it counts, what it refuses."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_convert import random_params

from esvit_jax import checkpoint
from esvit_jax.commands.knn import main
from esvit_jax.data.sources import open_source
from esvit_jax.errors import UserError
from esvit_jax.evaluate.features import FeatureExtractor, view_features
from esvit_jax.evaluate.knn import knn_accuracy

PHOTOS = Path(__file__).parent / "data" / "photos"


def save_random(directory, config, seed, *, student_seed=None, origin=None):
    """A workdir whose networks are random, at step 6."""
    teacher = random_params(config, seed)
    student = teacher if student_seed is None else random_params(config, student_seed)
    centers = {"view": np.zeros(32, np.float32), "region": np.zeros(32, np.float32)}
    checkpoint.save_model(
        directory, config=config, origin=origin or {}, student=student, teacher=teacher,
        centers=centers, step=6,
    )  # fmt: skip
    return directory


@pytest.fixture
def workdir(tmp_path, tiny_config):
    """Its run's batch of 50 images is one that four devices cannot share."""
    tiny_config.data.train_split = "train[:160]"
    tiny_config.evaluate.batch_size = 50
    return save_random(tmp_path / "run", tiny_config, seed=1, student_seed=2)


def accuracy(workdir, network):
    """The same numbers without the command."""
    loaded = checkpoint.load_model(workdir)
    params = getattr(loaded, network)["backbone"]
    extractor = FeatureExtractor(view_features(loaded.model.backbone, loaded.config), loaded.config)
    splits = [open_source(loaded.config.data.name, x) for x in ("train[:160]", "test[:40]")]
    arrays = [array for split in splits for array in extractor.arrays(params, split)]
    return knn_accuracy(*arrays, ks=(10, 20, 100, 160), num_classes=10)


def test_the_run_on_its_own_data(workdir, capsys):
    main([f"--workdir={workdir}"])
    report = json.loads((workdir / "knn.json").read_text())
    values = {name: x for name, x in report.items() if name.startswith("top")}
    assert values == pytest.approx(accuracy(workdir, "teacher"))
    assert list(values)[-1] == "top5/160"
    assert {name: x for name, x in report.items() if name not in values} == {
        "step": 6, "key": "teacher", "data": "bundled/fashion_mnist_mini",
        "train_split": "train[:160]", "test_split": "test[:40]",
        "train_images": 160, "test_images": 40, "train_unreadable": 0, "test_unreadable": 0,
    }  # fmt: skip
    said = capsys.readouterr().out
    assert "│ 160 │" in said and "│ 200 │" not in said
    assert "there are only 160 training images: where k is more, all of them vote" in said
    assert f"written to {workdir / 'knn.json'}" in said


@pytest.mark.parametrize(
    "flags", [["--data=bundled/fashion_mnist_mini"], ["--test_split=test[:8]"], ["--key=student"]]
)
def test_other_numbers_do_not_take_the_place_of_the_runs_own(workdir, flags, capsys):
    (workdir / "knn.json").write_text("the run's own")
    main([f"--workdir={workdir}", *flags])
    assert "not written: knn.json is for the run's own data and network" in capsys.readouterr().out
    assert (workdir / "knn.json").read_text() == "the run's own"


def test_out_is_written_whatever_the_data(workdir, tmp_path, capsys):
    out = tmp_path / "other.json"
    main([f"--workdir={workdir}", f"--out={out}", "--test_split=test[:8]"])
    assert f"written to {out}" in capsys.readouterr().out
    assert json.loads(out.read_text())["test_images"] == 8
    assert not (workdir / "knn.json").exists()


def test_lists_of_k_and_temperatures(workdir, capsys):
    main([f"--workdir={workdir}", "--k=10,20", "--temperature=0.07,0.04", "--json"])
    report = json.loads(capsys.readouterr().out)
    names = [name for name in report if name.startswith("top1")]
    assert names == ["top1/10", "top1/20", "top1/10/0.04", "top1/20/0.04"]
    assert report["top1/10"] == pytest.approx(accuracy(workdir, "teacher")["top1/10"])
    with pytest.raises(UserError, match=r"^--temperature: '0' is no number above 0$"):
        main([f"--workdir={workdir}", "--temperature=0"])


def test_json_alone_on_standard_output(workdir, capsys):
    main([f"--workdir={workdir}", "--key=student", "--json"])
    stdout, stderr = capsys.readouterr()
    report = json.loads(stdout)
    assert report["key"] == "student"
    assert {name: report[name] for name in report if name.startswith("top")} == pytest.approx(
        accuracy(workdir, "student")
    )
    assert "160 training and 40 test images" in stderr


def test_images_that_cannot_be_read_do_not_count(workdir, tmp_path, capsys):
    for split in ("train", "test"):
        for i, file in enumerate(sorted(PHOTOS.glob("*.jpg"))):
            folder = tmp_path / "photos" / split / "ab"[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, folder)
    (tmp_path / "photos" / "train" / "a" / "bad.jpg").write_text("no image")
    main(
        [f"--workdir={workdir}", f"--data=folder:{tmp_path / 'photos'}", "--train_split=train",
         "--test_split=test", "--json"]
    )  # fmt: skip
    stdout, stderr = capsys.readouterr()
    report = json.loads(stdout)
    assert (report["train_images"], report["train_unreadable"]) == (4, 1)
    assert (report["test_images"], report["test_unreadable"]) == (4, 0)
    assert [name for name in report if name.startswith("top")] == ["top1/4", "top5/4"]
    assert "4 training and 4 test images" in stderr
    assert "1 images could not be read and do not count" in stderr


def test_what_cannot_be_written_is_refused_before_computing(workdir, tmp_path, monkeypatch):
    monkeypatch.setattr(FeatureExtractor, "batches", None)
    with pytest.raises(UserError, match=r"^--out=\S+/missing/knn.json: there is no folder"):
        main([f"--workdir={workdir}", f"--out={tmp_path}/missing/knn.json"])
    (workdir / "knn.json").mkdir()
    with pytest.raises(UserError, match=r"^--out=\S+knn.json: it cannot be written: Is a dir"):
        main([f"--workdir={workdir}"])


def test_data_without_labels(workdir):
    with pytest.raises(UserError, match=r"^--data=folder:\S+: train has no labels; k-NN needs"):
        main([f"--workdir={workdir}", f"--data=folder:{PHOTOS}", "--train_split=train"])
