"""The ViT against loops over tokens, in float64, and its positions against OpenCV and torch."""

import functools
import math

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_swin import gelu, linear, norm, normal, random_params

from esvit_jax.errors import UserError
from esvit_jax.models import PRESETS, StageInfo, ViT, create_backbone
from esvit_jax.models import vit as vit_module
from esvit_jax.models.vit import resize_positions

TINY = ViT(embed_dim=8, depths=(2,), num_heads=(2,), patch_size=4, image_size=16, mlp_ratio=2.0)


def by_opencv(positions, side, height, width):
    """OpenCV's cubic is the same kernel, with repeated borders and corners not aligned."""
    maps = positions[0, 1:].reshape(side, side, -1)
    maps = cv2.resize(maps, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.concatenate([positions[0, :1], maps.reshape(height * width, -1)])


def reference_vit(image, p, backbone):
    """One image [h, w, 3]: normalised tokens and attention [heads, n, n] of each block."""
    size, dim, heads = backbone.patch_size, backbone.embed_dim, backbone.num_heads[0]
    padded = np.zeros((max(size, image.shape[0]), max(size, image.shape[1]), 3))
    padded[: image.shape[0], : image.shape[1]] = image
    height, width = (n // size for n in padded.shape[:2])  # the rest is left out
    tokens = [p["cls_token"][0, 0]]
    proj = p["patch_embed"]["proj"]
    for y in range(height):
        for x in range(width):
            patch = padded[y * size : (y + 1) * size, x * size : (x + 1) * size]
            tokens.append(np.einsum("yxc,yxcd->d", patch, proj["kernel"]) + proj["bias"])
    positions = p["pos_embed"][0]
    if (height, width) != (backbone.side, backbone.side):
        positions = by_opencv(p["pos_embed"], backbone.side, height, width)
    x = np.stack(tokens) + positions.astype(np.float64)
    maps, attention = [], []
    for i in range(backbone.depths[0]):
        block, n, head_dim = p[f"blocks_{i}"], len(x), dim // heads
        qkv = np.stack([linear(norm(token, block["norm1"]), block["attn"]["qkv"]) for token in x])
        weights, merged = np.zeros((heads, n, n)), np.zeros((n, dim))
        for head in range(heads):
            part = slice(head * head_dim, (head + 1) * head_dim)
            for q in range(n):
                logits = [qkv[q][part] @ qkv[k][dim:][part] / math.sqrt(head_dim) for k in range(n)]
                exp = np.exp(logits)
                weights[head, q] = exp / exp.sum()
                merged[q, part] = weights[head, q] @ qkv[:, 2 * dim :][:, part]
        x = x + np.stack([linear(token, block["attn"]["proj"]) for token in merged])
        hidden = [gelu(linear(norm(token, block["norm2"]), block["mlp"]["fc1"])) for token in x]
        x = x + np.stack([linear(token, block["mlp"]["fc2"]) for token in hidden])
        maps.append(np.stack([norm(token, p["norm"]) for token in x]))
        attention.append(weights)
    return maps, attention


@pytest.mark.parametrize(("height", "width"), [(16, 16), (11, 22), (3, 7)])
def test_whole_backbone_equals_loops(height, width):
    """Inputs of any size: of the embedding's, of more than whole patches, smaller than a patch."""
    images = normal(3, 2, height, width, 3)
    params = random_params(TINY.init, images)
    out = jax.jit(functools.partial(TINY.forward, outputs=("attention",)))(params, images)
    maps, attention = reference_vit(np.asarray(images[1]), params, TINY)
    shape = (max(1, height // 4), max(1, width // 4), 8)
    close = functools.partial(np.testing.assert_allclose, rtol=5e-5, atol=5e-5)
    close(out.view_features[1], maps[-1][0])
    close(out.region_features[1], maps[-1][1:].reshape(shape))
    assert len(out.stage_maps) == 1 and len(out.block_means) == 2
    np.testing.assert_array_equal(out.stage_maps[0], out.region_features)
    for ours, theirs in zip(out.block_means, maps, strict=True):
        close(ours[1], theirs[0])
    for ours, theirs in zip(out.attention, attention, strict=True):
        close(ours[1, 0], theirs)
    without = jax.jit(TINY.forward)(params, images)
    assert without.attention == ()
    close(without.region_features, out.region_features)


# The position embedding


@pytest.mark.parametrize(
    ("height", "width"), [(6, 6), (14, 14), (28, 28), (7, 28), (3, 17), (1, 1)]
)
def test_positions_are_resized_bicubically(height, width):
    positions = np.random.default_rng(0).normal(size=(1, 1 + 14**2, 5)).astype(np.float32)
    ours = resize_positions(positions, 14, height, width)
    assert ours.shape == (1, 1 + height * width, 5)
    np.testing.assert_allclose(ours[0], by_opencv(positions, 14, height, width), atol=1e-5)
    if (height, width) == (14, 14):
        np.testing.assert_array_equal(ours, positions)


@pytest.mark.parametrize("side", [6, 20])
def test_positions_are_resized_as_the_public_code_does(side):
    """By one factor, sqrt(n / 196), for square images; our sides give it for each axis."""
    torch = pytest.importorskip("torch")
    positions = np.random.default_rng(0).normal(size=(1, 1 + 14**2, 5)).astype(np.float32)
    maps = torch.tensor(positions[:, 1:]).double().reshape(1, 14, 14, 5).permute(0, 3, 1, 2)
    factor = math.sqrt(side**2 / 14**2)
    maps = torch.nn.functional.interpolate(maps, scale_factor=factor, mode="bicubic")
    theirs = maps.permute(0, 2, 3, 1).reshape(-1, 5).numpy()
    ours = resize_positions(positions, 14, side, side)
    np.testing.assert_allclose(ours[0, 1:], theirs, atol=2e-6)


# What it is


@pytest.mark.parametrize(
    ("name", "heads", "patch_size", "parameters"),
    [  # as published: DeiT-Ti, DeiT-S, ViT-B without classifiers; of DINO's ViT-S with patches of 8
        ("vit_tiny", 3, 16, 5_524_416),
        ("vit_small", 6, 16, 21_665_664),
        ("vit_base", 12, 16, 85_798_656),
        ("vit_small", 6, 8, 21_670_272),
    ],
)
def test_presets(name, heads, patch_size, parameters):
    backbone = create_backbone(name, patch_size=patch_size)
    shapes = jax.eval_shape(backbone.init, jax.random.key(0), jnp.zeros((1, 96, 96, 3)))
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == parameters
    assert backbone.stages == (StageInfo(patch_size, 64 * heads),)
    assert [block.num_global for block in backbone.blocks] == [1] * 12
    assert backbone.num_draws == 24 and PRESETS[name][1]["drop_path_rate"] == 0.1

    def init(images):
        out, _ = backbone.init_with_output(jax.random.key(0), images, outputs=("attention",))
        return vars(out)

    out = jax.eval_shape(init, jnp.zeros((2, 224, 96, 3)))
    height, width = 224 // patch_size, 96 // patch_size
    assert out["region_features"].shape == (2, height, width, 64 * heads)
    tokens = 1 + height * width
    assert [x.shape for x in out["attention"]] == [(2, 1, heads, tokens, tokens)] * 12


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depths": (2, 2)}, r"depths = \(2, 2\): a ViT has one stage, so that one number is"),
        ({"num_heads": (3, 6)}, r"num_heads = \(3, 6\): a ViT has one stage"),
        ({"num_heads": (5,)}, r"num_heads = \(5,\): 5 does not divide embed_dim = 192"),
        ({"image_size": 8}, r"image_size = 8: a patch of 16 needs at least as many pixels"),
        ({"attention": "pallas"}, r"attention = 'pallas': a ViT has no such code; it has 'auto'"),
        ({"window_size": 7}, r"window_size = 7: vit_tiny has no such field"),
    ],
)
def test_what_does_not_fit_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        create_backbone("vit_tiny", **fields)


def test_initial_distributions():
    backbone = create_backbone("vit_tiny", depths=(1,))
    params = jax.jit(backbone.init)(jax.random.key(1), jnp.zeros((1, 32, 32, 3)))["params"]
    for values in params["patch_embed"]["proj"].values():  # uniform, to +-1 / sqrt(fan-in)
        scaled = np.abs(values) * math.sqrt(16 * 16 * 3)
        assert scaled.max() <= 1.0 and np.mean(scaled) == pytest.approx(0.5, abs=0.1)
    block = params["blocks_0"]
    for values in (params["cls_token"], params["pos_embed"], block["attn"]["qkv"]["kernel"]):
        assert np.std(values) == pytest.approx(0.02, rel=0.15)
    assert not np.any(block["attn"]["qkv"]["bias"])


# In training


def gradients(backbone, params, images, drawn):
    def loss(params):
        out = backbone.forward(params, images, drawn=drawn)
        return jnp.sum(jnp.sin(out.region_features)) + jnp.sum(jnp.sin(out.view_features))

    return jax.jit(jax.value_and_grad(loss))(params), str(jax.make_jaxpr(jax.grad(loss))(params))


def test_remat_changes_nothing():
    """The same output and gradients, drop path included, from the same params."""
    images = normal(4, 4, 12, 16, 3)
    small = TINY.clone(drop_path_rate=0.5)
    params = random_params(small.init, images)
    drawn = jax.random.uniform(jax.random.key(5), (4, small.num_draws))
    (value, expected), jaxpr = gradients(small, params, images, drawn)
    assert "remat" not in jaxpr
    for remat in ("dots", "block"):
        (other, found), jaxpr = gradients(small.clone(remat=remat), params, images, drawn)
        assert "remat" in jaxpr
        np.testing.assert_allclose(other, value, rtol=1e-6)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_drop_path_leaves_whole_branches_out():
    """Both of the last block for two of the images, by the numbers drawn for them."""
    images = normal(4, 4, 16, 16, 3)
    small = TINY.clone(drop_path_rate=0.5)  # of the last block; the first one's is 0
    params = random_params(small.init, images)
    zero = jax.tree.map(np.zeros_like, params["blocks_1"])
    no_branch = params | {"blocks_1": zero}
    drawn = jnp.asarray([[0.9, 0.9, 0.9, 0.9], [0.9, 0.9, 0.1, 0.9]] * 2, jnp.float32)
    run = jax.jit(lambda p, x, d: small.forward(p, x, drawn=d).region_features)
    out, dropped = run(params, images, drawn), run(no_branch, images, drawn)
    np.testing.assert_array_equal(out[::2], dropped[::2])
    assert np.abs(out[1::2] - dropped[1::2]).max() > 1e-2


def test_bfloat16_is_near():
    images = normal(6, 2, 16, 16, 3)
    params = random_params(TINY.init, images)
    half = TINY.clone(dtype=jnp.bfloat16)
    out = jax.jit(functools.partial(half.forward, outputs=("attention",)))(params, images)
    assert {x.dtype for x in jax.tree.leaves(out)} == {jnp.dtype("float32")}
    expected = jax.jit(TINY.forward)(params, images).region_features
    error = np.linalg.norm(out.region_features - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < 2e-2


def test_cudnn_attends_where_it_can(monkeypatch):
    """On a GPU in half precision, by the same product: here computed in NumPy in its place."""
    calls = []

    def cudnn(query, key, value, *, scale, implementation):
        calls.append(implementation)
        q, k, v = (np.asarray(x, np.float64) for x in (query, key, value))
        exp = np.exp(scale * np.einsum("bqhd,bkhd->bhqk", q, k))
        out = np.einsum("bhqk,bkhd->bqhd", exp / exp.sum(-1, keepdims=True), v)
        return jnp.asarray(out, value.dtype)

    monkeypatch.setattr(vit_module, "_gpu_has_flash", lambda: True)
    monkeypatch.setattr(jax.nn, "dot_product_attention", cudnn)
    q, k, v = (normal(i, 2, 1, 2, 7, 8).astype(jnp.bfloat16) for i in range(3))
    expected = vit_module.attend(q, k, v, "xla").astype(jnp.float32)
    assert calls == []
    found = vit_module.attend(q, k, v, "auto").astype(jnp.float32)
    assert calls == ["cudnn"]
    np.testing.assert_allclose(found, expected, rtol=2e-2, atol=2e-2)
    for other in (lambda x: x.astype(jnp.float32), lambda x: x[..., :4]):
        vit_module.attend(other(q), other(k), other(v), "auto")
    assert calls == ["cudnn"]
