"""Workdirs that cannot be one, and workdirs of another run: one line each, and nothing written."""

import json
import os
from pathlib import Path

import pytest

from esvit_jax import config_file
from esvit_jax.config import RunNumbers, resolve
from esvit_jax.errors import UserError
from esvit_jax.workdir import check_same_run, usable_workdir, write_run_config


def refusal(workdir) -> str:
    with pytest.raises(UserError) as error:
        usable_workdir(workdir)
    assert error.value.argument == "workdir"
    assert len(str(error.value).splitlines()) == 1
    return error.value.message


def test_missing_folders_are_not_made(tmp_path):
    assert usable_workdir(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert list(tmp_path.iterdir()) == []


def test_home_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert usable_workdir("~/runs/x") == tmp_path / "runs" / "x"


def test_a_relative_folder_is_below_the_current_one(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert usable_workdir("runs/x") == tmp_path / "runs" / "x"


def test_no_name():
    assert refusal("") == refusal("  ") == "it is empty; give a folder, such as runs/first"
    assert refusal("a\0b") == "no path has a NUL character"
    assert refusal("s3://bucket/run").startswith("of buckets only gs:// can be written to; mount")
    for text in ("gs://", "gs://bucket", "gs://bucket/"):
        assert refusal(text) == "it names no folder in a bucket; give gs://BUCKET/RUN"


def test_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    assert refusal(tmp_path / "file") == "it is a file; give a folder"
    assert refusal(tmp_path / "file" / "run") == f"{tmp_path}/file is a file; give a folder"


@pytest.mark.parametrize("name", ["x" * 300, "missing/" + "x" * 300])
def test_a_long_name(tmp_path, name):
    message = refusal(tmp_path / name)
    assert "too long" in message or "names have at most 255 bytes there" in message


def test_a_long_path():
    assert "too long" in refusal("/".join(["x" * 200] * 40))


@pytest.fixture
def locked(tmp_path):
    """A folder that this process may not write to, be it run by root or not."""
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o555)
    for parent in folder.parents:
        if parent.stat().st_uid == os.geteuid() and parent != Path("/tmp"):
            parent.chmod(parent.stat().st_mode | 0o055)
    root = os.getuid() == 0
    if root:  # `os.access` asks for the real user
        os.setresuid(65534, 65534, 0)
    yield folder
    if root:
        os.setresuid(0, 0, 0)
    folder.chmod(0o755)


def test_read_only(locked):
    for path in (locked, locked / "missing" / "run"):
        assert refusal(path) == f"{locked} may not be written to; give another folder"


NUMBERS = RunNumbers(
    num_images=6000,
    steps_per_epoch=750,
    total_steps=6,
    images_per_device=8,
    peak_learning_rate=1e-4,
    warmup_steps=0,
    freeze_prototypes_steps=1,
)


@pytest.fixture
def run(tmp_path, tiny_config):
    """A workdir with a config and, by its name, a checkpoint."""
    write_run_config(tmp_path, tiny_config, NUMBERS)
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    return tmp_path


def difference(workdir, config, **numbers) -> str:
    with pytest.raises(UserError) as error:
        check_same_run(workdir, config, NUMBERS.__class__(**{**vars(NUMBERS), **numbers}))
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def test_the_same_run_may_have_other_devices(run, tiny_config):
    tiny_config.log_every_steps = 50  # free
    check_same_run(run, tiny_config, NUMBERS)
    check_same_run(run, tiny_config, NUMBERS.__class__(**{**vars(NUMBERS), "images_per_device": 2}))
    assert "images_per_device" not in json.loads((run / "config.json").read_text())["facts"]


def test_a_longer_run(run, tiny_config):
    tiny_config.total_steps = 9
    message = difference(run, tiny_config, total_steps=9)
    assert "config.total_steps was 6 and is 9 now; total_steps was 6 and is 9 now." in message
    assert "schedules stretch over the whole length" in message and "config.init_from" in message


def test_more_images(run, tiny_config):
    message = difference(run, tiny_config, num_images=6001)
    assert "num_images was 6000 and is 6001 now. The data set has another number" in message


def test_another_model(run, tiny_config):
    tiny_config.backbone.embed_dim = 16
    message = difference(run, tiny_config)
    assert "holds another run: config.backbone.embed_dim was 8 and is 16 now. Set it" in message


def test_a_config_that_is_gone_or_lacks_facts(run, tiny_config):
    config_file.write_config(run, tiny_config, {"num_images": 6000})
    assert "lacks total_steps, steps_per_epoch among its facts" in difference(run, tiny_config)
    config_file.write_config(run, tiny_config, {"source": "x.pth", "key": "teacher"})
    assert "is a converted checkpoint" in difference(run, tiny_config)
    (run / "config.json").unlink()
    assert "has checkpoints but no config.json" in difference(run, tiny_config)


def test_without_a_checkpoint_any_run_may_begin(run, tiny_config):
    (run / "checkpoints" / "3").rmdir()
    tiny_config.backbone.embed_dim = 16
    check_same_run(run, tiny_config, resolve(tiny_config, num_images=99, num_devices=1))
