"""The projection head against NumPy, and its initial values."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.typing import DTypeLike

from esvit_jax.models import EsViT, Swin
from esvit_jax.models.heads import ProjectionHead, Prototypes
from esvit_jax.models.layers import l2_normalize


def small_head(dtype: DTypeLike = jnp.float32) -> ProjectionHead:
    return ProjectionHead(num_prototypes=12, hidden_dim=10, bottleneck_dim=6, dtype=dtype)


def random_params(module, *inputs):
    """Normal numbers in place of the initial ones, so that no bias is 0 and no norm is 1."""
    params = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.7, x.shape), jnp.float32), params)


def apply(module: nn.Module, params, *inputs) -> jax.Array:
    out = module.apply({"params": params}, *inputs)
    assert isinstance(out, jax.Array)
    return out


def reference_head(x, params):
    def linear(x, p):
        return x @ np.asarray(p["kernel"], np.float64) + np.asarray(p["bias"])

    def gelu(x):
        return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))

    x = gelu(linear(np.asarray(x, np.float64), params["mlp_0"]))
    x = linear(gelu(linear(x, params["mlp_2"])), params["mlp_4"])
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_head_equals_numpy():
    """Three linears with the exact GELU; the tanh one is off by 1e-4."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 8)), jnp.float32)
    head = small_head()
    params = random_params(head, x)
    out = apply(head, params, x)
    np.testing.assert_allclose(out, reference_head(x, params), rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(out, axis=-1), 1.0, atol=1e-6)


def test_bfloat16_head_returns_float32_of_length_1():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(7, 8)), jnp.float32)
    head = small_head(jnp.bfloat16)
    params = random_params(head, x)
    out = apply(head, params, x)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(np.linalg.norm(out, axis=-1), 1.0, atol=1e-6)
    np.testing.assert_allclose(out, reference_head(x, params), atol=0.03)
    assert np.abs(out - reference_head(x, params)).max() > 1e-4


@pytest.mark.parametrize("fixed_norm", [False, True])
def test_prototypes_are_g_v_over_norm_of_v(fixed_norm):
    module = Prototypes(12, 6, fixed_norm)
    params = random_params(module)
    g, v = (np.asarray(params[name], np.float64) for name in ("weight_g", "weight_v"))
    expected = g * v / np.sqrt((v**2).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(apply(module, params), expected, rtol=1e-5)

    towards = jnp.asarray(np.random.default_rng(2).normal(size=(12, 6)), jnp.float32)
    gradients = jax.grad(lambda p: jnp.sum(apply(module, p) * towards))(params)
    unit = v / np.linalg.norm(v, axis=1, keepdims=True)
    along = (unit * np.asarray(towards)).sum(axis=1, keepdims=True)
    expected = g / np.linalg.norm(v, axis=1, keepdims=True) * (towards - along * unit)
    np.testing.assert_allclose(gradients["weight_v"], expected, rtol=1e-4, atol=1e-5)
    expected = np.zeros_like(along) if fixed_norm else along
    atol = 0.0 if fixed_norm else 1e-6
    np.testing.assert_allclose(gradients["weight_g"], expected, rtol=1e-5, atol=atol)


def test_initial_distributions():
    head = ProjectionHead(num_prototypes=200, hidden_dim=128, bottleneck_dim=64)

    def init(key, x):
        return head.init_with_output(key, x, method=lambda h, x: (h(x), h.prototypes()))[1]

    params = jax.jit(init)(jax.random.key(0), jnp.zeros((1, 96)))["params"]
    for name in ("mlp_0", "mlp_2", "mlp_4"):
        kernel = np.asarray(params[name]["kernel"]) / 0.02
        assert abs(kernel.mean()) < 0.05 and kernel.std() == pytest.approx(1.0, abs=0.03), name
        # Normal, and not cut at two deviations.
        for quantile, value in ((0.16, -0.994), (0.5, 0.0), (0.84, 0.994), (0.975, 1.96)):
            assert np.quantile(kernel, quantile) == pytest.approx(value, abs=0.08), name
        assert np.abs(kernel).max() > 3, name
        assert not np.any(params[name]["bias"])
    v = np.asarray(params["last_layer"]["weight_v"]) * math.sqrt(64)
    assert np.abs(v).max() <= 1.0
    for share in (0.01, 0.25, 0.5, 0.75, 0.99):
        assert np.quantile(v, share) == pytest.approx(2 * share - 1, abs=0.03)
    np.testing.assert_array_equal(params["last_layer"]["weight_g"], np.ones((200, 1)))


def test_normalisation_at_zero_is_finite():
    x = jnp.asarray([[0.0, 0.0], [3.0, 4.0]])
    np.testing.assert_allclose(l2_normalize(x), [[0, 0], [0.6, 0.8]], rtol=1e-6)
    gradient = jax.grad(lambda x: l2_normalize(x).sum())(x)
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("region", [True, False])
def test_network_applies_heads_to_views_and_regions(region):
    """View-major rows; the view head sees mean regions, the region head each region."""
    backbone = Swin(4, (1,), (1,), window_size=2, patch_size=2, image_size=8)
    model = EsViT(backbone, num_prototypes=12, hidden_dim=10, bottleneck_dim=6, region=region)
    rng = np.random.default_rng(3)
    stacks = [
        jnp.asarray(rng.normal(size=(v, 3, s, s, 3)), jnp.float32) for v, s in ((2, 8), (1, 4))
    ]
    params = random_params(model, stacks)
    out = jax.jit(model.apply)({"params": params}, stacks)
    apply_backbone = jax.jit(backbone.apply)
    assert set(params) == {"backbone", "view_head"} | ({"region_head"} if region else set())
    for i, stack in enumerate(stacks):
        for view, images in enumerate(stack):
            features = apply_backbone({"params": params["backbone"]}, images)
            regions = features.region_features.reshape(3, -1, 4)
            np.testing.assert_allclose(out.region_features[i][view], regions, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(
                out.view_features[i][view], features.view_features, rtol=1e-5, atol=1e-6
            )
            expected = reference_head(features.view_features, params["view_head"])
            np.testing.assert_allclose(
                out.heads["view"].vectors[i][view], expected, rtol=1e-4, atol=1e-5
            )
            if region:
                expected = reference_head(regions, params["region_head"])
                np.testing.assert_allclose(
                    out.heads["region"].vectors[i][view], expected, rtol=1e-4, atol=1e-5
                )
    assert set(out.heads) == ({"view", "region"} if region else {"view"})
    for head, output in out.heads.items():
        last = params[f"{head}_head"]["last_layer"]
        expected = (
            last["weight_g"] * last["weight_v"] / np.linalg.norm(last["weight_v"], axis=1)[:, None]
        )
        np.testing.assert_allclose(output.prototypes, expected, rtol=1e-5)
