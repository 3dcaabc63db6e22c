"""The backbone against loops over tokens, in float64."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util

from esvit_jax.errors import UserError
from esvit_jax.models import PRESETS, Swin, create_backbone
from esvit_jax.models.layers import DropPath
from esvit_jax.models.swin import (
    PatchMerging,
    SwinBlock,
)

TINY = Swin(
    embed_dim=4, depths=(2, 2), num_heads=(1, 2), window_size=3, patch_size=2, image_size=16
)


def random_params(init, inputs):
    """Params of a module as normal numbers: no bias is 0, no scale is 1."""
    shapes = jax.eval_shape(init, jax.random.key(0), inputs)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: rng.normal(0, 0.5, s.shape).astype(np.float32), shapes)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# The reference: one token at a time.


def norm(token, p):
    deviation = token - token.mean()
    return deviation / math.sqrt((deviation**2).mean() + 1e-6) * p["scale"] + p["bias"]


def linear(token, p):
    return token @ p["kernel"].astype(np.float64) + p.get("bias", 0.0)


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def reference_block(x, p, heads, window, shift):
    """One image [h, w, d]: the map after the block, and attention [windows, heads, n, n]."""
    height, width, dim = x.shape
    rows, columns = -(-height // window) * window, -(-width // window) * window
    tokens = [(y, x) for y in range(rows) for x in range(columns)]
    qkv = {}
    for y, c in tokens:
        inside = y < height and c < width
        qkv[y, c] = linear(norm(x[y, c], p["norm1"]) if inside else np.zeros(dim), p["attn"]["qkv"])
    shifted = {(y, c): ((y - shift) % rows, (c - shift) % columns) for y, c in tokens}
    table, head_dim = p["attn"]["relative_position_bias_table"], dim // heads
    attention = np.zeros((rows // window * (columns // window), heads, window**2, window**2))
    out = x.astype(np.float64)
    for q in tokens:
        (qy, qx), merged = shifted[q], np.zeros(dim)
        for head in range(heads):
            part = slice(head * head_dim, (head + 1) * head_dim)
            logits = {}
            for k in tokens:
                ky, kx = shifted[k]
                if (ky // window, kx // window) != (qy // window, qx // window):
                    continue
                dy, dx = qy - ky, qx - kx
                bias = table[(dy + window - 1) * (2 * window - 1) + dx + window - 1, head]
                apart = (dy, dx) != (q[0] - k[0], q[1] - k[1])  # neighbours through the border only
                logits[k] = (
                    qkv[q][part] * head_dim**-0.5 @ qkv[k][dim:][part] + bias - 100.0 * apart
                )
            total = sum(math.exp(v) for v in logits.values())
            for k, v in logits.items():
                weight = math.exp(v) / total
                merged[part] += weight * qkv[k][2 * dim :][part]
                ky, kx = shifted[k]
                attention[
                    qy // window * (columns // window) + qx // window,
                    head,
                    qy % window * window + qx % window,
                    ky % window * window + kx % window,
                ] = weight
        if q[0] < height and q[1] < width:
            out[q] += linear(merged, p["attn"]["proj"])
    for y in range(height):
        for c in range(width):
            hidden = gelu(linear(norm(out[y, c], p["norm2"]), p["mlp"]["fc1"]))
            out[y, c] += linear(hidden, p["mlp"]["fc2"])
    return out, attention


def reference_merging(x, p):
    height, width, dim = x.shape
    padded = np.zeros((height + 1, width + 1, dim))
    padded[:height, :width] = x
    out = np.zeros((-(-height // 2), -(-width // 2), 2 * dim))
    for i, j in np.ndindex(*out.shape[:2]):
        y, c = 2 * i, 2 * j
        four = padded[y, c], padded[y + 1, c], padded[y, c + 1], padded[y + 1, c + 1]
        out[i, j] = linear(norm(np.concatenate(four), p["norm"]), p["reduction"])
    return out


def reference_swin(image, p, backbone):
    """Regions, means of all blocks' maps, and attention weights of one image."""
    size = backbone.patch_size
    height, width = (-(-n // size) for n in image.shape[:2])
    padded = np.zeros((height * size, width * size, 3))
    padded[: image.shape[0], : image.shape[1]] = image
    embed, x = p["patch_embed"], np.zeros((height, width, backbone.embed_dim))
    for i, j in np.ndindex(height, width):
        patch = padded[i * size : (i + 1) * size, j * size : (j + 1) * size]
        value = np.einsum("yxc,yxcd->d", patch, embed["proj"]["kernel"]) + embed["proj"]["bias"]
        x[i, j] = norm(value, embed["norm"])
    maps, attention = [], []
    for i, depth in enumerate(backbone.depths):
        last = i == len(backbone.depths) - 1
        window, shift = backbone.stage_window(i)
        for j in range(depth):
            x, weights = reference_block(
                x, p[f"layers_{i}"][f"blocks_{j}"], backbone.num_heads[i], window, shift * (j % 2)
            )
            maps.append(np.apply_along_axis(norm, -1, x, p["norm"]) if last else x)
            attention.append(weights)
        if not last:
            x = reference_merging(x, p[f"layers_{i}"]["downsample"])
    return maps[-1], [m.mean(axis=(0, 1)) for m in maps], attention


@pytest.mark.parametrize(
    ("height", "width", "window", "shift"),
    [(5, 8, 3, 0), (5, 8, 3, 1), (2, 3, 3, 1), (3, 3, 3, 1), (4, 3, 4, 2), (1, 2, 4, 0)],
)
def test_block_equals_loops(height, width, window, shift):
    x = normal(1, 2, height, width, 8)
    block = SwinBlock(2, window, shift, mlp_ratio=2.0, drop_path_rate=0.0)
    rows, shape = x.reshape(-1, 8), x.shape[:3]
    init = functools.partial(block.init, shape=shape)
    params = random_params(init, rows)
    run = jax.jit(block.clone(return_weights=True).apply, static_argnums=(2,))
    out, weights = run({"params": params}, rows, shape)
    out = out.reshape(x.shape)
    for i in range(2):
        expected, attention = reference_block(np.asarray(x[i]), params, 2, window, shift)
        np.testing.assert_allclose(out[i], expected, rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(weights[i], attention, rtol=2e-5, atol=2e-6)
    run = jax.jit(block.apply, static_argnums=(2,))
    without, no_weights = run({"params": params}, rows, shape)
    np.testing.assert_allclose(without.reshape(x.shape), out, rtol=1e-5, atol=1e-5)
    assert no_weights is None


@pytest.mark.parametrize(("height", "width", "shift"), [(2, 3, 1), (3, 3, 1), (1, 2, 0)])
def test_one_window_has_the_gradients_of_padding(height, width, shift):
    """Asked for weights, a block pads; else one key stands for all of the padding."""
    rows, towards = normal(4, 2 * height * width, 8), normal(5, 2 * height * width, 8)
    block = SwinBlock(2, 3, shift, mlp_ratio=2.0, drop_path_rate=0.0)
    shape = 2, height, width
    init = functools.partial(block.init, shape=shape)
    params = random_params(init, rows)

    def gradients(return_weights):
        run = block.clone(return_weights=return_weights)

        def total(params, rows):
            return jnp.sum(run.apply({"params": params}, rows, shape)[0] * towards)

        return jax.jit(jax.grad(total, argnums=(0, 1)))(params, rows)

    for ours, padded in zip(*map(jax.tree.leaves, map(gradients, (False, True))), strict=True):
        np.testing.assert_allclose(ours, padded, rtol=1e-4, atol=1e-5 * np.abs(padded).max())


@pytest.mark.parametrize(("height", "width"), [(4, 6), (5, 4), (4, 3), (3, 5), (1, 1)])
def test_patch_merging(height, width):
    x = normal(2, 1, height, width, 3)
    params = random_params(PatchMerging().init, x)
    out = PatchMerging().apply({"params": params}, x)
    expected = reference_merging(np.asarray(x[0]), params)
    np.testing.assert_allclose(out[0], expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (13, 21), (7, 5)])
def test_whole_backbone_equals_loops(height, width):
    """Inputs of any size: padded to patches, odd maps, windows larger than the map."""
    images = normal(3, 2, height, width, 3)
    params = random_params(TINY.init, images)
    out = jax.jit(functools.partial(TINY.forward, outputs=("attention",)))(params, images)
    regions, pooled, attention = reference_swin(np.asarray(images[1]), params, TINY)
    np.testing.assert_allclose(out.region_features[1], regions, rtol=5e-5, atol=5e-5)
    np.testing.assert_allclose(
        out.view_features[1], regions.mean(axis=(0, 1)), rtol=5e-5, atol=5e-5
    )
    for ours, theirs in zip(out.block_means, pooled, strict=True):
        np.testing.assert_allclose(ours[1], theirs, rtol=5e-5, atol=5e-5)
    for ours, theirs in zip(out.attention, attention, strict=True):
        np.testing.assert_allclose(ours[1], theirs, rtol=5e-5, atol=5e-6)
        np.testing.assert_allclose(ours.sum(axis=-1), 1.0, atol=1e-6)


def parameters(embed_dim, depths, num_heads, windows):
    """Parameters of a Swin of patch size 4, term by term."""
    count = 4 * 4 * 3 * embed_dim + embed_dim + 2 * embed_dim
    for i, (depth, heads, window) in enumerate(zip(depths, num_heads, windows, strict=True)):
        d = embed_dim * 2**i
        attention = (3 * d * d + 3 * d) + (d * d + d) + (2 * window - 1) ** 2 * heads
        mlp = (4 * d * d + 4 * d) + (4 * d * d + d)
        count += depth * (2 * d + attention + 2 * d + mlp)
        if i < len(depths) - 1:
            count += 2 * 4 * d + 4 * d * 2 * d
    return count + 2 * embed_dim * 2 ** (len(depths) - 1)


@pytest.mark.parametrize(
    ("name", "window", "published"),
    [
        ("swin_tiny", 7, 27_519_354),
        ("swin_small", 7, 48_837_258),
        ("swin_base", 7, 86_743_224),
        ("swin_large", 7, 194_995_476),
        ("swin_tiny", 14, None),
    ],
)
def test_parameter_counts(name, window, published):
    images = jnp.zeros((1, 96, 96, 3))
    fields = {k: PRESETS[name][1][k] for k in ("embed_dim", "depths", "num_heads")}
    windows = (7, 7, 7, 7) if window == 7 else (14, 14, 14, 7)
    backbone = create_backbone(name, window_size=window)
    shapes = jax.eval_shape(backbone.init, jax.random.key(0), images)
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
    assert count == parameters(**fields, windows=windows)
    assert published is None or count == published


def test_stage_windows():
    seven, fourteen = (Swin(96, (2, 2, 6, 2), (3, 6, 12, 24), w) for w in (7, 14))
    assert [seven.stage_window(i) for i in range(4)] == [(7, 3), (7, 3), (7, 3), (7, 0)]
    assert [fourteen.stage_window(i) for i in range(4)] == [(14, 7), (14, 7), (14, 0), (7, 0)]


def test_shapes_of_swin_tiny():
    backbone = create_backbone("swin_tiny")
    assert backbone.num_features == 768

    def init(images):
        out, _ = backbone.init_with_output(jax.random.key(0), images, outputs=("attention",))
        return vars(out)

    for size, side, windows in ((224, 7, (64, 16, 4, 1)), (96, 3, (16, 4, 1, 1))):
        out = jax.eval_shape(init, jnp.zeros((2, size, size, 3)))
        assert out["view_features"].shape == (2, 768) and out["region_features"].shape == (
            2,
            side,
            side,
            768,
        )
        assert [x.shape[-1] for x in out["block_means"]] == [96] * 2 + [192] * 2 + [384] * 6 + [
            768
        ] * 2
        assert sum(x.shape[-1] for x in out["block_means"][-4:]) == 2304
        stages = zip((2, 2, 6, 2), windows, (3, 6, 12, 24), strict=True)
        assert [x.shape for x in out["attention"]] == [
            (2, w, heads, 49, 49) for depth, w, heads in stages for _ in range(depth)
        ]


def test_unknown_name_is_refused():
    with pytest.raises(UserError, match="name = 'swin_huge': known are swin_tiny, "):
        create_backbone("swin_huge")


def test_initial_distributions():
    backbone = create_backbone("swin_tiny", depths=(1,), num_heads=(3,))
    params = jax.jit(backbone.init)(jax.random.key(1), jnp.zeros((1, 28, 28, 3)))["params"]
    patch = params["patch_embed"]["proj"]
    for values in patch.values():  # uniform, to +-1 / sqrt(fan-in)
        scaled = np.abs(values) * math.sqrt(4 * 4 * 3)
        assert scaled.max() <= 1.0 and np.mean(scaled) == pytest.approx(0.5, abs=0.1)
    for name, values in traverse_util.flatten_dict(params["layers_0"], sep="/").items():
        values = np.asarray(values)
        if name.endswith(("kernel", "table")):
            assert values.std() == pytest.approx(0.02, rel=0.06), name
            share = np.mean(np.abs(values) < 0.02)  # of a normal distribution, 68 %
            assert share == pytest.approx(0.683, abs=0.04), name
        else:
            assert np.all(values == (1.0 if name.endswith("scale") else 0.0)), name


def test_drop_path_rates_grow_in_a_line():
    rates = []

    def watch(call, args, kwargs, context):
        if isinstance(context.module, DropPath):
            rates.append(context.module.rate)
        return call(*args, **kwargs)

    backbone = TINY.clone(depths=(2, 4), drop_path_rate=0.3)
    with nn.intercept_methods(watch):
        jax.eval_shape(backbone.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    expected = np.repeat([0.0, 0.06, 0.12, 0.18, 0.24, 0.3], 2)  # two branches a block
    np.testing.assert_allclose(rates, expected, atol=1e-12)


def test_remat_changes_nothing():
    """The same output and gradients, drop path included, from the same params."""
    images = normal(4, 4, 12, 16, 3)
    small = TINY.clone(depths=(2,), num_heads=(1,), drop_path_rate=0.5)
    params = random_params(small.init, images)
    drawn = jax.random.uniform(jax.random.key(5), (4, small.num_draws))

    def value_and_gradients(remat):
        backbone = small.clone(remat=remat)

        def loss(params):
            out = backbone.forward(params, images, drawn=drawn)
            return jnp.sum(jnp.sin(out.region_features))

        return jax.jit(jax.value_and_grad(loss))(params), str(
            jax.make_jaxpr(jax.grad(loss))(params)
        )

    (value, gradients), jaxpr = value_and_gradients("none")
    assert "remat" not in jaxpr
    for remat in ("dots", "block"):
        (other, other_gradients), jaxpr = value_and_gradients(remat)
        assert "remat" in jaxpr
        np.testing.assert_allclose(other, value, rtol=1e-6)
        for a, b in zip(jax.tree.leaves(other_gradients), jax.tree.leaves(gradients), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def equations(jaxpr):
    """All equations of a jaxpr, those of inner jaxprs included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            if hasattr(inner, "eqns"):
                yield from equations(getattr(inner, "jaxpr", inner))


@pytest.mark.parametrize("attention_dtype", ["float32", "bfloat16"])
def test_bfloat16_is_for_products_only(attention_dtype):
    images = normal(6, 2, 16, 16, 3)
    params = random_params(TINY.init, images)
    backbone = TINY.clone(dtype=jnp.bfloat16, attention_dtype=attention_dtype)
    own = jax.eval_shape(backbone.init, jax.random.key(0), images)["params"]
    assert {x.dtype for x in jax.tree.leaves(own)} == {jnp.dtype("float32")}

    forward = functools.partial(backbone.forward, params, outputs=("attention",))
    out = jax.jit(forward)(images)
    assert {x.dtype for x in jax.tree.leaves(out)} == {jnp.dtype("float32")}
    for weights in out.attention:
        np.testing.assert_allclose(weights.sum(axis=-1), 1.0, atol=1e-6)
    used = {"exp": set(), "rsqrt": set(), "dot_general": set(), "conv_general_dilated": set()}
    for equation in equations(jax.make_jaxpr(forward)(images).jaxpr):
        if equation.primitive.name in used:
            used[equation.primitive.name] |= {x.aval.dtype.name for x in equation.invars}
    assert used["exp"] == used["rsqrt"] == {"float32"}
    assert used["dot_general"] == used["conv_general_dilated"] == {"bfloat16"}
    expected = jax.jit(TINY.forward)(params, images).region_features
    error = np.linalg.norm(out.region_features - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < 7e-3
