"""Metrics against scikit-learn, and against loops where it has none."""

import numpy as np
import pytest
import sklearn.metrics

from esvit_jax.errors import UserError
from esvit_jax.evaluate import metrics


@pytest.fixture(name="rng")
def _rng():
    return np.random.default_rng(0)


def floats(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def test_ranks_and_top_k(rng):
    scores = rng.integers(0, 6, (3, 50, 7)).astype(np.float32)  # many are equal
    labels = rng.integers(0, 7, 50)
    ranks = metrics.rank_of_truth(scores, labels)
    for head in range(3):
        expected = [
            sorted(range(7), key=lambda c: (-row[c], c)).index(label)
            for row, label in zip(scores[head], labels, strict=True)
        ]
        np.testing.assert_array_equal(ranks[head], expected)
        for k in (1, 5):
            hits = sum(rank < k for rank in expected)
            assert metrics.top(k, ranks[head]) == pytest.approx(2 * hits)


def test_top_k_equals_scikit_learn(rng):
    scores, labels = floats(rng, 80, 9), rng.integers(0, 9, 80)
    ranks = metrics.rank_of_truth(scores, labels)
    for k in (1, 5):
        expected = sklearn.metrics.top_k_accuracy_score(labels, scores, k=k, labels=range(9))
        assert metrics.top(k, ranks) == pytest.approx(100 * expected)


def test_mean_per_class_equals_scikit_learn(rng):
    labels = np.repeat([0, 1, 3], [50, 5, 20])  # of class 2 there is none
    scores = floats(rng, 75, 4) + np.array([2, 0, 0, 0], np.float32)
    scores[:, 2] = -100
    expected = sklearn.metrics.balanced_accuracy_score(labels, scores.argmax(axis=1))
    found = metrics.mean_per_class(metrics.rank_of_truth(scores, labels), labels)
    assert found == pytest.approx(100 * expected)
    assert abs(found - metrics.top(1, metrics.rank_of_truth(scores, labels))) > 5


def loop_average_precision(scores, positives):
    """At each recall the best precision of any threshold that reaches it."""
    found = []
    for tenths in range(11):
        best = 0.0
        for threshold in set(scores.tolist()):
            retrieved = scores >= threshold
            hits = int((retrieved & positives).sum())
            if 10 * hits >= tenths * int(positives.sum()):
                best = max(best, hits / int(retrieved.sum()))
        found.append(best)
    return 100 * sum(found) / 11


@pytest.mark.parametrize("levels", [5, 1000])
def test_average_precision(rng, levels):
    for positives in (rng.random(60) < 0.3, np.arange(60) == 7, np.arange(60) < 10):
        scores = (rng.integers(0, levels, 60) + 0.5 * levels * positives).astype(np.float32)
        found = metrics.average_precision(scores, positives)
        assert found == pytest.approx(loop_average_precision(scores, positives))
        precision, recall, _ = sklearn.metrics.precision_recall_curve(positives, scores)
        precision, recall = precision[:-1], recall[:-1]  # the last point is no threshold
        points = [max(precision[recall >= tenths / 10 - 1e-9]) for tenths in range(11)]
        assert found == pytest.approx(100 * np.mean(points))


def test_mean_average_precision_leaves_out_what_does_not_count(rng):
    scores = floats(rng, 40, 3)
    targets = rng.integers(-1, 2, (40, 3))
    expected = np.mean([
        loop_average_precision(scores[targets[:, c] >= 0, c], targets[targets[:, c] >= 0, c] == 1)
        for c in range(3)
    ])  # fmt: skip
    assert metrics.mean_average_precision(scores, targets) == pytest.approx(expected)
    targets[:, 1] = 0
    with pytest.raises(UserError, match="targets: of class 1 there is no image"):
        metrics.mean_average_precision(scores, targets)


@pytest.mark.parametrize("levels", [4, 1000])
def test_roc_auc_equals_scikit_learn(rng, levels):
    positives = rng.random(70) < 0.4
    scores = (rng.integers(0, levels, 70) + 0.3 * levels * positives).astype(np.float32)
    expected = sklearn.metrics.roc_auc_score(positives, scores)
    assert metrics.roc_auc(scores, positives) == pytest.approx(100 * expected)
    with pytest.raises(UserError, match="positives: there must be some that are and some that are"):
        metrics.roc_auc(scores, np.ones(70, bool))
    with pytest.raises(UserError, match="positives: none of the images is one"):
        metrics.average_precision(scores, np.zeros(70, bool))


def test_mean_iou_equals_scikit_learn(rng):
    truth, predicted = rng.integers(-1, 4, (5, 6, 6)), rng.integers(0, 4, (5, 6, 6))
    counts = truth >= 0
    matrix = metrics.confusion(predicted, truth, 6)  # classes 4 and 5 do not occur
    np.testing.assert_array_equal(
        matrix, sklearn.metrics.confusion_matrix(truth[counts], predicted[counts], labels=range(6))
    )
    expected = sklearn.metrics.jaccard_score(truth[counts], predicted[counts], average="macro")
    assert metrics.mean_iou(matrix) == pytest.approx(100 * expected)


def test_spread():
    assert metrics.spread([1.0, 2.0, 6.0]) == pytest.approx((3.0, np.sqrt(7.0)))
    assert metrics.spread([5.0]) == (5.0, 0.0)
