"""GELU and drop path."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esvit_jax.models.layers import DropPath, gelu


@pytest.mark.parametrize(("dtype", "atol"), [("float32", 1e-6), ("bfloat16", 2e-2)])
def test_gelu_and_its_gradient(dtype, atol):
    x = jnp.asarray([-30.0, -4.0, -1.0, -0.1, 0.0, 0.1, 0.75, 2.0, 6.0, 30.0], dtype)
    values = np.asarray(x, np.float64)
    cdf = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in values])
    slope = cdf + values * np.exp(-(values**2) / 2) / math.sqrt(2 * math.pi)
    out, back = jax.vjp(gelu, x)
    (gradient,) = back(jnp.full_like(x, 2.0))
    np.testing.assert_allclose(np.asarray(out, np.float64), values * cdf, atol=atol)
    np.testing.assert_allclose(np.asarray(gradient, np.float64), 2 * slope, atol=atol)
    assert out.dtype == gradient.dtype == x.dtype


def drop(rate, x, images) -> jax.Array:
    out = DropPath(rate).apply({}, x, jax.random.uniform(jax.random.key(3), (images,)))
    assert isinstance(out, jax.Array)
    return out


def test_drop_path_is_nothing_at_rate_0_and_when_not_training():
    x = jnp.arange(12.0).reshape(4, 3)
    np.testing.assert_array_equal(DropPath(0.0).apply({}, x, jnp.zeros(2)), x)
    np.testing.assert_array_equal(DropPath(0.9).apply({}, x, None), x)


def test_drop_path_keeps_whole_images_and_the_mean():
    x = jnp.ones((4096 * 6, 2))
    out = np.asarray(drop(0.25, x, 4096)).reshape(4096, -1)
    kept = out[:, 0] > 0
    np.testing.assert_array_equal(out, np.broadcast_to(kept[:, None] / np.float32(0.75), out.shape))
    assert kept.mean() == pytest.approx(0.75, abs=4 * math.sqrt(0.75 * 0.25 / 4096))
    assert drop(0.25, x.astype(jnp.bfloat16), 4096).dtype == jnp.bfloat16
