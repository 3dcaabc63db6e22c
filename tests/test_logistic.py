"""Logistic regression against scikit-learn, whatever the blocks."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from esvit_jax.errors import UserError
from esvit_jax.evaluate import logistic
from esvit_jax.evaluate.blocks import ArrayBlocks, SelectedBlocks, in_memory, targets_of
from esvit_jax.evaluate.logistic import fit_logistic

L2 = (1e-3, 1e-2, 1.0, 1e4)


def overlapping(n=301, d=7, classes=4, seed=0, gap=1.0):
    """Classes that no line separates, features of other scales."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    features = gap * rng.normal(size=(classes, d))[labels] + rng.normal(size=(n, d))
    return (features * np.arange(1, d + 1) + 10).astype(np.float32), labels


def standardized(features):
    wide = features.astype(np.float64)
    return (wide - wide.mean(axis=0)) / wide.std(axis=0)


def reference(features, labels, l2):
    """Coefficients [d, c] and biases [c]."""
    model = LogisticRegression(C=1 / (len(labels) * l2), tol=1e-10, max_iter=10_000)
    model.fit(features, labels)
    return np.array(model.coef_).T, np.array(model.intercept_)


@pytest.mark.parametrize("size", [1000, 64, 97])
def test_softmax_equals_scikit_learn(size):
    features, labels = overlapping()
    found = fit_logistic(ArrayBlocks(features, labels, size), L2, 4)
    assert (found.gradient <= 1e-5).all() and found.passes < 60
    for i, l2 in enumerate(L2):
        weights, bias = reference(standardized(features), labels, l2)
        np.testing.assert_allclose(found.weights[i], weights, atol=2e-3)
        np.testing.assert_allclose(
            found.bias[i] - found.bias[i].mean(), bias - bias.mean(), atol=2e-3
        )
        logits = standardized(features) @ weights + bias
        logits -= logits.max(axis=1, keepdims=True)
        logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        loss = -logs[np.arange(len(labels)), labels].mean() + l2 / 2 * (weights**2).sum()
        assert found.loss[i] == pytest.approx(loss, abs=1e-6)
        np.testing.assert_allclose(
            found.scores(features)[i], standardized(features) @ found.weights[i] + found.bias[i],
            atol=1e-4,
        )  # fmt: skip


def test_sigmoids_equal_one_regression_a_class():
    features, labels = overlapping(classes=3)
    rng = np.random.default_rng(1)
    targets = np.eye(3, dtype=int)[labels] | (rng.random((len(labels), 3)) < 0.2)
    targets[rng.random(targets.shape) < 0.1] = -1
    found = fit_logistic(ArrayBlocks(features, targets, 64), L2, 3, multilabel=True)
    standard, n = standardized(features), len(labels)
    for i, l2 in enumerate(L2):
        for c in range(3):
            counts = targets[:, c] >= 0
            # The mean is over all images.
            own = l2 * n / counts.sum()
            weights, bias = reference(standard[counts], targets[counts, c], own)
            np.testing.assert_allclose(found.weights[i, :, c], weights[:, 0], atol=2e-3)
            assert found.bias[i, c] == pytest.approx(bias[0], abs=2e-3)


def test_blocks_that_do_not_stay_on_the_devices(monkeypatch):
    features, labels = overlapping(n=100)
    resident = fit_logistic(ArrayBlocks(features, labels, 32), L2, 4)
    monkeypatch.setattr(logistic, "RESIDENT_BYTES", 0)
    streamed = fit_logistic(ArrayBlocks(features, labels, 32), L2, 4)
    np.testing.assert_array_equal(streamed.weights, resident.weights)


def test_separable_classes_and_a_constant_feature():
    """Without end the weights would grow; ℓ2 holds them, and float32 is enough."""
    labels = np.arange(40) % 2
    features = np.stack([labels * 2.0 - 1, np.full(40, 0.1)], axis=1).astype(np.float32)
    found = fit_logistic(ArrayBlocks(features, labels), (1e-6, 1e-2), 2)
    assert (found.gradient <= 1e-5).all()
    # |w| of one class: l2 · w = sigmoid(-2 w)
    w = found.weights[1, 0, 1]
    assert w == pytest.approx(-found.weights[1, 0, 0], rel=1e-4)
    assert 1e-2 * w == pytest.approx(1 / (1 + np.exp(2 * w)), rel=2e-3)
    np.testing.assert_array_equal(found.weights[:, 1], 0)


def test_blocks():
    features, labels = overlapping(n=10)
    blocks = ArrayBlocks(features, labels, 4)
    assert [len(block) for block, _ in blocks] == [4, 4, 2]
    keep = labels == labels[0]
    chosen = in_memory(SelectedBlocks(blocks, keep), 2)
    np.testing.assert_array_equal(chosen.features, features[keep])
    np.testing.assert_array_equal(targets_of(chosen), labels[keep])


BAD = np.array([[1, np.nan], [0, 1]], np.float32)
EYE = np.eye(2, dtype=np.float32)


@pytest.mark.parametrize(
    ("blocks", "change", "message"),
    [
        ([(EYE, np.arange(2))], {"l2": [0.1, 0.0]}, r"l2 = \[0.1\d*, 0.0\]: it must be numbers ab"),
        ([(EYE, np.arange(2))], {"l2": []}, r"l2 = \[\]: it must be"),
        ([(EYE, np.arange(2))], {"num_classes": 1}, "num_classes = 1: with one class there is no"),
        ([(EYE, np.array([0, 2]))], {}, "num_classes = 2: it must be at least 3"),
        ([(EYE, np.array([0, -1]))], {}, r"blocks: 1 of 2 images have no label"),
        ([(BAD, np.arange(2))], {}, "blocks: 1 of 2 feature vectors are not finite"),
        ([], {}, "blocks: no images"),
    ],
)  # fmt: skip
def test_refuses(blocks, change, message):
    with pytest.raises(UserError, match=message):
        fit_logistic(blocks, **{"l2": [0.1], "num_classes": 2} | change)


def test_blocks_must_be_readable_again():
    with pytest.raises(UserError, match="blocks: it can be read only once"):
        fit_logistic(iter([(EYE, np.arange(2))]), [0.1], 2)


def test_a_head_moves_in_all_its_parts_or_in_none(monkeypatch):
    """Close to the end rounding decides, and must decide once: or a head looks for ever."""
    advance = logistic._advance
    tries = []

    def watched(heads, *others):
        before = np.array(heads.iterations), np.array(heads.gradient_norm), np.array(heads.tries)
        heads, busy = advance(heads, *others), others[-1]
        after = map(np.array, (heads.iterations, heads.gradient_norm, heads.tries))
        moved, norm_changed, tried = (
            np.asarray(x != y) for x, y in zip(after, before, strict=True)
        )
        assert not norm_changed[busy & ~moved].any() and tried[busy & ~moved].all()
        assert not np.asarray(heads.tries)[moved].any()
        tries.append(int(np.max(heads.tries)))
        return heads

    monkeypatch.setattr(logistic, "_advance", watched)
    for seed in (1, 2):
        rng = np.random.default_rng(seed)
        features = 3 * rng.normal(size=(10, 2)) @ rng.normal(size=(2, 16))
        features = (features + 0.3 * rng.normal(size=(10, 16))).astype(np.float32)
        fit_logistic(
            ArrayBlocks(features, np.arange(10), 10), [1e-5, 1e-4, 1e-3, 0.003, 0.01, 0.03], 10
        )
    assert max(tries) > 0
