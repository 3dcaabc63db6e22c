"""Checkpoints in: names, strictness, other windows, refusals."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from esvit_jax import checkpoint
from esvit_jax.commands.convert import main
from esvit_jax.config import default_config
from esvit_jax.errors import UserError
from esvit_jax.interop import convert as convert_module
from esvit_jax.interop.convert import convert
from esvit_jax.interop.names.published import params_from_state_dict, state_dict_from_params
from esvit_jax.interop.names.swin import resize_bias_table, to_transformers
from esvit_jax.models import PRESETS, EsViT, Swin, create_backbone, create_model
from esvit_jax.models.attention import relative_position_index, shift_mask
from esvit_jax.state import init_params

GOLDEN = Path(__file__).parent / "data" / "swin_nano_w7.npz"


def small_config(image_size=64, window_size=4, region=True):
    config = default_config()
    config.backbone.embed_dim = 8
    config.backbone.depths = (2, 1, 1)
    config.backbone.num_heads = (1, 2, 4)
    config.backbone.window_size = window_size
    config.backbone.image_size = image_size
    config.head.num_prototypes = 16
    config.head.hidden_dim = 12
    config.head.bottleneck_dim = 6
    config.loss.region = region
    return config


SHAPES: dict[str, Any] = {}


def shapes_of(model):
    """Traced once for each model that the tests have."""
    if repr(model) not in SHAPES:
        SHAPES[repr(model)] = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    return SHAPES[repr(model)]


def random_params(config, seed):
    """Params with values of their own, without compiling an initialisation."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        x = rng.standard_normal(leaf.shape).astype(np.float32)
        return np.abs(x) if path[-1].key == "running_var" else x

    return jax.tree_util.tree_map_with_path(draw, shapes_of(create_model(config)))


def published(config, **centers):
    """A checkpoint's tensors by the names of a flat file, and its student and teacher params."""
    student, teacher = random_params(config, 1), random_params(config, 2)
    networks = {"student.module": student, "teacher": teacher}
    tensors = {
        f"{network}.{name}": x
        for network, params in networks.items()
        for name, x in state_dict_from_params(params).items()
    }
    return tensors | {f"dino_loss.{name}": x for name, x in centers.items()}, student, teacher


def both_centers():
    rng = np.random.default_rng(3)
    return {
        "center": rng.standard_normal((1, 16)).astype(np.float32),
        "center_grid": rng.standard_normal((1, 16)).astype(np.float32),
    }


def write(path, tensors):
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, path)
    return path


def assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


def test_features_of_the_published_implementation(tmp_path):
    golden = np.load(GOLDEN)
    tensors = {
        name.replace("/", ".", 1): golden[name]
        for name in golden.files
        if name.startswith(("student/", "teacher/"))
    }
    tensors |= {f"dino_loss.{name}": golden[name] for name in ("center", "center_grid")}
    convert(write(tmp_path / "nano.safetensors", tensors), tmp_path / "nano")
    loaded = checkpoint.load_model(tmp_path / "nano")

    theirs = json.loads(str(golden["config"]))
    backbone, head = loaded.model.backbone, loaded.config.head
    assert backbone.depths == tuple(theirs["depths"])
    assert backbone.num_heads == tuple(theirs["num_heads"])
    assert (backbone.embed_dim, backbone.window_size) == (theirs["embed_dim"], 7)
    assert (backbone.patch_size, backbone.image_size) == (4, theirs["img_size"])
    assert head.num_prototypes == theirs["out_dim"]
    assert head.hidden_dim == theirs["head_hidden_dim"]
    assert head.bottleneck_dim == theirs["head_bottleneck_dim"]
    assert loaded.config.dtype == "float32"

    mean, std = (np.array(x) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    images = ((golden["crops/0"] / 255 - mean) / std).astype(np.float32)
    out = jax.jit(backbone.apply)({"params": loaded.teacher["backbone"]}, images)
    for ours, name in ((out.view_features, "pooled"), (out.region_features, "regions")):
        error = np.linalg.norm(np.asarray(ours).ravel() - golden[name].ravel())
        assert error <= 1e-5 * np.linalg.norm(golden[name])
    np.testing.assert_array_equal(loaded.centers["view"], golden["center"][0])
    np.testing.assert_array_equal(loaded.centers["region"], golden["center_grid"][0])
    student = state_dict_from_params(jax.device_get(loaded.student))
    for name in student:
        np.testing.assert_array_equal(student[name], golden[f"student/{name}"])


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip_is_exact_for_every_backbone(name):
    model = EsViT(create_backbone(name, dtype=jnp.dtype("float32")), 8, dtype=jnp.dtype("float32"))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.integers(-128, 128, x.shape, np.int8), shapes_of(model))
    tensors = state_dict_from_params(params)
    assert_same(params_from_state_dict(tensors), params)
    if not isinstance(model.backbone, Swin):
        return
    weight = tensors["layers.0.blocks.1.mlp.fc1.weight"]
    assert weight.shape == (4 * model.backbone.embed_dim, model.backbone.embed_dim)
    assert tensors["patch_embed.proj.weight"].shape[1:] == (3, 4, 4)
    assert tensors["layers.1.downsample.norm.weight"].ndim == 1
    kernel = params["backbone"]["patch_embed"]["proj"]["kernel"]
    assert tensors["patch_embed.proj.weight"][5, 2, 1, 3] == kernel[1, 3, 2, 5]


def test_everything_in_the_file_arrives(tmp_path):
    centers = both_centers()
    tensors, student, teacher = published(small_config(), **centers)
    index = relative_position_index(4)
    tensors["teacher.layers.0.blocks.0.attn.relative_position_index"] = index
    lines = convert(write(tmp_path / "a.safetensors", tensors), tmp_path / "deep" / "a")
    loaded = checkpoint.load_model(tmp_path / "deep" / "a")
    assert_same(loaded.student, student)
    assert_same(loaded.teacher, teacher)
    assert_same(loaded.network(), teacher)
    np.testing.assert_array_equal(loaded.centers["view"], centers["center"][0])
    np.testing.assert_array_equal(loaded.centers["region"], centers["center_grid"][0])
    assert not loaded.config.head.norm_last_layer
    assert loaded.origin["source"] == "a.safetensors"
    assert "norm_last_layer False: assumed" in "\n".join(lines)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a"]


def test_view_only_with_fixed_norms_and_no_centers(tmp_path):
    tensors, _, _ = published(small_config(region=False))
    for network in ("student.module", "teacher"):
        tensors[f"{network}.head.last_layer.weight_g"] = np.ones((16, 1), np.float32)
    lines = convert(write(tmp_path / "a.safetensors", tensors), tmp_path / "a")
    loaded = checkpoint.load_model(tmp_path / "a")
    assert loaded.config.head.norm_last_layer and not loaded.config.loss.region
    assert set(loaded.teacher) == {"backbone", "view_head"}
    np.testing.assert_array_equal(loaded.centers["view"], np.zeros(16))
    assert "it holds no centers: they are 0" in lines


def test_heads_with_batch_norms(tmp_path):
    """Told by their names, in which the last linear has another number; PyTorch's counters go."""
    config = small_config()
    config.head.batch_norm = True
    tensors, student, teacher = published(config)
    for head in ("head", "head_dense"):
        tensors[f"teacher.{head}.mlp.1.num_batches_tracked"] = np.array(7)
    convert(write(tmp_path / "a.safetensors", tensors), tmp_path / "a")
    loaded = checkpoint.load_model(tmp_path / "a")
    assert loaded.config.head == config.head
    assert_same(loaded.student, student)
    assert_same(loaded.teacher, teacher)


def test_key_chooses_the_network(tmp_path):
    tensors, student, _ = published(small_config(), **both_centers())
    file = write(tmp_path / "a.safetensors", tensors)
    convert(file, tmp_path / "a", key="student")
    assert_same(checkpoint.load_model(tmp_path / "a").network(), student)
    only = {name: x for name, x in tensors.items() if name.startswith("teacher.")}
    with pytest.raises(UserError, match="key = 'student': .* holds no student, only the teacher"):
        convert(write(tmp_path / "t.safetensors", only), tmp_path / "t", key="student")
    convert(tmp_path / "t.safetensors", tmp_path / "t")
    loaded = checkpoint.load_model(tmp_path / "t")
    assert_same(loaded.student, loaded.teacher)


def test_all_misfits_are_listed_and_nothing_is_written(tmp_path):
    centers = both_centers() | {"center": np.zeros((1, 5), np.float32)}
    tensors, _, _ = published(small_config(), **centers)
    del tensors["teacher.layers.1.blocks.0.norm1.bias"]
    tensors["student.module.layers.1.blocks.0.extra.weight"] = np.zeros((2, 2), np.float32)
    tensors["teacher.norm.weight"] = np.zeros(33, np.float32)
    tensors["teacher.head.mlp.1.running_mean"] = np.zeros(12, np.float32)
    tensors["teacher.norm.bias"] = np.zeros(32, np.int32)
    tensors["predictor.weight"] = np.zeros(3, np.float32)
    file = write(tmp_path / "a.safetensors", tensors)
    with pytest.raises(UserError) as error:
        convert(file, tmp_path / "a")
    first, *lines = str(error.value).splitlines()
    assert first.startswith(f"{file}: it does not fit a Swin of depths (2, 1, 1)")
    assert sorted(line.strip() for line in lines) == sorted(
        [
            "unknown: predictor.weight",
            "unknown: student layers.1.blocks.0.extra.weight",
            "unknown: teacher head.mlp.1.running_mean",
            "missing: teacher layers.1.blocks.0.norm1.bias",
            "wrong shape: teacher norm.weight is [33], not [32]",
            "wrong type: teacher norm.bias is int32, no floating-point one",
            "wrong shape: view center is [5], unlike its head",
        ]
    )
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
    tensors, _, _ = published(small_config())
    file = write(tmp_path / "a.safetensors", tensors)

    def broken(directory, **_):
        (Path(directory) / "half").write_text("")
        raise OSError("disk full")

    monkeypatch.setattr(convert_module.checkpoint, "save_model", broken)
    with pytest.raises(OSError, match="disk full"):
        convert(file, tmp_path / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_nothing_is_overwritten(tmp_path):
    tensors, _, _ = published(small_config())
    file = write(tmp_path / "a.safetensors", tensors)
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match="exists already"):
        convert(file, tmp_path / "a")
    assert not list((tmp_path / "a").iterdir())


def test_values_that_are_not_finite_are_refused(tmp_path):
    centers = both_centers()
    centers["center"][0, :2] = -np.inf
    tensors, _, _ = published(small_config(), **centers)
    tensors["teacher.norm.weight"][5] = np.nan
    file = write(tmp_path / "a.safetensors", tensors)
    with pytest.raises(UserError) as error:
        convert(file, tmp_path / "a")
    first, *lines = str(error.value).splitlines()
    assert first.startswith(str(file))
    assert [line.strip() for line in lines] == [
        "teacher norm.weight: 1 of its 32 values are not finite",
        "view center: 2 of its 16 values are not finite",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_negative_variances_are_refused(tmp_path):
    """-0.0 is none; where there are NaN too, these are what is told."""
    config = small_config()
    config.head.batch_norm = True
    tensors, *_ = published(config)
    (first, second, other), (_, _, third) = (
        [name for name in tensors if name.startswith(f"{network}.") and name.endswith("_var")][:3]
        for network in ("teacher", "student")
    )
    tensors[first][:3] = -1e-6, -1.0, -0.0
    tensors[second][:2] = -1.0, np.nan
    tensors[other][:1] = -0.0
    tensors[third][:1] = np.inf
    file = write(tmp_path / "a.safetensors", tensors)
    with pytest.raises(UserError) as error:
        convert(file, tmp_path / "a")
    said, *lines = str(error.value).splitlines()
    assert said.startswith(str(file))
    assert [line.strip() for line in lines] == [
        f"{third.replace('.module.', ' ')}: 1 of its 12 values are not finite",
        f"{first.replace('.', ' ', 1)}: 2 of its 12 variances are negative",
        f"{second.replace('.', ' ', 1)}: 1 of its 12 values are not finite",
    ]


def test_patches_of_no_pixels_are_refused(tmp_path):
    tensors, _, _ = published(small_config())
    for network in ("student.module", "teacher"):
        tensors[f"{network}.patch_embed.proj.weight"] = np.zeros((8, 3, 0, 0), np.float32)
    file = write(tmp_path / "a.safetensors", tensors)
    with pytest.raises(UserError, match=r"proj.weight of shape \[8, 3, 0, 0\] is empty"):
        convert(file, tmp_path / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_entries_of_another_kind(tmp_path):
    tensors, _, _ = published(small_config())
    scalar = np.zeros(1, np.float32)
    for name, message in (
        ("student", "its entry student is a ndarray, not a dict of tensors"),
        ("teacher.head.last_layer.weight_v", r"wrong shape: .*weight_v is \[1\], not \["),
        ("dino_loss.center", r"wrong shape: view center is \[1\]"),
    ):
        content = {name: scalar} if name == "student" else tensors | {name: scalar}
        file = write(tmp_path / "a.safetensors", content)
        with pytest.raises(UserError, match=message):
            convert(file, tmp_path / "a")


def test_heads_that_do_not_divide_the_features(tmp_path):
    tensors, _ = supervised(small_config(), "microsoft")
    for name in list(tensors):
        if name.startswith("layers.1.") and name.endswith("bias_table"):
            tensors[name] = np.zeros((49, 3), np.float32)
    file = write(tmp_path / "a.safetensors", tensors)
    with pytest.raises(UserError, match=r"a\.safetensors: .*num_heads = \(1, 3, 4\)"):
        convert(file, tmp_path / "a")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key": "both"}, "key = 'both': it must be 'teacher' or 'student'"),
        ({"window_size": 0}, "window_size = 0: it must be from 1 to 4096"),
        ({"image_size": 0}, "image_size = 0: it must be from 1 to 4096"),
        ({"image_size": 10**9}, "image_size = 1000000000: it must be from 1 to 4096"),
        ({"image_size": 30}, r"image_size = 30: the bias tables are of windows \[4, 4, 4\]"),
    ],
)
def test_arguments_are_named(tmp_path, options, message):
    file = write(tmp_path / "a.safetensors", published(small_config())[0])
    with pytest.raises(UserError, match=f"^{message}") as error:
        convert(file, tmp_path / "a", **options)
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.safetensors", supervised(small_config(), "timm")[0])
    convert("~/a.safetensors", "~/deep/a")
    assert checkpoint.has_checkpoint(tmp_path / "deep" / "a")


# Supervised backbones.


def supervised(config, kind):
    """The tensors of a supervised Swin by Microsoft's or timm's names, and its params."""
    params = {"backbone": random_params(config, 4)["backbone"]}
    tensors = state_dict_from_params(params)
    if kind == "transformers":
        return to_transformers(tensors), params
    if kind == "timm":  # since 0.9
        tensors = {
            re.sub(
                r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", name
            ): x
            for name, x in tensors.items()
        }
        classifier = "head.fc"
    else:
        classifier = "head"
    dim = params["backbone"]["norm"]["scale"].shape[0]
    tensors[f"{classifier}.weight"] = np.zeros((10, dim), np.float32)
    tensors[f"{classifier}.bias"] = np.zeros(10, np.float32)
    tensors["layers.0.blocks.0.attn.relative_position_index"] = relative_position_index(4)
    side = config.backbone.image_size // 4
    tensors["layers.0.blocks.1.attn_mask"] = shift_mask(side, side, 4, 2)
    return tensors, params


@pytest.mark.parametrize("kind", ["microsoft", "timm", "transformers"])
def test_supervised_swins_become_backbones(tmp_path, kind):
    tensors, params = supervised(small_config(), kind)
    size = 64 if kind == "transformers" else None  # the others have shift masks
    lines = convert(write(tmp_path / "a.safetensors", tensors), tmp_path / "a", image_size=size)
    loaded = checkpoint.load_model(tmp_path / "a")
    assert_same(loaded.teacher, params)
    assert_same(loaded.student, params)
    assert loaded.centers == {}
    if kind != "transformers":
        assert f"left behind: model head{'.fc' * (kind == 'timm')}.weight" in lines[-1]
    assert loaded.config.backbone.image_size == 64
    view = jax.eval_shape(
        lambda images: loaded.model.backbone.forward(loaded.network()["backbone"], images),
        jnp.zeros((1, 64, 64, 3)),
    ).view_features
    assert view.shape == (1, 32)


def test_bfloat16_and_half_become_float32(tmp_path):
    tensors, params = supervised(small_config(), "microsoft")
    tensors = {
        name: x.astype(ml_dtypes.bfloat16 if "blocks" in name else np.float16)
        if x.dtype == np.float32
        else x
        for name, x in tensors.items()
    }
    convert(write(tmp_path / "a.safetensors", tensors), tmp_path / "a")
    loaded = checkpoint.load_model(tmp_path / "a")
    rounded = params["backbone"]["layers_0"]["blocks_0"]["mlp"]["fc1"]["kernel"]
    kernel = loaded.network()["backbone"]["layers_0"]["blocks_0"]["mlp"]["fc1"]["kernel"]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel, rounded.astype(ml_dtypes.bfloat16).astype(np.float32))


# Other windows.


def test_window_leaves_a_stage_that_it_covers(tmp_path):
    # Maps of 16, 8 and 4: window 4 everywhere, then 8, 8 and 4.
    tensors, _, teacher = published(small_config())
    file = write(tmp_path / "a.safetensors", tensors)
    lines = convert(file, tmp_path / "a", window_size=8, image_size=64)
    loaded = checkpoint.load_model(tmp_path / "a")
    assert loaded.config.backbone.window_size == 8
    assert "window 4 resized to 8" in lines

    def table(params, stage):
        block = params["backbone"][f"layers_{stage}"]["blocks_0"]
        return block["attn"]["relative_position_bias_table"]

    for stage in (0, 1):
        resized = resize_bias_table(table(teacher, stage), 8)
        np.testing.assert_array_equal(table(loaded.teacher, stage), resized)
    np.testing.assert_array_equal(table(loaded.teacher, 2), table(teacher, 2))


def test_command_line(tmp_path, capsys):
    tensors, _, _ = published(small_config(), **both_centers())
    file = write(tmp_path / "a.safetensors", tensors)
    main([f"--from={file}", f"--to={tmp_path / 'a'}", "--key=student", "--image_size=64"])
    printed, progress = capsys.readouterr()
    assert progress.splitlines() == [f"reading {file}", "writing it as a checkpoint"]
    assert "image size 64: as told" in printed
    assert "view and region heads of 16 prototypes (hidden 12, bottleneck 6)" in printed
    assert printed.endswith(f"written: {tmp_path / 'a'}\n")
    for flag, named in (
        ("--window=0", "--window: '0' is no whole number from 1 up"),
        ("--image_size=30", "--image_size=30: "),
        ("--from=missing.safetensors", "--from=missing.safetensors: "),
        ("--to=a/../", "--to=a/../: "),
    ):
        with pytest.raises(UserError, match=f"^{named}"):
            main([f"--from={file}", f"--to={tmp_path / 'b'}", flag])
