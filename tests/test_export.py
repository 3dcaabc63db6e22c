"""Backbones out: names, features as other libraries compute them, refusals, model cards."""

import json
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest
from exports import (
    DATA,
    card,
    convert_nano,
    own_outputs,
    random_params,
    save_run,
    small_config,
    snippet,
)
from safetensors.numpy import load_file

from esvit_jax import checkpoint
from esvit_jax.commands.export import main
from esvit_jax.errors import RunError, UserError
from esvit_jax.interop.convert import convert
from esvit_jax.interop.export import export
from esvit_jax.interop.exported import PROGRAM, load_network
from esvit_jax.interop.formats import FORMATS, esvit, huggingface, timm_file
from esvit_jax.interop.formats.base import (
    Format,
    Reading,
    check_images,
    relative_error,
    size_ranges,
    write_tensors,
)
from esvit_jax.interop.load import load
from esvit_jax.interop.names import FAMILIES
from esvit_jax.interop.names.swin import SwinFamily
from esvit_jax.models import Swin

TENSOR_FORMATS = ("huggingface", "timm", "esvit")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def golden():
    return np.load(DATA / "swin_nano_w7.npz")


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    return convert_nano(tmp_path_factory.mktemp("nano"))


def test_sizes_as_ranges():
    assert size_ranges([3, 5, 6, 7, 9]) == "3, 5 to 7, 9 pixels"


# Exports


@pytest.mark.parametrize(
    ("format", "key"),
    [("huggingface", "teacher"), ("timm", "student"), ("esvit", "teacher"), ("esvit", "student")],
)
def test_what_is_exported_is_loaded(workdir, tmp_path, format, key):
    checks = export(workdir, tmp_path / "out", format=format, key=key)
    assert max(checks.errors.values()) <= 1e-4
    backbone, variables, preprocess = load(tmp_path / "out")
    trained = checkpoint.load_model(workdir)
    expected = {"teacher": trained.teacher, "student": trained.student}[key]["backbone"]
    jax.tree.map(np.testing.assert_array_equal, variables["params"], expected)
    assert preprocess([DATA / "photos" / "coffee.jpg"]).shape == (1, 32, 32, 3)
    assert backbone.num_features == 32
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_published_names_and_shapes(nano, golden, tmp_path):
    export(nano, tmp_path / "out", format="esvit")
    tensors = load_file(tmp_path / "out" / "checkpoint.safetensors")
    for network, prefix in (("student", "student.module."), ("teacher", "teacher.")):
        names = [n for n in golden.files if n.startswith(network + "/")]
        expected = {n.replace(network + "/", prefix): golden[n] for n in names}
        found = {n: x for n, x in tensors.items() if n.startswith(prefix)}
        index = {n: found.pop(n) for n in list(found) if n.endswith(".relative_position_index")}
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            np.testing.assert_array_equal(found[name], tensor)
        assert len(index) == 8
        assert all(x.shape == (49, 49) and x.dtype == np.int64 for x in index.values())
        # From the top left to the bottom right of a window, and the same place.
        first = index[prefix + "layers.0.blocks.0.attn.relative_position_index"]
        assert (first[0, 48], first[0, 0], first[48, 0]) == (0, 84, 168)


def test_published_checkpoint_comes_back(workdir, tmp_path):
    export(workdir, tmp_path / "out", format="esvit")
    convert(tmp_path / "out" / "checkpoint.safetensors", tmp_path / "again")
    old, new = (checkpoint.load_model(path) for path in (workdir, tmp_path / "again"))
    for name in ("student", "teacher", "centers"):
        jax.tree.map(np.testing.assert_array_equal, getattr(new, name), getattr(old, name))


def test_backbone_alone_is_exported(workdir, tmp_path):
    export(workdir, tmp_path / "timm", format="timm", key="student")
    convert(tmp_path / "timm" / "model.safetensors", tmp_path / "backbone", image_size=32)
    export(tmp_path / "backbone", tmp_path / "out", format="esvit")
    names = load_file(tmp_path / "out" / "checkpoint.safetensors").keys()
    assert all(name.startswith("teacher.") and ".head" not in name for name in names)
    assert "unknown here: converted from model.safetensors" in card(tmp_path / "out")
    _, variables, _ = load(tmp_path / "out")
    expected = checkpoint.load_model(workdir).student["backbone"]
    jax.tree.map(np.testing.assert_array_equal, variables["params"], expected)


def test_a_backbone_without_names_goes_where_none_are_needed(workdir, tmp_path, monkeypatch):
    monkeypatch.delitem(FAMILIES, Swin)
    assert export(workdir, tmp_path / "out", format="stablehlo")
    assert "| architecture | Swin |" in card(tmp_path / "out")
    with pytest.raises(UserError, match="a Swin has no names in files yet"):
        export(workdir, tmp_path / "timm", format="timm")


def test_stablehlo_runs_without_this_package(workdir, tmp_path):
    export(workdir, tmp_path / "out", format="stablehlo", image_size=40)
    images = np.random.default_rng(0).normal(size=(5, 40, 40, 3)).astype(np.float32)
    np.save(tmp_path / "images.npy", images)
    program = f"""
import sys
sys.modules["esvit_jax"] = None  # importing it is an error
import numpy as np
images = np.load("images.npy")
{snippet(card(tmp_path / "out"))}
maps = {{f"map{{i}}": x for i, x in enumerate(out.pop("stage_maps"))}}
np.savez("out.npz", **out, **maps)
assert not any(name.startswith(("flax", "esvit_jax.")) for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    found, expected = np.load(tmp_path / "out.npz"), own_outputs(workdir, images)
    assert sorted(found) == ["map0", "map1", "region_features", "view_features"]
    for name in ("view_features", "region_features"):
        assert relative_error(found[name], getattr(expected, name)) <= 1e-5
    for i, stage_map in enumerate(expected.stage_maps):
        assert relative_error(found[f"map{i}"], stage_map) <= 1e-5
    exported = jax.export.deserialize(bytearray((tmp_path / "out" / PROGRAM).read_bytes()))
    assert exported.platforms == ("cpu", "cuda", "tpu")


def test_stablehlo_is_loaded(workdir, tmp_path):
    export(workdir, tmp_path / "out", format="stablehlo")
    backbone, variables, preprocess = load(tmp_path / "out")
    images = preprocess([DATA / "photos" / "coffee.jpg"])
    out: Any = jax.jit(backbone.apply)(variables, images)
    expected = own_outputs(workdir, images)
    for name in ("view_features", "region_features", "stage_maps"):
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5),
            getattr(out, name), getattr(expected, name),
        )  # fmt: skip
    assert backbone.stages == load(workdir).backbone.stages
    with pytest.raises(UserError, match=r"images = \(1, 40, 32, 3\): .* takes 32 x 32 pixels"):
        backbone.apply(variables, jax.numpy.zeros((1, 40, 32, 3)))
    with pytest.raises(UserError, match="outputs = .*: the program has none of it"):
        backbone.apply(variables, images, outputs=("attention",))
    with pytest.raises(UserError, match="holds a program and no weights, which only `esvit_jax"):
        load_network(tmp_path / "out")
    (tmp_path / "out" / PROGRAM).write_bytes(b"half")
    with pytest.raises(UserError, match="is no whole program of jax.export"):
        load(tmp_path / "out")


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "huggingface", "image_size": 40}, "image_size = 40: .* 25 to 32 pixels"),
        ({"format": "timm", "image_size": 28}, "image_size = 28: timm.* 29 to 32 pixels"),
        (
            {"format": "stablehlo", "image_size": 3},
            "image_size = 3: it must be from 4, one patch",
        ),
        (
            {"format": "esvit", "image_size": 0},
            "image_size = 0: it must be from 4, one patch",
        ),
        ({"format": "esvit", "step": 11}, r"no checkpoint of step 11; it has steps \[10, 30\]"),
    ],
)
def test_refusals_write_nothing(workdir, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        export(workdir, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_existing_folder_is_kept(workdir, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"it exists already"):
        export(workdir, tmp_path / "out", format="esvit")
    assert not list((tmp_path / "out").iterdir())


def test_remote_folder_is_refused(workdir):
    with pytest.raises(UserError, match=r"--to=gs://bucket/out: make a local folder"):
        main([f"--workdir={workdir}", "--to=gs://bucket/out", "--format=timm"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "onnx"}, "format = 'onnx': known are huggingface, timm, esvit, stablehlo"),
        ({"format": "timm", "key": "both"}, "key = 'both': it must be 'teacher' or 'student'"),
    ],
)
def test_arguments_are_named(workdir, tmp_path, options, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        export(workdir, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_noticed_first(tmp_path):
    (tmp_path / "file").write_text("")
    flag = f"--to={tmp_path / 'file' / 'out'}"
    with pytest.raises(UserError, match=f"^{flag}: it cannot be made: Not a directory$"):
        main([f"--workdir={tmp_path / 'nothing'}", flag, "--format=timm"])


def test_weights_that_are_not_finite_are_refused(tmp_path):
    config = small_config()
    networks = {name: random_params(config, 0) for name in ("student", "teacher")}
    networks["teacher"]["backbone"]["norm"]["bias"][7] = np.inf
    centers = {head: np.zeros(12, np.float32) for head in ("view", "region")}
    checkpoint.save_model(tmp_path / "run", config=config, origin={}, **networks, centers=centers)
    message = "norm.bias of the teacher: 1 of its 32 values are not finite"
    with pytest.raises(UserError, match=message):
        export(tmp_path / "run", tmp_path / "out", format="esvit")
    with pytest.raises(UserError, match=f"path = '.*run': step 0: {message[:9]}"):
        load(tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_format_that_lacks_the_backbone(workdir, tmp_path, monkeypatch):
    monkeypatch.setattr(SwinFamily, "timm", None)
    with pytest.raises(UserError, match="^timm has no Swin; take another format"):
        export(workdir, tmp_path / "out", format="timm")


def test_a_format_is_one_object_and_one_line(workdir, tmp_path, monkeypatch):
    def write(source, folder):
        (folder / "size").write_text(str(source.image_size))

    def readings(source, folder, images):
        yield Reading("again", source.features(source.params, images), 0.0)

    dummy = Format(
        lambda source: None, write, readings, lambda source: "See FOLDER.", "a_library",
        config_file="our.json",
    )  # fmt: skip
    monkeypatch.setitem(FORMATS, "dummy", dummy)
    assert export(workdir, tmp_path / "out", format="dummy") == ({"again": 0.0}, [])
    assert (tmp_path / "out" / "size").read_text() == "32"
    assert "See out." in card(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "our.json").read_text())["facts"]["format"] == "dummy"


@pytest.mark.parametrize("format", TENSOR_FORMATS)
def test_wrong_files_are_noticed(workdir, tmp_path, monkeypatch, format):
    """One block's query and key swapped: every name and shape is right, the features are not."""

    def swap(path, tensors):
        for name, x in tensors.items():
            if name.endswith("1.attn.qkv.weight"):
                tensors[name] = np.roll(x, len(x) // 3, axis=0)
            if name.endswith("1.attention.self.query.weight"):
                key = name.replace("query", "key")
                tensors[name], tensors[key] = tensors[key], x
        write_tensors(path, tensors)

    module = {"huggingface": huggingface, "timm": timm_file, "esvit": esvit}[format]
    monkeypatch.setattr(module, "write_tensors", swap)
    with pytest.raises(RunError, match=r"^nothing is written: .* off by"):
        export(workdir, tmp_path / "out", format=format)
    assert not list(tmp_path.iterdir())


def test_check_images_are_always_the_same():
    images = check_images(32)
    assert images.shape == (3, 32, 32, 3)
    assert float(images[0, 0, 0, 0]) == pytest.approx(0.12573022)
    np.testing.assert_array_equal(images[1, :8, :8], np.broadcast_to(images[1, 0, 0], (8, 8, 3)))
    np.testing.assert_allclose(images[2, 0, 31], [-2, 2, 2])
