"""Backbones by name: fields in place of a preset's, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esvit_jax.errors import UserError
from esvit_jax.models import PRESETS, StageInfo, Swin, create_backbone

SMALL = dict(embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=4, patch_size=4)


def test_fields_replace_those_of_the_preset_and_none_keeps_them():
    backbone = create_backbone("swin_base", window_size=14, embed_dim=None)
    assert isinstance(backbone, Swin)
    assert (backbone.embed_dim, backbone.window_size) == (128, 14)
    assert backbone.depths == PRESETS["swin_base"][1]["depths"]


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("swin_huge", {}, r"name = 'swin_huge': known are swin_tiny, "),
        ("swin_tiny", {"window": 7}, r"window = 7: swin_tiny has no such field; .*window_size"),
        ("swin_tiny", {"num_heads": (3, 6)}, r"num_heads = \(3, 6\): one number is needed for"),
        ("swin_tiny", {"num_heads": (3, 6, 12, 25)}, r"num_heads = .*25 does not divide .* 768"),
        ("swin_tiny", {"image_size": 31}, r"image_size = 31: 4 stages .* at least 32"),
        (
            "vit_tiny",
            {"num_heads": [0]},
            r"num_heads = \(0,\): it must be one or more",
        ),
        ("resnet50", {"depths": ()}, r"depths = \(\): it must be one or more"),
        ("cvt_tiny", {"image_size": 0}, r"image_size = 0: it must be a whole number from 1"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_name(name, fields, message):
    with pytest.raises(UserError, match=message):
        create_backbone(name, **fields)


def test_stages_of_swin_tiny():
    backbone = create_backbone("swin_tiny")
    assert backbone.stages == (
        StageInfo(4, 96), StageInfo(8, 192), StageInfo(16, 384), StageInfo(32, 768)
    )  # fmt: skip
    assert backbone.num_features == 768


@pytest.mark.parametrize(("height", "width"), [(32, 32), (30, 45), (9, 70)])
def test_every_stage_gives_its_map_at_any_input_size(height, width):
    """Of the strides and features that `stages` says; the last is the regions', normalised."""
    backbone = create_backbone("swin_tiny", **SMALL, image_size=32)
    images = jax.random.normal(jax.random.key(1), (2, height, width, 3))
    params = backbone.init(jax.random.key(0), images)["params"]
    out = jax.jit(backbone.forward)(params, images)
    assert len(out.stage_maps) == len(backbone.stages)
    for stage, stage_map in zip(backbone.stages, out.stage_maps, strict=True):
        shape = (2, -(-height // stage.stride), -(-width // stage.stride), stage.num_features)
        assert stage_map.shape == shape and stage_map.dtype == jnp.float32
    np.testing.assert_array_equal(out.stage_maps[-1], out.region_features)
    # The first one is the block's own map: its mean is the block's.
    np.testing.assert_allclose(out.stage_maps[0].mean(axis=(1, 2)), out.block_means[0], rtol=1e-5)


def test_what_no_backbone_returns_is_refused():
    backbone = create_backbone("swin_tiny", **SMALL, image_size=32)
    with pytest.raises(UserError, match=r"outputs = \('maps',\): 'maps' is unknown; known are att"):
        backbone.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), outputs=("maps",))
