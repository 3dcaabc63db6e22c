"""Exports taken where a run is: by `convert`, by the evaluations, by `export` again."""

import json

import jax
import numpy as np
import pytest
from exports import config_of, random_params, save_backbone, small_config
from tiny import tiny_config

from esvit_jax import checkpoint
from esvit_jax.commands.embed import main as embed_main
from esvit_jax.commands.knn import main as knn_main
from esvit_jax.errors import UserError
from esvit_jax.interop.convert import convert
from esvit_jax.interop.export import export
from esvit_jax.interop.exported import PROGRAM, load_network
from esvit_jax.interop.initialize import init_from
from esvit_jax.interop.load import load
from esvit_jax.run import started

WEIGHTS = {
    "timm": "model.safetensors",
    "huggingface": "model.safetensors",
    "esvit": "checkpoint.safetensors",
}


def run(directory, config, seed=0, **origin):
    networks = {
        "student": random_params(config, seed + 1),
        "teacher": random_params(config, seed + 2),
    }
    k = config.head.num_prototypes
    centers = {head: np.zeros(k, np.float32) for head in ("view", "region")}
    checkpoint.save_model(
        directory, config=config, origin={"num_images": 9} | origin, **networks, centers=centers,
        step=30,
    )  # fmt: skip
    return directory


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """32 pixels, of which shapes tell nothing: at 224 the last stage would have shifted windows."""
    config = small_config()
    config.data.canvas_size, config.views.local_size = 48, 16
    config.head.norm_last_layer = True
    config.views.mean = (0.5, 0.25, 0.125)
    return run(tmp_path_factory.mktemp("run"), config)


@pytest.fixture(scope="module")
def exports(workdir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    for format in WEIGHTS:
        export(workdir, folder / format, format=format)
    return folder


# Converted


@pytest.mark.parametrize("format", WEIGHTS)
def test_convert_takes_from_the_config_what_shapes_do_not_tell(workdir, exports, tmp_path, format):
    lines = convert(exports / format / WEIGHTS[format], tmp_path / "again")
    name = "config.json" if format == "esvit" else "esvit_config.json"
    assert f"image size 32: as {name} beside it says, and how images are prepared" in lines
    assert not any("supervised" in line for line in lines)
    old, new = load(exports / format), load(tmp_path / "again")
    assert new.backbone == old.backbone == load(workdir).backbone
    image = np.random.default_rng(0).integers(0, 256, (70, 50, 3), np.uint8)
    np.testing.assert_array_equal(new.preprocess([image]), old.preprocess([image]))
    jax.tree.map(np.testing.assert_array_equal, new.variables, old.variables)
    if format == "esvit":  # its random norms are not 1, so that shapes would say False
        assert checkpoint.load_model(tmp_path / "again").config.head.norm_last_layer


def test_heads_that_shapes_do_not_tell(tmp_path):
    config = config_of("vit_tiny", embed_dim=32, depths=(1,), num_heads=(4,), patch_size=8)
    save_backbone(tmp_path / "run", config)
    export(tmp_path / "run", tmp_path / "timm", format="timm")
    convert(tmp_path / "timm" / "model.safetensors", tmp_path / "again")
    backbone = load(tmp_path / "again").backbone
    assert backbone == load(tmp_path / "run").backbone
    (tmp_path / "timm" / "esvit_config.json").unlink()
    convert(tmp_path / "timm" / "model.safetensors", tmp_path / "guessed")
    assert load(tmp_path / "guessed").backbone != backbone


def test_the_user_is_asked_before_the_config(exports, tmp_path):
    file = exports / "timm" / "model.safetensors"
    assert "image size 64: as told" in convert(file, tmp_path / "a", image_size=64)
    config = checkpoint.load_model(tmp_path / "a").config
    assert config.backbone.image_size == config.evaluate.size == config.data.canvas_size == 64
    assert tuple(config.views.mean) == (0.5, 0.25, 0.125)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("backbone.depths", [2, 4], r"says depths \(2, 4\), its shapes depths \(2, 2\); mend "),
        ("backbone.image_size", 16, "says image_size 16, but the bias tables are of windows"),
        ("backbone.nothing", 1, "backbone.nothing"),
    ],
)
def test_a_config_that_contradicts_the_shapes(exports, tmp_path, field, value, message):
    file = tmp_path / "model.safetensors"
    file.write_bytes((exports / "timm" / "model.safetensors").read_bytes())
    content = json.loads((exports / "timm" / "esvit_config.json").read_text())
    content["config"][field] = value
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as error:
        convert(file, tmp_path / "a")
    assert "\n" not in str(error.value) and "config.json" in str(error.value)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("text", ['{"model_type": "swin", "image_size": 32}', "no JSON", "[]"])
def test_a_config_of_another_library_is_left_alone(exports, tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    file = tmp_path / "model.safetensors"
    file.write_bytes((exports / "timm" / "model.safetensors").read_bytes())
    assert any("assumed" in line for line in convert(file, tmp_path / "a"))


# Evaluated


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A network of 16 pixels for the bundled images, its exports, and features of its teacher."""
    folder = tmp_path_factory.mktemp("tiny")
    run(folder / "run", tiny_config(), seed=5)
    for format in WEIGHTS:
        export(folder / "run", folder / format, format=format)
    embed_main([f"--workdir={folder / 'run'}", "--split=test[:40]", f"--out={folder / 'run.npz'}"])
    return folder


@pytest.mark.parametrize("format", WEIGHTS)
def test_evaluations_take_exports(tiny, tmp_path, format):
    folder, out = tiny / format, tmp_path / "out.npz"
    embed_main([f"--workdir={folder}", "--split=test[:40]", f"--out={out}"])
    expected, found = np.load(tiny / "run.npz"), np.load(out)
    assert found["view_features"].shape == (40, 16)
    np.testing.assert_array_equal(found["view_features"], expected["view_features"])
    assert json.loads(str(found["about"])) == json.loads(str(expected["about"]))


def test_knn_of_an_export(tiny, tmp_path):
    reports = []
    for name in ("run", "timm"):
        out = tmp_path / f"{name}.json"
        knn_main([f"--workdir={tiny / name}", "--train_split=train[:60]", f"--out={out}", "--k=5"])
        reports.append(json.loads(out.read_text()))
    assert reports[0] == reports[1]
    assert (reports[1]["step"], reports[1]["key"], reports[1]["test_images"]) == (30, "teacher", 40)


def test_what_an_export_has_not(tiny):
    with pytest.raises(UserError, match="^--key=student: it was exported without that one$"):
        knn_main([f"--workdir={tiny / 'timm'}", "--key=student"])
    with pytest.raises(UserError, match="has no checkpoint of step 20; it is an export of step 30"):
        knn_main([f"--workdir={tiny / 'timm'}", "--step=20"])
    both = load_network(tiny / "esvit")
    jax.tree.map(np.testing.assert_array_equal, both.student, random_params(tiny_config(), 6))


@pytest.mark.parametrize("format", WEIGHTS)
def test_training_starts_from_an_export(tiny, format):
    """Of the formats only `esvit` has heads; both networks begin at the teacher."""
    teacher, new = random_params(tiny_config(), 7), random_params(tiny_config(), 1)
    start = init_from(new, str(tiny / format), "backbone", 30)
    for params in (start.student, start.teacher):
        jax.tree.map(np.testing.assert_array_equal, params["backbone"], teacher["backbone"])
        jax.tree.map(np.testing.assert_array_equal, params["view_head"], new["view_head"])
    if format == "esvit":
        jax.tree.map(
            np.testing.assert_array_equal,
            init_from(new, str(tiny / format), "all").student,
            teacher,
        )
    else:
        with pytest.raises(UserError, match="missing: view_head/last_layer"):
            init_from(new, str(tiny / format), "all")


def test_a_run_goes_on_from_an_export_of_both_networks(tiny, tmp_path):
    new = random_params(tiny_config(), 1)
    with pytest.raises(UserError, match="^init_parts = 'run': .*timm was exported without the stu"):
        init_from(new, str(tiny / "timm"), "run")
    run(tmp_path / "run", tiny_config(), seed=5, steps_per_epoch=12)
    export(tmp_path / "run", tmp_path / "esvit", format="esvit")
    start = init_from(new, str(tmp_path / "esvit"), "run")
    jax.tree.map(np.testing.assert_array_equal, start.student, random_params(tiny_config(), 6))
    jax.tree.map(np.testing.assert_array_equal, start.teacher, random_params(tiny_config(), 7))
    assert start.epochs == 2.5 and set(start.centers) == {"view", "region"}


def test_a_program_has_no_weights_to_start_from(tmp_path):
    (tmp_path / PROGRAM).write_bytes(b"")
    config = tiny_config()
    config.init_from = str(tmp_path)
    with pytest.raises(
        UserError, match=r"^config\.init_from = '.*': it holds a program and no wei"
    ):
        started(config, {})


def test_an_export_is_exported(tiny, tmp_path):
    export(tiny / "timm", tmp_path / "esvit", format="esvit")
    export(tmp_path / "esvit", tmp_path / "timm", format="timm")
    files = (folder / "timm" / "model.safetensors" for folder in (tiny, tmp_path))
    assert next(files).read_bytes() == next(files).read_bytes()
