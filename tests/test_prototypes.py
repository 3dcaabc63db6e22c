"""Chunked softmaxes over prototypes against NumPy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esvit_jax.losses import esvit_loss
from esvit_jax.models import EsViTOutput, HeadOutput
from esvit_jax.models.heads import Prototypes
from esvit_jax.prototypes import expected_prototypes, log_normalizer, mean_logits

# (K, chunk): all at once, dividing, not dividing, one by one, larger than K, a single prototype.
SIZES = [(12, 0), (12, 4), (13, 4), (12, 5), (7, 1), (12, 100), (1, 0), (1, 3)]


def arrays(k, rows=5, d=6, seed=0):
    """Rows and prototypes of a teacher and a student, a center, and a row and number each."""
    rng = np.random.default_rng(seed)
    shapes = dict(
        z=(rows, d), t=(rows, d), w=(k, d), teacher_w=(k, d), center=(k,), to=(rows, d), by=(rows,)
    )
    return {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()}


def softmax(logits):
    """probs, log-normalisers and entropies (nats) of float64 rows."""
    top = logits.max(axis=-1, keepdims=True)
    log_total = (top + np.log(np.exp(logits - top).sum(axis=-1, keepdims=True)))[:, 0]
    log_probs = logits - log_total[:, None]
    probs = np.exp(log_probs)
    return probs, log_total, -(probs * log_probs).sum(axis=-1)


def f64(*xs):
    return [np.asarray(x, np.float64) for x in xs]


@pytest.mark.parametrize(("k", "chunk"), SIZES)
def test_log_normalizer(k, chunk):
    a = arrays(k)

    def weighted(z, w):
        result, entropy = log_normalizer(z, w, 0.1, chunk)
        return jnp.sum(a["by"] * result), (result, entropy)

    run = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True))
    (_, (result, entropy)), (z_gradient, w_gradient) = run(a["z"], a["w"])
    z, w, by = f64(a["z"], a["w"], a["by"])
    probs, expected, expected_entropy = softmax(z @ w.T / 0.1)
    np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(entropy, expected_entropy, rtol=1e-4, atol=1e-5)
    weights = probs * by[:, None] / 0.1
    np.testing.assert_allclose(z_gradient, weights @ w, rtol=1e-5, atol=2e-4)
    np.testing.assert_allclose(w_gradient, weights.T @ z, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize(("k", "chunk"), SIZES)
def test_expected_prototypes(k, chunk):
    a = arrays(k)

    def weighted(t, teacher_w, w, center):
        expected, entropy = expected_prototypes(t, teacher_w, w, center, 0.5, chunk)
        return jnp.sum(a["to"] * expected), (expected, entropy)

    run = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1, 2, 3), has_aux=True))
    (_, (expected, entropy)), gradients = run(a["t"], a["teacher_w"], a["w"], a["center"])
    t, teacher_w, w, center, to = f64(*(a[n] for n in ("t", "teacher_w", "w", "center", "to")))
    probs, _, expected_entropy = softmax((t @ teacher_w.T - center) / 0.5)
    np.testing.assert_allclose(expected, probs @ w, rtol=1e-5, atol=5e-6)
    np.testing.assert_allclose(entropy, expected_entropy, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gradients[2], probs.T @ to, rtol=1e-5, atol=1e-5)
    for i in (0, 1, 3):  # the teacher is a constant
        assert not np.any(gradients[i])


@pytest.mark.parametrize("chunk", [0, 5])
def test_cross_entropy_and_its_gradients_through_g_and_v(chunk):
    """-sum q log p of both functions together, against the plain formula in float64."""
    a = arrays(13)
    rng = np.random.default_rng(1)
    params = {
        "weight_g": jnp.asarray(rng.uniform(0.5, 2, (13, 1)), jnp.float32),
        "weight_v": jnp.asarray(rng.normal(size=(13, 6)), jnp.float32),
    }

    def loss(z, params):
        w = Prototypes(13, 6, False).apply({"params": params})
        assert isinstance(w, jax.Array)
        normalizer, _ = log_normalizer(z, w, 0.1, chunk)
        expected, _ = expected_prototypes(a["t"], a["teacher_w"], w, a["center"], 0.07, chunk)
        return jnp.mean(normalizer - jnp.sum(z * expected, axis=-1) / 0.1)

    def plain(z, params):
        g, v = params["weight_g"], params["weight_v"]
        w = g * v / jnp.sqrt(jnp.sum(v * v, axis=1, keepdims=True))
        q = jax.nn.softmax((a["t"] @ a["teacher_w"].T - a["center"]) / 0.07)
        return -jnp.mean(jnp.sum(q * jax.nn.log_softmax(z @ w.T / 0.1), axis=-1))

    value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(a["z"], params)
    with jax.enable_x64(True):
        double = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), (a, params))
        a, params = double
        plain_value, plain_gradients = jax.value_and_grad(plain, argnums=(0, 1))(a["z"], params)
    np.testing.assert_allclose(value, plain_value, rtol=1e-6)
    for ours, theirs in zip(
        jax.tree.leaves(gradients), jax.tree.leaves(plain_gradients), strict=True
    ):
        ours, theirs = f64(ours, theirs)
        assert np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(theirs)


@pytest.mark.parametrize("scale", [1e4, -1e4])
@pytest.mark.parametrize("chunk", [0, 4])
def test_large_logits_stay_finite(scale, chunk):
    """Logits of 1e5 and more of either sign, with padding in the last chunk (13 by 4)."""
    a = arrays(13)
    w = jnp.abs(a["w"]) * scale
    z = jnp.abs(a["z"])  # all logits of a row have the sign of `scale`

    def total(z, w):
        normalizer, entropy = log_normalizer(z, w, 0.1, chunk)
        expected, teacher_entropy = expected_prototypes(z, w, w, a["center"], 0.07, chunk)
        return jnp.sum(normalizer) + jnp.sum(expected), (
            normalizer, entropy, expected, teacher_entropy
        )  # fmt: skip

    run = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
    (_, outputs), gradients = run(z, w)
    assert all(np.all(np.isfinite(x)) for x in (*outputs, *gradients))
    rows, prototypes = f64(z, w)
    logits = rows @ prototypes.T
    np.testing.assert_allclose(outputs[0], (logits / 0.1).max(axis=1), rtol=1e-6)
    best = logits.argmax(axis=1)
    np.testing.assert_allclose(outputs[2], np.asarray(w)[best], rtol=1e-6)
    np.testing.assert_allclose(outputs[1], 0.0, atol=0.05)  # nats, of numbers of 1e5
    np.testing.assert_allclose(outputs[3], 0.0, atol=0.05)


@pytest.mark.parametrize("chunk", [0, 4])
def test_entropy_runs_from_0_to_log_k(chunk):
    a = arrays(13)
    same = jnp.ones((13, 6))
    far = jnp.eye(13, 6) * 100
    ones = jnp.asarray(np.eye(6)[:5], jnp.float32)
    for w, expected in ((same, np.log(13)), (far, 0.0)):
        np.testing.assert_allclose(log_normalizer(ones, w, 0.1, chunk)[1], expected, atol=1e-3)
        entropy = expected_prototypes(ones, w, a["w"], jnp.zeros(13), 0.1, chunk)[1]
        np.testing.assert_allclose(entropy, expected, atol=1e-3)


def test_bfloat16_is_for_products_only():
    a = arrays(13)
    z, w = a["z"] / 3, a["w"]
    result, entropy = log_normalizer(z, w, 0.1, 4, jnp.bfloat16)
    expected, _ = expected_prototypes(z, w, w, a["center"], 0.5, 4, jnp.bfloat16)
    assert result.dtype == entropy.dtype == expected.dtype == jnp.float32
    exact = log_normalizer(z, w, 0.1, 4)[0]
    error = np.linalg.norm(result - exact) / np.linalg.norm(exact)
    assert 1e-5 < error < 1e-2


def test_mean_logits():
    a = arrays(12)
    z, w = f64(a["z"], a["w"])
    ours = mean_logits(a["z"], a["w"])
    np.testing.assert_allclose(ours, (z @ w.T).mean(axis=0), rtol=1e-5, atol=1e-6)


def shapes(jaxpr):
    """Shapes of all that a jaxpr computes, inner jaxprs included."""
    for equation in jaxpr.eqns:
        yield from (x.aval.shape for x in equation.outvars)
        inner = jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        )
        for x in inner:
            if hasattr(x, "eqns"):
                yield from shapes(getattr(x, "jaxpr", x))


def test_logits_are_never_held_whole():
    """Loss and gradients of both heads hold [rows, chunk] and [K, d], and never [rows, K]."""
    k, d, images, n = 997, 4, 8, 9

    def output(views):
        stacks = [(v, images) for v in views]
        return EsViTOutput(
            heads={
                "view": HeadOutput(tuple(jnp.ones((*s, d)) for s in stacks), jnp.ones((k, d))),
                "region": HeadOutput(tuple(jnp.ones((*s, n, d)) for s in stacks), jnp.ones((k, d))),
            },
            view_features=tuple(jnp.ones((*s, d)) for s in stacks),
            region_features=tuple(jnp.ones((*s, n, d)) for s in stacks),
        )

    def largest(chunk):
        loss = functools.partial(
            esvit_loss,
            teacher=output([2]),
            centers={"view": jnp.zeros(k), "region": jnp.zeros(k)},
            student_temp=0.1,
            teacher_temp=jnp.asarray(0.07),
            prototype_chunk=chunk,
            dtype=jnp.float32,
        )
        gradient = jax.grad(lambda student: loss(student=student)[0])
        found = set(shapes(jax.make_jaxpr(gradient)(output([2, 3])).jaxpr))
        return found, max(np.prod(s, dtype=int) for s in found)

    rows = 5 * images * n
    found, size = largest(chunk=100)  # 10 chunks of 100
    assert (rows, 100) in found
    assert size <= max(rows * 100, 1000 * d) < rows * k
    assert not any({k, 1000} & set(s) and np.prod(s) > 1000 * d for s in found)
    found, size = largest(chunk=0)
    assert (rows, k) in found and size == rows * k
