"""ViL: published checkpoints in and out, and what their shapes tell."""

from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_export import random_params
from test_names import published_tensors, shapes_of
from test_vil import TINY, resized_image

from esvit_jax import checkpoint
from esvit_jax.config import default_config
from esvit_jax.errors import UserError
from esvit_jax.interop.convert import convert
from esvit_jax.interop.export import export
from esvit_jax.interop.files import Contents
from esvit_jax.interop.infer import infer_config, preset_and_fields
from esvit_jax.interop.names import recognise
from esvit_jax.interop.names.published import params_from_state_dict, state_dict_from_params
from esvit_jax.interop.names.vil import ViLFamily
from esvit_jax.models import ViL, create_backbone, create_model
from esvit_jax.models.longformer import TABLE

GOLDEN = Path(__file__).parent / "data" / "vil_nano.npz"


def published_file(vil):
    """As the published implementation saves it, with buffers."""
    family = ViLFamily()
    return family.file_names(published_tensors(vil)) | family.buffer_tensors(vil)


@pytest.fixture(scope="module")
def golden():
    """The tensors of a published checkpoint by the names of a flat file."""
    golden = np.load(GOLDEN)
    return {
        name.replace("/", ".", 1): golden[name]
        for name in golden.files
        if name.startswith(("student/", "teacher/"))
    }


def test_a_published_checkpoint_comes_back_bit_by_bit(golden, tmp_path):
    save_file(golden, tmp_path / "nano.safetensors")
    found = convert(tmp_path / "nano.safetensors", tmp_path / "converted")
    assert found[0] == (
        "nano.safetensors: a ViL of depths (1, 1, 2, 1), heads (1, 2, 4, 8), embed_dims "
        "(8, 16, 32, 64), chunks of (7, 7) in its sparse stages, global tokens (1, 1, 1, 0), "
        "patches (4, 2, 2, 2), with bias tables for 224 pixels"
    )
    assert found[1] == "image size 224: assumed; it fits the bias tables"
    with pytest.raises(UserError, match=r"^timm has no ViL; take another format$"):
        export(tmp_path / "converted", tmp_path / "timm", format="timm")
    with pytest.raises(UserError, match=r"^transformers has no ViL; take another format$"):
        export(tmp_path / "converted", tmp_path / "hf", format="huggingface")

    read_by = export(tmp_path / "converted", tmp_path / "out", format="esvit", image_size=96)
    assert all(error < 1e-6 for error in read_by.errors.values())
    again = load_file(tmp_path / "out" / "checkpoint.safetensors")
    again = {
        name.replace("student.module.", "student."): x
        for name, x in again.items()
        if not name.startswith("dino_loss.")
    }
    for name in set(again) - set(golden):
        assert name.endswith(".attn.relative_position_index")
    assert len(again) == len(golden) + 2 * 5
    for name, tensor in golden.items():
        np.testing.assert_array_equal(again[name], tensor)


def test_weights_for_global_tokens_must_be_those_for_cells(golden, tmp_path):
    name = "teacher.layer2.1.attn.kv_global.bias"
    golden = golden | {name: golden[name] + 1}
    save_file(golden, tmp_path / "other.safetensors")
    message = r"layer2\.1\.attn\.kv_global\.bias differs from layer2\.1\.attn\.kv\.bias"
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "other.safetensors", tmp_path / "converted")
    alone = {name: x for name, x in golden.items() if "_global." not in name}
    assert len(alone) == len(golden) - 24
    save_file(alone, tmp_path / "alone.safetensors")
    convert(tmp_path / "alone.safetensors", tmp_path / "converted")


def test_buffers_tell_the_row_of_the_table():
    """Of a sparse block [w², 9 w²], neighbours row by row; by hand for chunks of 2 x 2."""
    index = ViLFamily().buffer_tensors(TINY)["layer1.1.attn.relative_position_index"]
    assert index.shape == (4, 36) and index.dtype == np.int64
    # From the upper left cell (0, 0) of its chunk: to the same cell of the nine chunks.
    same = [(2 * i + 3) * 7 + 2 * j + 3 for i in (1, 0, -1) for j in (1, 0, -1)]
    np.testing.assert_array_equal(index[0, ::4], same)
    # From the lower left one (1, 0) to the lower right one (1, 1).
    np.testing.assert_array_equal(index[2, 3::4], np.array(same) - 1)
    assert set(index.ravel()) == set(range(49))


@pytest.mark.parametrize(
    "vil",
    [
        TINY,
        TINY.clone(window_sizes=(), image_size=20),
        TINY.clone(window_sizes=(2, 3), num_global=(0, 0), image_size=224),
        TINY.clone(patch_sizes=(16, 3), image_size=224),
    ],
    ids=["sparse, full", "full", "sparse", "a patch does not divide the image"],
)
def test_shapes_tell_the_fields(vil):
    backbone_class, family, tensors = recognise(published_file(vil))
    assert backbone_class is ViL
    fields, note = family.infer(tensors, None)
    again = ViL(**fields)
    assert again == vil.clone(image_size=again.image_size)
    assert shapes_of(again) == shapes_of(vil)
    assert note == (
        "assumed; it fits the bias tables"
        if vil.image_size == 224
        else "assumed; the smallest that fits the bias tables"
    )
    contents = Contents({"model": tensors}, ViL, family, {}, None, [], [])
    config, _ = infer_config(contents, "model", None)
    assert create_model(config).backbone == again.clone(drop_path_rate=0.1)
    params = params_from_state_dict(family.weights(tensors))["backbone"]
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda x: x.shape, shapes_of(vil))


def test_image_size_that_is_told():
    infer, tensors = ViLFamily().infer, published_tensors(TINY)
    assert infer(tensors, None).fields["image_size"] == 16
    assert infer(tensors, 19).fields["image_size"] == 19
    with pytest.raises(UserError, match=r"^image_size = 20: .* maps of \[4\] cells along a side"):
        infer(tensors, 20)
    mixed = TINY.clone(
        window_sizes=(),
        depths=(1, 1, 1),
        embed_dims=(4,) * 3,
        num_heads=(1,) * 3,
        num_global=(1,) * 3,
        patch_sizes=(2,) * 3,
        image_size=24,
    )
    tensors = published_tensors(mixed) | {f"layer3.1.attn.{TABLE}": np.zeros((81, 1))}
    with pytest.raises(UserError, match=r"maps of \[12, 6, 5\] .* which no ViL has at any image"):
        infer(tensors, None)


def test_presets_are_told_by_their_fields():
    vil = create_backbone("vil_14121")
    # Arrays of these shapes that take no memory.
    params = jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), shapes_of(vil))
    fields = ViLFamily().infer(state_dict_from_params({"backbone": params}), None).fields
    assert preset_and_fields(ViL, fields) == {
        "name": "vil_14121", "window_sizes": (7, 7), "num_global": (1, 1, 1, 0),
        "patch_sizes": (4, 2, 2, 2), "image_size": 224,
    }  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {f"layer1.1.attn.{TABLE}": np.zeros((7, 7, 1))},
        {f"layer999999999.1.attn.{TABLE}": np.zeros((49, 1))},
        {f"layer2.7.attn.{TABLE}": np.zeros((49, 1))},
        {"layer1.0.proj.weight": np.zeros((4, 12))},
    ],
    ids=str,
)
def test_what_is_no_vil(change):
    with pytest.raises(UserError, match=r"it holds no .*ViL \(layer1\.0\.proj\.weight and"):
        recognise(published_tensors(TINY) | change)


def test_a_sparse_stage_after_a_full_one():
    tensors = published_tensors(TINY)
    tensors["layer2.1.attn.query.weight"] = tensors.pop("layer1.1.attn.query.weight")
    with pytest.raises(UserError, match="it has a sparse stage after a full one, which no ViL has"):
        ViLFamily().infer(tensors, None)


def test_other_chunks_and_image_sizes():
    """Tables are resized, whichever of the two they are of; all else stays."""
    new = TINY.clone(window_sizes=(3,), image_size=24)
    params = params_from_state_dict(published_tensors(TINY))["backbone"]
    resized = ViLFamily().resized(params, TINY, new)
    assert jax.tree.map(np.shape, resized) == jax.tree.map(lambda x: x.shape, shapes_of(new))
    for name, heads in (("layer1_1", 1), ("layer2_1", 2), ("layer2_3", 2)):
        old = params[name]["attn"][TABLE].reshape(7, 7, heads)
        expected = np.stack([resized_image(old[..., i], 11) for i in range(heads)], axis=-1)
        table = resized[name]["attn"][TABLE].reshape(11, 11, heads)
        np.testing.assert_allclose(table, expected, atol=1e-6)
    assert resized["layer2_1"]["attn"]["qkv"] is params["layer2_1"]["attn"]["qkv"]
    same = ViLFamily().resized(params, TINY, TINY)
    assert same["layer1_1"]["attn"][TABLE] is params["layer1_1"]["attn"][TABLE]


def test_convert_to_another_window_is_refused(golden, tmp_path):
    save_file(golden, tmp_path / "nano.safetensors")
    with pytest.raises(UserError, match=r"^window_size = 14: vil_1281 has no such field; it has"):
        convert(tmp_path / "nano.safetensors", tmp_path / "converted", window_size=14)


def test_stablehlo(tmp_path):
    config = default_config()
    for name in ("embed_dims", "depths", "num_heads", "window_sizes", "num_global", "patch_sizes"):
        config.backbone[name] = getattr(TINY, name)
    config.backbone.name, config.backbone.image_size = "vil_1281", 16
    config.views.global_size = 16
    config.head.num_prototypes, config.head.hidden_dim, config.head.bottleneck_dim = 12, 8, 6
    params = random_params(config, 1)
    checkpoint.save_model(
        tmp_path / "run", config=config, origin={}, student=params, teacher=params,
        centers={head: np.zeros(12, np.float32) for head in ("view", "region")},
    )  # fmt: skip
    ((_, error),) = export(tmp_path / "run", tmp_path / "out", format="stablehlo").errors.items()
    assert error < 1e-5
