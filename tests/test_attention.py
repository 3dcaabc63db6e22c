"""Window attention against autodiff of the plain formula, its geometry against loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esvit_jax.models.attention import relative_position_index, shift_mask, window_attention

SHAPE = (3, 4, 2, 9, 8)  # maps, windows, heads, tokens, features
NAMES = ("query", "key", "value", "bias")


def plain_attention(query, key, value, bias):
    logits = jnp.einsum("bmhqd,bmhkd->bmhqk", query, key) + bias
    return jnp.einsum("bmhqk,bmhkd->bmhqd", jax.nn.softmax(logits, axis=-1), value)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def arguments(scale=1.0, mask=False):
    """Query, key, value and bias; with a mask no token of the second half sees the first."""
    bias = normal(3, *SHAPE[1:4], SHAPE[3])
    if mask:
        half = np.arange(SHAPE[3]) < SHAPE[3] // 2
        bias += np.where(half[:, None] == half, 0.0, -100.0)
    return scale * normal(0, *SHAPE), scale * normal(1, *SHAPE), normal(2, *SHAPE), bias


def out_and_gradients(function, given, d_out):
    out, backward = jax.vjp(function, *given)
    return out, backward(d_out.astype(out.dtype))


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("scale", [0.3, 3.0])  # weights that are nearly even, and nearly one-hot
def test_equals_the_plain_formula(scale, mask):
    given, d_out = arguments(scale, mask), normal(4, *SHAPE)
    ours = functools.partial(window_attention, logits_dtype=jnp.float32)
    out, gradients = out_and_gradients(ours, given, d_out)
    expected, expected_gradients = out_and_gradients(plain_attention, given, d_out)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    for name, gradient, expected in zip(NAMES, gradients, expected_gradients, strict=True):
        assert gradient.shape == expected.shape and gradient.dtype == jnp.float32
        error = np.linalg.norm(gradient - expected) / np.linalg.norm(expected)
        assert error < 1e-5, (name, error)


def test_logits_of_any_size():
    """The largest logit is taken off before the exponential."""
    query, key, value, bias = arguments(40.0)
    out = window_attention(query, key, value, bias, jnp.float32)
    np.testing.assert_allclose(out, plain_attention(query, key, value, bias), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("logits_dtype", ["float32", "bfloat16"])
def test_bfloat16(logits_dtype):
    """Gradients as near to the exact ones as those of the plain formula in bfloat16."""
    given, d_out = arguments(), normal(4, *SHAPE)
    half = [x.astype(jnp.bfloat16) for x in given[:3]]
    exact = [x.astype(jnp.float32) for x in half]

    def plain(*given):
        return plain_attention(*(x.astype(jnp.bfloat16) for x in given))

    ours = functools.partial(window_attention, logits_dtype=jnp.dtype(logits_dtype))
    out, gradients = out_and_gradients(ours, (*half, given[3]), d_out)
    assert {x.dtype.name for x in (out, *gradients[:3])} == {"bfloat16"}
    assert gradients[3].dtype == jnp.float32
    expected = out_and_gradients(plain_attention, (*exact, given[3]), d_out)
    baseline = out_and_gradients(plain, (*half, given[3]), d_out)

    def errors(results):
        leaves = (
            [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]
            for tree in (results, expected)
        )
        pairs = zip(*leaves, strict=True)
        return [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs]

    for name, our_error, their_error in zip(
        ("out", *NAMES), errors((out, gradients)), errors(baseline), strict=True
    ):
        assert our_error < 1.2 * their_error, (name, our_error, their_error)


def test_keeps_one_array_of_weights():
    """Autodiff of the plain formula keeps more than one array of [.., tokens, tokens]."""
    given = arguments()

    def kept(function):
        _, backward = jax.vjp(function, *given)
        return sum(x.shape == (*SHAPE[:4], SHAPE[3]) for x in jax.tree.leaves(backward))

    assert kept(functools.partial(window_attention, logits_dtype=jnp.float32)) == 1
    assert kept(plain_attention) > 1


@pytest.mark.parametrize("window", [1, 2, 3, 7])
def test_relative_position_index(window):
    index = relative_position_index(window)
    tokens = [(y, x) for y in range(window) for x in range(window)]
    for i, q in enumerate(tokens):
        for j, k in enumerate(tokens):
            dy, dx = q[0] - k[0], q[1] - k[1]
            assert index[i, j] == (dy + window - 1) * (2 * window - 1) + (dx + window - 1)
    assert index.min() == 0 and index.max() == (2 * window - 1) ** 2 - 1


@pytest.mark.parametrize(
    ("height", "width", "window", "shift"),
    [(6, 6, 3, 1), (4, 8, 4, 2), (8, 4, 2, 1), (3, 3, 3, 1), (7, 14, 7, 3), (9, 6, 3, 2)],
)
def test_shift_mask(height, width, window, shift):
    """Two tokens meet where they are as far apart in the map as they are in the window."""
    mask = shift_mask(height, width, window, shift)
    assert mask.dtype == np.float32
    assert mask.shape == ((height // window) * (width // window), window**2, window**2)
    for number in range(len(mask)):
        top, left = (n * window for n in divmod(number, width // window))
        places = [(top + y, left + x) for y in range(window) for x in range(window)]
        origins = [((y + shift) % height, (x + shift) % width) for y, x in places]
        for i, j in np.ndindex(window**2, window**2):
            together = all(
                origins[i][axis] - origins[j][axis] == places[i][axis] - places[j][axis]
                for axis in (0, 1)
            )
            assert mask[number, i, j] == (0.0 if together else -100.0)
