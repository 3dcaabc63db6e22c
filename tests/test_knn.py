"""k-NN against the public implementation's numbers and against a loop over single images."""

import inspect
import io
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

from esvit_jax.errors import UserError
from esvit_jax.evaluate import knn
from esvit_jax.evaluate.knn import knn_accuracy, knn_table

GOLDEN = Path(__file__).parent / "data" / "knn.npz"
SPLITS = ("train_features", "train_labels", "test_features", "test_labels")


def brute_force(train, train_labels, test, test_labels, ks, temperature=0.07):
    """One test image, one neighbour, one class at a time, in float64."""

    def unit(x):
        x = x.astype(np.float64)
        return x / max(np.sqrt((x**2).sum()), 1e-12)

    classes = range(int(max(train_labels.max(), test_labels.max())) + 1)
    hits = {f"top{top}/{k}": 0 for k in ks for top in (1, 5)}
    for x, label in zip(test, test_labels, strict=True):
        cosines = [float(unit(x) @ unit(y)) for y in train]
        order = sorted(range(len(train)), key=lambda i: (-cosines[i], i))
        for k in ks:
            votes = dict.fromkeys(classes, 0.0)
            for i in order[:k]:
                votes[int(train_labels[i])] += np.exp(cosines[i] / temperature)
            predicted = sorted(classes, key=lambda c: (-votes[c], c))
            hits[f"top1/{k}"] += predicted[0] == label
            hits[f"top5/{k}"] += label in predicted[:5]
    return {name: 100 * count / len(test) for name, count in hits.items()}


def random_split(seed, n, m, d, classes):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, d))
    train_labels, test_labels = rng.integers(0, classes, n), rng.integers(0, classes, m)
    train = (centres[train_labels] + rng.normal(size=(n, d))).astype(np.float32)
    test = (centres[test_labels] + rng.normal(size=(m, d))).astype(np.float32)
    return train, train_labels, test, test_labels


@pytest.mark.parametrize("blocks", [(8192, 512), (97, 64), (1199, 299), (128, 1)])
def test_public_numbers(blocks):
    golden = np.load(GOLDEN)
    train_block, test_block = blocks
    result = knn_accuracy(
        *(golden[name] for name in SPLITS), train_block=train_block, test_block=test_block
    )
    assert list(result) == [f"top{top}/{k}" for k in (10, 20, 100, 200) for top in (1, 5)]
    for name, percent in result.items():
        assert percent == pytest.approx(float(golden[name]), abs=1e-9), name


def named_after_voters(result, n):
    """{"top1/20": …} to {"top1/3": …} with three train images."""
    numbered = [(name.split("/"), x) for name, x in result.items()]
    return {f"{top}/{min(int(k), n)}": x for (top, k), x in numbered}


@pytest.mark.parametrize(
    ("n", "m", "d", "classes"),
    [
        (61, 7, 5, 9),  # blocks that divide nothing
        (3, 10, 4, 3),  # fewer train images than any k
        (50, 1, 6, 7),  # one test image
        (1, 1, 1, 1),
        (40, 10, 3, 1),  # one class
        (40, 30, 3, 4),  # fewer than five classes
    ],
)
def test_equals_loop(n, m, d, classes):
    split = random_split(n + m, n, m, d, classes)
    ks = (1, 5, 20)
    expected = named_after_voters(brute_force(*split, ks), n)
    assert knn_accuracy(*split, ks=ks, train_block=16, test_block=4) == pytest.approx(expected)
    assert knn_accuracy(*split, ks=ks) == pytest.approx(expected)
    if classes == 1:
        assert set(expected.values()) == {100.0}


def test_temperature_matters_and_small_ones_do_not_overflow():
    # One near neighbour of class 0 against two farther ones of class 1.
    train = np.array([[1, 0], [1, 0.5], [1, 0.5]], np.float32)
    labels = np.array([0, 1, 1])
    test, truth = np.array([[1, 0]], np.float32), np.array([0])
    for temperature, percent in ((1.0, 0.0), (0.07, 100.0), (1e-4, 100.0)):
        result = knn_accuracy(train, labels, test, truth, ks=(3,), temperature=temperature)
        assert next(iter(result.values())) == percent


def test_ties_go_to_the_lower_index_and_class():
    train = np.ones((4, 2), np.float32)
    test, truth = np.ones((1, 2), np.float32), np.array([1])
    for train_block in (1, 3, 8):
        # The nearest of four equal images is the first: class 1.
        first = knn_accuracy(
            train, np.array([1, 0, 0, 0]), test, truth, ks=(1,), train_block=train_block
        )
        assert first["top1/1"] == 100
        # Two votes each: class 0 wins.
        even = knn_accuracy(
            train, np.array([1, 1, 0, 0]), test, truth, ks=(4,), train_block=train_block
        )
        assert even["top1/4"] == 0
        assert even["top5/4"] == 100


def test_zero_features_are_similar_to_nothing():
    train = np.array([[0, 0], [-1, 0], [0, 0]], np.float32)
    labels = np.array([0, 1, 2])
    test = np.array([[1, 0], [0, 0]], np.float32)
    # Cosine 0 to the zeros, -1 to the opposite one; all 0 for the zero test vector.
    result = knn_accuracy(train, labels, test, np.array([0, 0]), ks=(1,))
    assert result["top1/1"] == 100


def test_class_unknown_to_the_train_split_is_a_miss():
    split = (np.eye(7, dtype=np.float32), np.arange(7), np.eye(7, dtype=np.float32)[:2])
    result = knn_accuracy(*split, np.array([8, 1]), ks=(3,))
    assert result == {"top1/3": 50.0, "top5/3": 50.0}


def test_no_array_grows_with_test_times_train():
    """The only array of a device with both axes is a block, whatever n and m are."""
    split = random_split(0, 300, 200, 4, 3)
    seen = set()
    merge = knn._merge

    def spy(own, test):
        shapes = jax.tree.map(lambda x: x.shape, (*own["nearest"], test))
        seen.add((*shapes, own["train"].shape, own["labels"].shape))
        return merge(own, test)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knn, "_merge", spy)
        knn._on_own_rows.cache_clear()
        knn_accuracy(*split, ks=(10,), train_block=16, test_block=32)
    knn._on_own_rows.cache_clear()
    assert seen == {((32, 10), (32, 10), (32, 4), (16, 4), (16,))}


@pytest.mark.parametrize("train_block", [1, 7, 16, 100])
def test_devices_share_the_bank_as_if_one_had_it(train_block):
    """Among many equal images, the lowest indices are the nearest, whichever device has them."""
    assert jax.device_count() == 4
    rng = np.random.default_rng(2)
    # Cosines of these are exact in float32, so that equal ones are equal everywhere.
    train = np.eye(4, dtype=np.float32)[rng.integers(0, 4, 150)]
    test = np.eye(4, dtype=np.float32)[rng.integers(0, 4, 60)]
    labels, truth = rng.integers(0, 6, 150), rng.integers(0, 6, 60)
    ks = (1, 3, 20, 60)
    expected = brute_force(train, labels, test, truth, ks)
    found = knn_accuracy(train, labels, test, truth, ks=ks, train_block=train_block, test_block=25)
    assert found == expected
    order = np.argsort(-(test @ train.T), axis=1, kind="stable")
    blocks = knn._nearest(train, labels, test, 60, train_block, 25)
    np.testing.assert_array_equal(np.concatenate([x for _, x in blocks]), labels[order[:, :60]])


def test_several_temperatures():
    split = random_split(5, 80, 30, 6, 4)
    several = knn_accuracy(*split, ks=(5, 20), temperature=(0.07, 0.5, 0.04))
    assert list(several) == [
        f"top{top}/{k}{t}" for t in ("", "/0.5", "/0.04") for k in (5, 20) for top in (1, 5)
    ]  # fmt: skip
    for t, name in ((0.07, ""), (0.5, "/0.5"), (0.04, "/0.04")):
        expected = brute_force(*split, (5, 20), t)
        found = {key: several[f"{key}{name}"] for key in expected}
        assert found == pytest.approx(expected)
    assert knn_accuracy(*split, ks=(5,), temperature=0.04) == {
        name: several[name] for name in ("top1/5/0.04", "top5/5/0.04")
    }


def test_a_million_classes():
    """Nothing is as large as the number of classes; top-5 is filled up as with few."""
    labels = np.array([999_999, 7, 7])
    train = np.array([[1, 0], [0, 1], [0.1, 1]], np.float32)
    test = np.array([[1, 0], [0, 1], [0, 1], [0, 1]], np.float32)
    truth = np.array([999_999, 7, 2, 500_000])  # 0 … 3 fill up
    found = knn_accuracy(train, labels, test, truth, ks=(2,), num_classes=10**6)
    assert found == {"top1/2": 50.0, "top5/2": 75.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_labels": np.array([0, -1, 1])}, r"train_labels: 1 of 3 images have no label"),
        ({"test_labels": np.array([-1, -1])}, r"test_labels: 2 of 2 images have no label"),
        (
            {"test_labels": np.array([0, 5])},
            r"num_classes = 2: it must be at least 6: test_labels hold a 5",
        ),
        ({"ks": (10, 0)}, r"ks = \(10, 0\): it must be whole numbers from 1 up"),
        ({"ks": ()}, r"ks = \(\): it must be"),
        ({"temperature": 0.0}, r"temperature = 0.0: it must be more than 0"),
        ({"temperature": float("nan")}, r"temperature = nan"),
        ({"temperature": (0.07, -1.0)}, r"temperature = -1.0: it must be more than 0"),
        ({"temperature": ()}, r"temperature = \(\): it must be more than 0"),
        ({"num_classes": 0}, r"num_classes = 0: it must be at least 1"),
        (
            {"test_features": np.array([[1, np.nan], [0, 1]], np.float32)},
            r"test_features: 1 of 2 vectors are not finite",
        ),
        (
            {"test_features": np.zeros((0, 2), np.float32), "test_labels": np.zeros(0, int)},
            r"test_labels: no images",
        ),
    ],
)
def test_refuses(change, message):
    arguments = {
        "train_features": np.eye(3, 2, dtype=np.float32),
        "train_labels": np.array([0, 1, 1]),
        "test_features": np.eye(2, dtype=np.float32),
        "test_labels": np.array([0, 1]),
        "num_classes": 2,
    } | change
    with pytest.raises(UserError, match=message):
        knn_accuracy(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ks": (1.5,)}, r"ks = \(1.5,\): it must be whole numbers"),
        ({"test_features": np.ones((2, 3), np.float32)}, "train_features have 2 columns, test_fea"),
        ({"test_labels": np.array([0])}, "test_labels: 1 labels of 2 images"),
    ],
)
def test_refuses_what_types_would_tell(change, message):
    """Types are checked in tests only."""
    unchecked: Any = inspect.unwrap(knn.knn_ranks)
    eye, labels = np.eye(2, dtype=np.float32), np.array([0, 1])
    arguments: dict[str, Any] = {
        "train_features": eye, "train_labels": labels, "test_features": eye, "test_labels": labels,
        "ks": (1,),
    }  # fmt: skip
    with pytest.raises(UserError, match=message):
        unchecked(**arguments | change)


def test_results_are_named_after_the_neighbours_that_voted():
    """With 160 train images nobody has 200 neighbours; ks that come to the same count once."""
    split = random_split(3, 160, 20, 6, 4)
    result = knn_accuracy(*split, ks=(10, 160, 200, 300))
    assert list(result) == ["top1/10", "top5/10", "top1/160", "top5/160"]
    assert result["top1/160"] == brute_force(*split, (200,))["top1/200"]


def cells_of(values):
    screen = io.StringIO()
    Console(file=screen, width=60).print(knn_table(values))
    rows = [line for line in screen.getvalue().splitlines() if "│" in line]
    return [[cell.strip() for cell in row.strip("│").split("│")] for row in rows]


def test_table():
    one = {"top1/10": 72.3333, "top5/10": 98.0, "top1/20": 8.0, "top5/20": 9.996}
    assert cells_of(one) == [["10", "72.33", "98.00"], ["20", "8.00", "10.00"]]
    two = {"top1/10": 70.0, "top5/10": 98.0, "top1/10/0.04": 8.0, "top5/10/0.04": 9.0}
    assert cells_of(two) == [["10", "0.07", "70.00", "98.00"], ["10", "0.04", "8.00", "9.00"]]
