"""Names of tensors in other libraries, where their features agree, and what shapes tell."""

import json
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest

from esvit_jax.errors import UserError
from esvit_jax.interop.files import Contents
from esvit_jax.interop.infer import infer_config, preset_and_fields
from esvit_jax.interop.names import FAMILIES, family_of, recognise, swin
from esvit_jax.interop.names.base import Family, Inferred
from esvit_jax.interop.names.published import Tensors, state_dict_from_params
from esvit_jax.interop.names.swin import SwinFamily, resize_bias_table
from esvit_jax.models import Backbone, Swin

DATA = Path(__file__).parent / "data"


# Names


def a_swin(window_size=7, embed_dim=96, depths=(2, 2, 6, 2), image_size=224):
    heads = (3, 6, 12, 24) if embed_dim % 3 == 0 else (2, 4, 8, 16)
    return Swin(
        embed_dim, depths, heads[: len(depths)], window_size=window_size, image_size=image_size
    )


def small_swin():
    return a_swin(4, 16, (2, 2), 32)


def shapes_of(backbone):
    side = backbone.image_size
    images = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
    return jax.eval_shape(backbone.init, jax.random.key(0), images)["params"]


def published_tensors(backbone):
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(np.float32), shapes_of(backbone)
    )
    return state_dict_from_params({"backbone": params})


def test_transformers_names():
    tensors = swin.to_transformers(published_tensors(small_swin()))
    block = "encoder.layers.1.blocks.0."
    assert {name.removeprefix(block) for name in tensors if name.startswith(block)} == {
        "layernorm_before.weight", "layernorm_before.bias",
        "layernorm_after.weight", "layernorm_after.bias",
        "attention.self.relative_position_bias_table",
        "attention.self.query.weight", "attention.self.query.bias",
        "attention.self.key.weight", "attention.self.key.bias",
        "attention.self.value.weight", "attention.self.value.bias",
        "attention.output.dense.weight", "attention.output.dense.bias",
        "intermediate.dense.weight", "intermediate.dense.bias",
        "output.dense.weight", "output.dense.bias",
    }  # fmt: skip
    assert {name for name in tensors if ".blocks." not in name} == {
        "embeddings.patch_embeddings.projection.weight",
        "embeddings.patch_embeddings.projection.bias",
        "embeddings.norm.weight", "embeddings.norm.bias",
        "encoder.layers.0.downsample.norm.weight", "encoder.layers.0.downsample.norm.bias",
        "encoder.layers.0.downsample.reduction.weight",
        "layernorm.weight", "layernorm.bias",
    }  # fmt: skip
    qkv = published_tensors(small_swin())["layers.1.blocks.0.attn.qkv.weight"]
    np.testing.assert_array_equal(tensors[block + "attention.self.key.weight"], qkv[32:64])


@pytest.mark.parametrize("window_size", [7, 14])
def test_names_and_shapes_that_timm_declares(window_size):
    backbone = a_swin(window_size)
    empty = jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), shapes_of(backbone))
    tensors = swin.to_timm(state_dict_from_params({"backbone": empty}))
    declared = json.loads((DATA / "timm_swin_tiny.json").read_text())[f"window {window_size}"]
    assert {name: list(x.shape) for name, x in tensors.items()} == declared


@pytest.mark.parametrize(
    ("there", "back"),
    [(swin.to_transformers, swin.from_transformers), (swin.to_timm, swin.from_timm)],
)
def test_names_and_back_are_exact(there, back):
    tensors = published_tensors(small_swin())
    again = back(there(tensors))
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(again[name], tensor)


# Where libraries agree


def test_sizes_at_which_transformers_agrees():
    assert swin.sizes_like_transformers(a_swin()) == list(range(193, 225))
    assert swin.sizes_like_transformers(a_swin(14, 128, (2, 2, 18, 2))) == []
    assert swin.sizes_like_transformers(small_swin()) == list(range(25, 33))


@pytest.mark.parametrize("window_size", [7, 14])
def test_sizes_at_which_timm_agrees(window_size):
    backbone = a_swin(window_size)
    assert swin.sizes_like_timm(backbone) == [221, 222, 223, 224]


# What shapes tell


def tables(windows, embed_dim=96, heads=(3, 6, 12, 24), depths=(2, 2, 6, 2), patch=4) -> Tensors:
    tensors: Tensors = {"patch_embed.proj.weight": np.zeros((embed_dim, 3, patch, patch))}
    for i, window in enumerate(windows):
        for j in range(depths[i]):
            name = f"layers.{i}.blocks.{j}.attn.relative_position_bias_table"
            tensors[name] = np.zeros(((2 * window - 1) ** 2, heads[i]))
    return tensors


@pytest.mark.parametrize(
    "windows,window_size,image_size,why",
    [
        ((7, 7, 7, 7), 7, 224, "assumed"),
        ((14, 14, 14, 7), 14, 224, "assumed"),
        ((12, 12, 12, 12), 12, 384, "smallest"),
        ((14, 14, 14, 12), 14, 384, "smallest"),
    ],
)
def test_window_and_image_size_from_tables(windows, window_size, image_size, why):
    fields, note = SwinFamily().infer(tables(windows), None)
    assert preset_and_fields(Swin, fields) == {
        "name": "swin_tiny", "window_size": window_size, "patch_size": 4, "image_size": image_size,
    }  # fmt: skip
    assert (fields["window_size"], fields["image_size"]) == (window_size, image_size)
    assert why in note


def test_shift_masks_and_the_user_tell_the_image_size():
    tensors = tables((7, 7, 7, 7), depths=(2, 2, 18, 2))
    infer = SwinFamily().infer
    assert infer(tensors, 448).fields["image_size"] == 448
    tensors["layers.0.blocks.1.attn_mask"] = np.zeros((256, 49, 49))
    fields, note = infer(tensors, None)
    assert preset_and_fields(Swin, fields)["name"] == "swin_small"
    assert (fields["image_size"], note) == (448, "from its shift masks")
    with pytest.raises(UserError, match=r"image_size = 96: .*windows \[7, 7, 7, 7\]"):
        infer(tensors, 96)
    with pytest.raises(UserError, match="no Swin has at any image size"):
        infer(tables((7, 7, 6, 7)), None)


def test_shapes_of_an_absurd_size():
    # Sixteen stages, the last one of a single window of 4.
    names = tables((7,) * 15 + (4,), heads=(1,) * 16, depths=(1,) * 16)
    contents = Contents({"model": names}, Swin, SwinFamily(), {}, None, [], [])
    with pytest.raises(UserError, match="its shapes are those for images of 524288 pixels, over"):
        infer_config(contents, "model", None)


def test_fields_of_no_preset_are_all_given():
    fields = {"embed_dim": 8, "depths": (1,), "num_heads": (1,), "window_size": 7}
    assert preset_and_fields(Swin, fields) == {"name": "swin_tiny", **fields}


def test_what_is_no_swin():
    for change in (
        {"layers.0.blocks.0.attn.relative_position_bias_table": np.zeros((13, 13, 3))},
        {"layers.999999999.blocks.0.attn.relative_position_bias_table": np.zeros((169, 3))},
        {"layers.0.blocks.999999999.attn.relative_position_bias_table": np.zeros((169, 3))},
        {"patch_embed.proj.weight": np.zeros((96, 48))},
    ):
        with pytest.raises(UserError, match="it holds no .*Swin"):
            recognise(tables((7, 7), depths=(1, 1)) | change)


class Dummy(Backbone):
    width: int = 4


class DummyFamily(Family[Dummy]):
    signature = "dummy.weight"

    def published_names(self, tensors: Tensors) -> Tensors:
        return {name.removeprefix("other."): x for name, x in tensors.items()}

    def recognises(self, tensors: Tensors) -> bool:
        return "dummy.weight" in tensors

    def infer(self, tensors: Tensors, image_size: int | None) -> Inferred:
        return Inferred({"width": len(tensors["dummy.weight"]), "image_size": 8}, "fixed")


def test_a_family_is_one_class_and_one_line(monkeypatch):
    with pytest.raises(UserError, match="a Dummy has no names in files yet; known are .*Swin"):
        family_of(Dummy())
    monkeypatch.setitem(FAMILIES, Dummy, DummyFamily())
    assert isinstance(family_of(Dummy()), DummyFamily)
    backbone_class, family, tensors = recognise({"other.dummy.weight": np.zeros(4)})
    assert backbone_class is Dummy and list(tensors) == ["dummy.weight"]
    assert family.infer(tensors, None).fields["width"] == 4
    assert recognise(tables((7, 7), depths=(1, 1)))[0] is Swin
    with pytest.raises(UserError, match=r"Swin \(.*\); or Dummy \(dummy\.weight\); its 0 names"):
        recognise({})


# Other windows


@pytest.mark.parametrize("old,new", [(7, 14), (7, 12), (12, 7), (4, 4)])
def test_bias_tables_are_resized_bicubically(old, new):
    table = np.random.default_rng(old).standard_normal(((2 * old - 1) ** 2, 3)).astype(np.float32)
    ours = resize_bias_table(table, new)
    # OpenCV's cubic is the same kernel, with repeated borders and corners not aligned.
    side = 2 * old - 1
    theirs = cv2.resize(
        table.reshape(side, side, 3), (2 * new - 1, 2 * new - 1), interpolation=cv2.INTER_CUBIC
    )
    np.testing.assert_allclose(ours, theirs.reshape(-1, 3), atol=2e-6)
    if old == new:
        np.testing.assert_array_equal(ours, table)


def test_bias_tables_are_resized_as_torch_does():
    torch = pytest.importorskip("torch")
    table = np.random.default_rng(0).standard_normal((13**2, 3)).astype(np.float32)
    theirs = torch.nn.functional.interpolate(
        torch.tensor(table.T.reshape(1, 3, 13, 13)).double(), size=(27, 27), mode="bicubic"
    )
    theirs = theirs.reshape(3, -1).T.numpy()
    np.testing.assert_allclose(resize_bias_table(table, 14), theirs, atol=1e-6)
