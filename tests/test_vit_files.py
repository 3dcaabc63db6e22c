"""A ViT's files: published, supervised, timm's, transformers', and back."""

import importlib.util
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_convert import assert_same, random_params, shapes_of
from test_vit import by_opencv

from esvit_jax import checkpoint
from esvit_jax.config import default_config
from esvit_jax.errors import UserError
from esvit_jax.interop.convert import convert
from esvit_jax.interop.export import export
from esvit_jax.interop.formats.base import relative_error, size_ranges
from esvit_jax.interop.load import load
from esvit_jax.interop.names import recognise
from esvit_jax.interop.names import vit as names
from esvit_jax.interop.names.published import state_dict_from_params
from esvit_jax.interop.names.vit import ViTFamily
from esvit_jax.models import ViT, create_model

GOLDEN = Path(__file__).parent / "data" / "vit_nano.npz"
SMALL: dict[str, Any] = dict(embed_dim=6, depths=(2,), num_heads=(3,), patch_size=4, image_size=16)


def small_vit(**fields: Any) -> ViT:
    return ViT(**(SMALL | fields))


def small_config():
    config = default_config()
    config.backbone.name = "vit_tiny"
    config.backbone.update(SMALL)
    config.head.num_prototypes, config.head.hidden_dim, config.head.bottleneck_dim = 16, 12, 6
    return config


def backbone_tensors(config):
    return state_dict_from_params({"backbone": random_params(config, 0)["backbone"]})


def write(path, tensors):
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, path)
    return path


@pytest.fixture(name="golden", scope="module")
def _golden():
    return np.load(GOLDEN)


@pytest.fixture(name="nano", scope="module")
def _nano(tmp_path_factory, golden):
    """What `esvit convert` makes of the published checkpoint, and what it says."""
    folder = tmp_path_factory.mktemp("nano")
    networks = [n for n in golden.files if n.startswith(("student/", "teacher/"))]
    tensors = {n.replace("/", ".", 1): golden[n] for n in networks}
    tensors |= {f"dino_loss.{name}": golden[name] for name in ("center", "center_grid")}
    lines = convert(write(folder / "nano.safetensors", tensors), folder / "converted")
    return folder / "converted", lines


def test_a_published_checkpoint(nano, golden):
    """All of it arrives; the number of heads, which shapes do not tell, is said to be assumed."""
    folder, lines = nano
    loaded = checkpoint.load_model(folder)
    backbone = loaded.model.backbone
    assert isinstance(backbone, ViT)
    assert (backbone.embed_dim, backbone.depths, backbone.num_heads) == (24, (4,), (3,))
    assert (backbone.patch_size, backbone.image_size) == (16, 224)
    assert lines[1] == (
        "image size 224: from its position embedding; num_heads 3: assumed, of 8 features each"
    )
    for name, params in (("student", loaded.student), ("teacher", loaded.teacher)):
        for tensor, value in state_dict_from_params(jax.device_get(params)).items():
            np.testing.assert_array_equal(value, golden[f"{name}/{tensor}"])
    np.testing.assert_array_equal(loaded.centers["region"], golden["center_grid"][0])
    images = golden["crops/0"] / 255 - np.array((0.485, 0.456, 0.406))
    images = (images / np.array((0.229, 0.224, 0.225))).astype(np.float32)
    out = jax.jit(backbone.forward)(loaded.teacher["backbone"], images)
    assert relative_error(out.view_features[0], golden["pooled"][0]) < 1e-5


@pytest.mark.parametrize(
    ("embed_dim", "heads"), [(192, 3), (384, 6), (768, 12), (1024, 16), (24, 3), (8, 1)]
)
def test_heads_are_deits(embed_dim, heads):
    assert names.heads_of(embed_dim) == heads


@pytest.mark.parametrize(
    ("name", "fields"),
    [("vit_small", {}), ("vit_base", {"patch_size": 8}), ("vit_tiny", {"image_size": 384})],
)
def test_presets_are_recognised(name, fields):
    config = default_config()
    config.backbone.name = name
    config.backbone.update(fields)
    shapes = shapes_of(create_model(config))["backbone"]
    empty = jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), shapes)
    backbone_class, family, tensors = recognise(state_dict_from_params({"backbone": empty}))
    assert backbone_class is ViT
    inferred = family.infer(tensors, None).fields
    model = create_model(config).backbone
    assert inferred == {field: getattr(model, field) for field in inferred}


def test_a_checkpoint_of_dino(tmp_path):
    """Its networks hold the backbone one attribute deep, and have no region head."""
    config = small_config()
    config.loss.region = False
    params = random_params(config, 0)
    tensors = state_dict_from_params(params)
    dino = {n if n.startswith("head.") else f"backbone.{n}": x for n, x in tensors.items()}
    content = {f"student.module.{n}": x for n, x in dino.items()}
    content |= {f"teacher.{n}": x for n, x in dino.items()}
    convert(write(tmp_path / "a.safetensors", content), tmp_path / "a")
    loaded = checkpoint.load_model(tmp_path / "a")
    assert_same(loaded.student, params)
    assert_same(loaded.teacher, params)


@pytest.mark.parametrize("kind", ["DeiT's", "transformers'", "transformers' with classifier"])
def test_supervised_ones_become_backbones(tmp_path, kind):
    config = small_config()
    tensors = backbone_tensors(config)
    head = "head" if kind == "DeiT's" else "classifier"
    if kind != "DeiT's":
        tensors = names.SPELLING.to_names(tensors)
    if kind == "transformers' with classifier":
        tensors = {f"vit.{name}": tensor for name, tensor in tensors.items()}
    if kind != "transformers'":
        tensors |= {f"{head}.weight": np.zeros((10, 6), np.float32), f"{head}.bias": np.zeros(10)}
    file = write(tmp_path / "a.safetensors", tensors)
    lines = convert(file, tmp_path / "a")
    loaded = checkpoint.load_model(tmp_path / "a")
    assert loaded.model.backbone == small_vit(dtype=np.dtype("float32"), drop_path_rate=0.1)
    assert_same(loaded.network(), {"backbone": random_params(config, 0)["backbone"]})
    left = f"left behind: model {head}.weight, model {head}.bias"
    assert (left in lines) == (kind != "transformers'")


def test_names_of_transformers():
    tensors = backbone_tensors(small_config())
    theirs = names.SPELLING.to_names(tensors)
    block = "encoder.layer.1."
    assert {name.removeprefix(block) for name in theirs if name.startswith(block)} == {
        f"{part}.{leaf}"
        for leaf in ("weight", "bias")
        for part in (
            "layernorm_before", "layernorm_after", "attention.attention.query",
            "attention.attention.key", "attention.attention.value", "attention.output.dense",
            "intermediate.dense", "output.dense",
        )
    }  # fmt: skip
    assert {name for name in theirs if ".layer." not in name} == {
        "embeddings.cls_token", "embeddings.position_embeddings",
        "embeddings.patch_embeddings.projection.weight",
        "embeddings.patch_embeddings.projection.bias", "layernorm.weight", "layernorm.bias",
    }  # fmt: skip
    value = theirs["encoder.layer.1.attention.attention.value.weight"]
    np.testing.assert_array_equal(value, tensors["blocks.1.attn.qkv.weight"][12:])
    again = names.SPELLING.from_names(theirs)
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(again[name], tensor)


def test_what_does_not_fit_is_refused(tmp_path):
    tensors = backbone_tensors(small_config())
    file = write(tmp_path / "a.safetensors", tensors)
    with pytest.raises(UserError, match="^image_size = 24: the position embedding is of 4 x 4"):
        convert(file, tmp_path / "a", image_size=24)
    with pytest.raises(UserError, match="window_size = 7: vit_tiny has no such field"):
        convert(file, tmp_path / "a", window_size=7)
    distilled = {"dist_token": np.zeros((1, 1, 6)), "pos_embed": np.zeros((1, 18, 6))}
    file = write(tmp_path / "d.safetensors", tensors | distilled)
    with pytest.raises(UserError, match="a class token and 17 others, which are the patches of no"):
        convert(file, tmp_path / "a")
    many = {"blocks.999999999.norm1.bias": np.zeros(6)}
    assert not ViTFamily().recognises(tensors | many)
    assert ViTFamily().recognises(tensors)
    scalar = {"pos_embed": np.zeros(6)}
    assert not ViTFamily().recognises(tensors | scalar)


def test_positions_for_another_image_size():
    """As a forward pass at that size resizes them, and nothing else is changed."""
    old, new = small_vit(), small_vit(image_size=28)
    params = random_params(small_config(), 0)["backbone"]
    resized = ViTFamily().resized(params, old, new)
    assert {name for name in params if params[name] is not resized[name]} == {"pos_embed"}
    expected = by_opencv(params["pos_embed"], 4, 7, 7)
    np.testing.assert_allclose(resized["pos_embed"][0], expected, atol=1e-5)
    images = np.random.default_rng(0).normal(size=(1, 28, 28, 3)).astype(np.float32)
    ours, theirs = (
        jax.jit(backbone.forward)(x, images).region_features
        for backbone, x in ((old, params), (new, resized))
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


# Exports


def test_sizes_at_which_libraries_agree():
    assert names.sizes_like_timm(small_vit()) == [16]
    assert names.sizes_like_timm(small_vit(image_size=18)) == [18]
    assert size_ranges(names.sizes_like_transformers(small_vit())) == "4 to 4096 pixels"


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("format", "size", "readers"),
    [
        ("huggingface", 224, "transformers"), ("huggingface", 100, "transformers"),
        ("timm", 224, "timm"), ("esvit", 224, None), ("stablehlo", 100, None),
    ],
)  # fmt: skip
def test_exports_compute_the_same_features(nano, tmp_path, format, size, readers):
    """As the library does, where it is installed; and our own `load` finds the same backbone."""
    folder, _ = nano
    errors = export(folder, tmp_path / "out", format=format, image_size=size).errors
    assert all(error <= 1e-5 for error in errors.values())
    if readers and all(importlib.util.find_spec(package) for package in (readers, "torch")):
        assert any(reader.startswith(readers) for reader in errors)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| features | 24 an image (the class token), and as many a region |" in card
    if format == "stablehlo":
        return
    backbone, variables, _ = load(tmp_path / "out")
    trained = checkpoint.load_model(folder)
    assert backbone.num_heads == (3,)
    assert_same(variables["params"], trained.teacher["backbone"])


def test_published_names_come_back(nano, golden, tmp_path):
    folder, _ = nano
    export(folder, tmp_path / "out", format="esvit")
    found = load_file(tmp_path / "out" / "checkpoint.safetensors")
    expected = {
        f"{network}{prefix}.{name.removeprefix(network + '/')}": golden[name]
        for network, prefix in (("student", ".module"), ("teacher", ""))
        for name in golden.files
        if name.startswith(f"{network}/")
    }
    assert {n for n in found if not n.startswith("dino_loss.")} == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "timm", "image_size": 96}, "position embedding .*; it agrees at 224 pixels"),
        ({"format": "huggingface", "image_size": 15}, "from 16, one patch, to 4096"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_agree_are_refused(nano, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        export(nano[0], tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("format", ["huggingface", "timm"])
def test_snippets_of_model_cards(nano, golden, tmp_path, monkeypatch, format):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers" if format == "huggingface" else "timm")
    export(nano[0], tmp_path / "out", format=format)
    card = (tmp_path / "out" / "README.md").read_text()
    lines = card.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    pictures = [golden["crops/0"][0]]
    pixels = torch.zeros(1, 3, 224, 224)
    scope: dict[str, Any] = {"images": pictures if format == "huggingface" else pixels}
    with torch.no_grad():
        exec(lines, scope)
        if format == "huggingface":
            regions = scope["out"].last_hidden_state[:, 1:]
        else:
            regions = scope["model"].forward_features(pixels)[:, 1:]
    assert regions.shape == (1, 196, 24)
