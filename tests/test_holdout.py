"""The part of a training split that is held out."""

import pickle
from typing import Any

import numpy as np
import pytest

from esvit_jax.data.holdout import _hashes, hold_out, sample
from esvit_jax.data.sources import IndexedSource, TFRecordSource, open_source
from esvit_jax.errors import UserError


class Numbers:
    """Records that are their index; sorted by class, as folders are."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index) -> Any:
        return {"image": b"", "label": index * 10 // self.count, "id": str(index)}


def numbers(count) -> Any:
    return IndexedSource("numbers", "train", tuple("abcdefghij"), Numbers(count))


def parts_of(count) -> tuple[Any, Any]:
    return hold_out(numbers(count))


def ids(source):
    return [source[i]["id"] for i in range(len(source))]


def test_hash_is_splitmix64():
    def splitmix(state):
        mask = 2**64 - 1
        z = state * 0x9E3779B97F4A7C15 & mask
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        return z ^ z >> 31

    assert splitmix(1) == 0xE220A8397B1DCDAF  # the first number of SplitMix64 from seed 0
    assert _hashes(5).tolist() == [splitmix(i) for i in range(1, 6)]


@pytest.mark.parametrize(
    ("count", "held"), [(2, 1), (9, 1), (10, 1), (99, 9), (1000, 100), (150_000, 10_000)]
)
def test_every_record_is_in_one_part(count, held):
    rest, out = parts_of(count)
    assert (len(rest), len(out)) == (count - held, held)
    first, second = (set(part.records.indices) for part in (rest, out))
    assert not first & second and first | second == set(range(count))
    assert list(rest.records.indices) == sorted(first)


def test_it_is_the_same_every_time_and_of_all_classes():
    _, out = hold_out(numbers(1000))
    assert ids(out) == ids(hold_out(numbers(1000))[1])
    assert ids(pickle.loads(pickle.dumps(out))) == ids(out)
    labels = [out[i]["label"] for i in range(len(out))]
    assert np.bincount(labels, minlength=10).min() >= 3


def test_parts_are_sources():
    source: Any = open_source("bundled/fashion_mnist_mini", "train[:40]")
    rest, out = hold_out(source)
    assert rest.class_names == source.class_names and rest.name == source.name
    assert (rest.split, out.split) == (
        "train[:40] (all but the held-out part)", "train[:40] (held-out part)",
    )  # fmt: skip
    everything = {source[i]["id"] for i in range(40)}
    assert set(ids(rest)) | set(ids(out)) == everything
    with pytest.raises(IndexError):
        out[len(out)]


def test_a_sample_is_spread_over_the_split():
    part: Any = sample(numbers(1000), 200)
    assert len(part) == 200 and part.split == "train (a sample)"
    assert np.bincount([part[i]["label"] for i in range(200)], minlength=10).min() >= 8
    assert ids(part) == ids(sample(numbers(1000), 200))
    assert ids(sample(numbers(7), 200)) == [str(i) for i in range(7)]


def test_what_cannot_be_split():
    with pytest.raises(UserError, match=r"^numbers train has 1 record; one to train on and one"):
        hold_out(numbers(1))
    stream = TFRecordSource("stream", "train", ("a", "b"), 100, None, "image", "label")
    with pytest.raises(UserError, match=r"^stream train is stored as TFRecord files, of which no"):
        hold_out(stream)
