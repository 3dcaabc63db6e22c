"""Runs on disk: configs edited by hand, damaged checkpoints, and a workdir of version 0.1.0."""

import io
import json
import tarfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from test_loop import losses

import esvit_jax
from esvit_jax import checkpoint, loop
from esvit_jax.checkpoint import LoadedModel, load_model
from esvit_jax.config_file import read_config, write_config
from esvit_jax.errors import UserError
from esvit_jax.models import create_model
from esvit_jax.runlog.writer import read_metrics

ARCHIVE = Path(__file__).parent / "data" / "workdir_0.1.0.tar.gz"


def refusal(function, *arguments) -> str:
    with pytest.raises(UserError) as error:
        function(*arguments)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def test_a_config_is_read_back(tmp_path, tiny_config):
    assert read_config(tmp_path) is None
    write_config(tmp_path, tiny_config, {"num_images": 6000})
    config, origin = read_config(tmp_path)  # pyright: ignore[reportGeneralTypeIssues]
    assert config == tiny_config and origin == {"num_images": 6000}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("data.canvas_size", 0),
        ("batch_size", 0),
        ("no_field", 1),
        ("head.num_prototypes", "many"),
        ("backbone.window_size", -1),
    ],
)
def test_an_edit_by_hand_is_refused(tmp_path, tiny_config, field, value):
    write_config(tmp_path, tiny_config, {})
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    content["config"][field] = value
    path.write_text(json.dumps(content))
    message = refusal(read_config, tmp_path)
    assert message.startswith(f"{path}: config.{field} ")
    assert repr(value) in message or "is no field" in message
    assert refusal(load_model, tmp_path) == message


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "it is no JSON"),
        ("[]", 'it lacks "config" or "facts"'),
        ('{"config": {}}', 'it lacks "config" or "facts"'),
        ('{"config": [], "facts": {}}', '"config" and "facts" are objects'),
        ('{"config": {}, "facts": 3}', '"config" and "facts" are objects'),
    ],
)
def test_another_file_is_refused(tmp_path, text, reason):
    (tmp_path / "config.json").write_text(text)
    message = refusal(read_config, tmp_path)
    assert message.startswith(f"{tmp_path}/config.json is not the config of a run: ")
    assert reason in message


def test_the_network_to_evaluate(tiny_config):
    model = create_model(tiny_config)
    loaded = LoadedModel(tiny_config, {}, model, student="s", teacher="t", centers={}, step=3)
    assert [loaded.network(key) for key in (None, "teacher", "student")] == ["t", "t", "s"]
    assert loaded._replace(origin={"key": "student"}).network() == "s"
    assert refusal(loaded.network, "pupil") == "key = 'pupil': it must be 'teacher' or 'student'"


def unpack(archive, folder):
    """By the filter for data; Python 3.11 has it from its third repair on, 3.14 by itself."""
    archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))


@pytest.fixture(scope="module")
def old_workdir(tmp_path_factory):
    """6 steps that version 0.1.0 took; the checkpoint is that of step 3."""
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(ARCHIVE) as archive:
        unpack(archive, folder)
    return folder / "workdir_0.1.0"


def test_an_old_workdir_loads(old_workdir):
    loaded = load_model(old_workdir)
    assert loaded.step == 3 and loaded.config.backbone.embed_dim == 8
    assert set(loaded.centers) == {"view", "region"}
    assert 32 in loaded.teacher["view_head"]["last_layer"]["weight_v"].shape
    different = jax.tree.map(lambda s, t: bool(np.any(s != t)), loaded.student, loaded.teacher)
    assert any(jax.tree.leaves(different))
    backbone, variables, _ = esvit_jax.load(old_workdir)
    out = backbone.forward(variables["params"], jnp.ones((2, 16, 16, 3)))
    assert out.view_features.shape == (2, 16) and np.isfinite(out.view_features).all()


def test_missing_steps_and_damage(old_workdir, tmp_path):
    assert refusal(load_model, old_workdir, 4).endswith("no checkpoint of step 4; it has steps [3]")
    with tarfile.open(ARCHIVE) as archive:
        unpack(archive, tmp_path)
    damaged = tmp_path / "workdir_0.1.0"
    for path in (damaged / "checkpoints" / "3" / "model").rglob("manifest.ocdbt"):
        path.unlink()
    message = refusal(load_model, damaged)
    assert message.startswith(f"checkpoint 3 in {damaged}/checkpoints is damaged")
    (damaged / "config.json").unlink()
    assert refusal(load_model, damaged) == f"{damaged} has checkpoints but no config.json"
    assert checkpoint.has_checkpoint(damaged)


def fourth_step(workdir):
    """What was logged of the first step after the checkpoint."""
    lines = read_metrics(workdir / "metrics.jsonl")
    (line,) = (x for x in lines if x["step"] == 4 and "loss" in x)
    return line


def test_an_old_workdir_goes_on(old_workdir):
    """At the place where version 0.1.0 did: with the teacher and the views that it went on with.

    The student draws another drop path since then, so that losses are near those of old and no
    more.
    """
    expected, expected_losses = fourth_step(old_workdir), losses(old_workdir)
    assert list(expected_losses) == [1, 2, 3, 4, 5, 6]
    console = Console(file=io.StringIO(), width=200)
    config, _ = read_config(old_workdir)  # pyright: ignore[reportGeneralTypeIssues]
    config.knn_every_steps = 0
    loop.train(config, old_workdir, console=console)
    said = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "from step 3" in said and "step 4/6  loss" in said
    found, found_losses = fourth_step(old_workdir), losses(old_workdir)
    for name in ("teacher_entropy", "center_norm", "feature_std", "feature_rank"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5), name
    assert list(found_losses) == [1, 2, 3, 4, 5, 6]
    assert all(found_losses[step] == expected_losses[step] for step in (1, 2, 3))
    assert found_losses[4] == pytest.approx(expected_losses[4], rel=0.02)
