"""The ViL against loops over tokens and offsets, in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from test_swin import linear, normal, random_params

from esvit_jax.errors import UserError
from esvit_jax.models import PRESETS, ViL, create_backbone
from esvit_jax.models.longformer import TABLE, FullAttention, SparseAttention

TINY = ViL(
    embed_dims=(4, 8),
    depths=(1, 2),
    num_heads=(1, 2),
    window_sizes=(2,),
    num_global=(2, 1),
    patch_sizes=(2, 2),
    image_size=16,
)


FORWARD = jax.jit(TINY.forward)

# The reference: one query and one offset at a time.


def softmax(logits):
    weights = np.exp(logits - np.max(logits))
    return weights / weights.sum()


def near(a, b, window):
    """Whether two cells are in the same chunk or in neighbours."""
    return all(abs(i // window - j // window) <= 1 for i, j in zip(a, b, strict=True))


def reference_sparse(tokens, p, shape, window, heads, g):
    """Of one image [t, d]: the tokens after attention, and its weights [heads, t, t]."""
    (height, width), dim = shape, tokens.shape[-1]
    head_dim, side = dim // heads, 4 * window - 1
    q = [linear(x, p["query"]) * head_dim**-0.5 for x in tokens.astype(np.float64)]
    kv = [linear(x, p["kv"]) for x in tokens.astype(np.float64)]
    weights = np.zeros((heads, len(tokens), len(tokens)))
    merged = np.zeros(tokens.shape)
    for head in range(heads):
        part = slice(head * head_dim, (head + 1) * head_dim)
        for i in range(len(tokens)):
            logits = {}
            for j in range(g):
                bias = (
                    p["g2g_relative_position_bias"][head, i, j]
                    if i < g
                    else p["g2l_relative_position_bias"][1, head, j]
                )
                logits[j] = q[i][part] @ kv[j][part] + bias
            if i < g:
                bias = p["g2l_relative_position_bias"][0, head, i]
                for j in range(g, len(tokens)):
                    logits[j] = q[i][part] @ kv[j][part] + bias
            else:
                y, x = divmod(i - g, width)
                for dy in range(1 - 2 * window, 2 * window):
                    for dx in range(1 - 2 * window, 2 * window):
                        key = y - dy, x - dx
                        inside = 0 <= key[0] < height and 0 <= key[1] < width
                        if not inside or not near((y, x), key, window):
                            continue
                        j = g + key[0] * width + key[1]
                        row = (dy + 2 * window - 1) * side + dx + 2 * window - 1
                        logits[j] = q[i][part] @ kv[j][part] + p[TABLE][row, head]
            weights[head, i, list(logits)] = softmax(np.array(list(logits.values())))
        merged[:, part] = weights[head] @ np.array(kv)[:, dim:][:, part]
    return np.array([linear(x, p["proj"]) for x in merged]), weights


@pytest.mark.parametrize(
    ("shape", "window", "g"),
    [((5, 8), 2, 1), ((9, 4), 3, 2), ((3, 4), 5, 0), ((6, 6), 2, 1)],
    ids=["padded", "padded, two global tokens", "less than a chunk, no global token", "whole"],
)
def test_sparse_attention(shape, window, g):
    heads, dim = 2, 6
    module = SparseAttention(heads, g, window, return_weights=True)
    tokens = normal(1, 2, g + shape[0] * shape[1], dim)
    params = random_params(lambda key, x: module.init(key, x, shape), tokens)
    out, weights = jax.jit(module.apply, static_argnums=2)({"params": params}, tokens, shape)
    for image in range(2):
        expected, attention = reference_sparse(
            np.asarray(tokens[image]), params, shape, window, heads, g
        )
        np.testing.assert_allclose(out[image], expected, atol=1e-5)
        np.testing.assert_allclose(weights[image, 0], attention, atol=1e-6)


def cubic(x):
    """Keys' kernel with a = -0.75."""
    x = abs(x)
    if x <= 1:
        return 1.25 * x**3 - 2.25 * x**2 + 1
    return -0.75 * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def resized_image(image, size):
    """A square image [n, n], bicubic, one pixel and one tap at a time."""
    n, out = len(image), np.zeros((size, size))
    for i in range(size):
        for j in range(size):
            y, x = ((k + 0.5) * n / size - 0.5 for k in (i, j))
            for a in range(math.floor(y) - 1, math.floor(y) + 3):
                for b in range(math.floor(x) - 1, math.floor(x) + 3):
                    value = image[min(max(a, 0), n - 1), min(max(b, 0), n - 1)]
                    out[i, j] += cubic(y - a) * cubic(x - b) * value
    return out


@pytest.mark.parametrize("shape", [(3, 3), (2, 3), (2, 1), (4, 5)], ids=str)
def test_full_attention(shape):
    """The table is of 3 x 3 cells."""
    heads, dim, g, side = 2, 4, 1, 3
    module = FullAttention(heads, g, side, return_weights=True)
    tokens = normal(1, 1, g + shape[0] * shape[1], dim)
    params = random_params(lambda key, x: module.init(key, x, shape), tokens)
    out, weights = jax.jit(module.apply, static_argnums=2)({"params": params}, tokens, shape)
    qkv = [linear(x, params["qkv"]) for x in np.asarray(tokens[0], np.float64)]
    cells = [divmod(i, side) for i in range(side**2)]
    merged = np.zeros(tokens.shape[1:])
    for head in range(heads):
        part = slice(head * 2, head * 2 + 2)
        bias = np.zeros((side**2, side**2))
        for i, (y, x) in enumerate(cells):
            for j, (y2, x2) in enumerate(cells):
                bias[i, j] = params[TABLE][(y - y2 + 2) * 5 + x - x2 + 2, head]
        if shape != (side, side):
            bias = resized_image(bias, shape[0] * shape[1])
        bias = np.pad(bias, ((g, 0), (g, 0)))
        bias[0, 1:] = params["g2l_relative_position_bias"][0, head, 0]
        bias[1:, 0] = params["g2l_relative_position_bias"][1, head, 0]
        bias[0, 0] = params["g2g_relative_position_bias"][head, 0, 0]
        for i, q in enumerate(qkv):
            logits = [q[part] * 2**-0.5 @ k[dim:][part] for k in qkv]
            row = softmax(np.array(logits) + bias[i])
            np.testing.assert_allclose(weights[0, 0, head, i], row, atol=1e-6)
            merged[i, part] = sum(w * v[2 * dim :][part] for w, v in zip(row, qkv, strict=True))
    np.testing.assert_allclose(out[0], [linear(x, params["proj"]) for x in merged], atol=1e-5)


# The network.


@pytest.fixture(scope="module")
def params():
    return random_params(TINY.init, normal(0, 1, 16, 16, 3))


@pytest.mark.parametrize(
    ("size", "maps"),
    [((16, 16), [(8, 8), (4, 4)]), ((11, 22), [(5, 11), (2, 5)]), ((1, 9), [(1, 4), (1, 2)])],
    ids=str,
)
def test_images_of_any_size(params, size, maps):
    """What does not fill a patch is left out."""
    images = normal(1, 2, *size, 3)
    forward = jax.jit(lambda p, x: TINY.forward(p, x, outputs=("attention",)))
    out = forward(params, images)
    assert [x.shape for x in out.stage_maps] == [(2, *maps[0], 4), (2, *maps[1], 8)]
    np.testing.assert_array_equal(out.stage_maps[-1], out.region_features)
    assert [x.shape for x in out.block_means] == [(2, 4), (2, 8), (2, 8)]
    np.testing.assert_array_equal(out.view_features, out.block_means[-1])
    counts = [2 + math.prod(maps[0]), *[1 + math.prod(maps[1])] * 2]
    assert [x.shape for x in out.attention] == [
        (2, 1, heads, n, n) for heads, n in zip((1, 2, 2), counts, strict=True)
    ]
    cut = images.at[:, 2 * maps[0][0] :].set(0).at[:, :, 2 * maps[0][1] :].set(0)
    again = forward(params, cut)
    np.testing.assert_array_equal(again.view_features, out.view_features)


def test_view_features(params):
    """The global token of the last stage, or, where there is none, the mean of its regions."""
    mean = TINY.clone(num_global=(2, 0))
    images = normal(1, 2, 16, 16, 3)
    cells_only = random_params(mean.init, images)
    out = jax.jit(mean.forward)(cells_only, images)
    np.testing.assert_allclose(out.view_features, out.region_features.mean(axis=(1, 2)), atol=1e-6)
    out, state = jax.jit(
        lambda p, x: TINY.apply(
            {"params": p}, x, capture_intermediates=lambda module, _: module.name == "norm"
        )
    )(params, images)
    tokens = state["intermediates"]["norm"]["__call__"]  # of the two blocks of the last stage
    for block in (1, 2):
        np.testing.assert_array_equal(out.block_means[block], tokens[block - 1][:, 0])
    np.testing.assert_array_equal(out.view_features, tokens[1][:, 0])
    np.testing.assert_array_equal(out.region_features.reshape(2, 16, 8), tokens[1][:, 1:])


def test_blocks():
    assert [(x.stage, x.window_size, x.num_global) for x in TINY.blocks] == [
        (0, None, 2), (1, None, 1), (1, None, 1),
    ]  # fmt: skip
    assert [tuple(x) for x in TINY.stages] == [(2, 4), (4, 8)]


def test_gradients_are_the_same_whatever_is_computed_again(params):
    images, drawn = normal(1, 2, 12, 8, 3), jnp.asarray([[0.3] * 6, [0.95, 0.99] * 3])

    def gradient(**fields):
        vil = TINY.clone(drop_path_rate=0.1, **fields)

        def loss(params):
            out = vil.forward(params, images, drawn=drawn)
            return jnp.sum(jnp.sin(out.view_features)) + jnp.sum(jnp.sin(out.region_features))

        return ravel_pytree(jax.jit(jax.grad(loss))(params))[0]

    first = gradient()
    for remat in ("dots", "block"):
        np.testing.assert_allclose(gradient(remat=remat), first, atol=1e-5)


def test_drop_path(params):
    """An image all of whose branches are dropped keeps what the patch embeddings gave."""
    vil = TINY.clone(drop_path_rate=0.5)
    assert vil.num_draws == 6
    images = normal(1, 3, 16, 16, 3)
    drawn = jnp.asarray([[0.0] * 6, [0.0] * 4 + [0.9] * 2, [0.0] * 6])
    out = jax.jit(lambda p, x, d: vil.forward(p, x, drawn=d))(params, images, drawn)
    assert not np.any(out.block_means[1][0] == out.block_means[2][0])
    np.testing.assert_array_equal(out.block_means[1][1], out.block_means[2][1])


def test_bfloat16_is_near(params):
    images = normal(1, 2, 16, 16, 3)
    exact = FORWARD(params, images).view_features
    rounded = jax.jit(TINY.clone(dtype=jnp.bfloat16).forward)(params, images).view_features
    assert rounded.dtype == jnp.float32
    error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 0.05


@pytest.mark.parametrize(
    ("name", "millions"), [("vil_1281", 23.89), ("vil_2262", 27.57), ("vil_14121", 31.90)]
)
def test_parameters_of_presets(name, millions):
    """The paper's row is that of 28 M."""
    vil = create_backbone(name)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), np.float32)
    shapes = jax.eval_shape(vil.init, jax.random.key(0), images)["params"]
    assert sum(x.size for x in jax.tree.leaves(shapes)) / 1e6 == pytest.approx(millions, abs=0.005)
    assert PRESETS[name][1]["drop_path_rate"] == 0.1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(num_heads=(1, 2)), r"^num_heads = \(1, 2\): one number is needed for each of the 4"),
        (dict(num_heads=(5, 6, 12, 24)), r"^num_heads = .*: 5 does not divide its stage's 96"),
        (dict(window_sizes=(7,) * 5), r"^window_sizes = .*: there are more than the 4 stages"),
        (dict(num_global=(1, 1, 1, 2)), r"^num_global = .*: the last stage has one global token"),
        (dict(image_size=31), r"^image_size = 31: patches of \(4, 2, 2, 2\) need at least 32"),
        (dict(window_size=7), r"^window_size = 7: vil_2262 has no such field; it has embed_dims,"),
    ],
    ids=str,
)
def test_refusals(fields, message):
    with pytest.raises(UserError, match=message):
        create_backbone("vil_2262", **fields)
