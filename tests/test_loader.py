"""The order of batches, bad records, and the batches of evaluations."""

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import grain
import numpy as np
import pytest
import tensorflow_datasets as tfds
from images import encoded, write_image

from esvit_jax.data import loader, sources
from esvit_jax.data.decode import decode
from esvit_jax.data.sources import IndexedSource, Source
from esvit_jax.errors import UserError

MINI = "bundled/fashion_mnist_mini"

Batches = list[dict[str, np.ndarray]]


def open_indexed(name: str, split: str) -> IndexedSource:
    source = sources.open_source(name, split)
    assert isinstance(source, IndexedSource)
    return source


def train(source: Source, steps: int, **overrides: Any) -> Batches:
    """`steps` batches of `train_batches` with small defaults."""
    options: dict[str, Any] = {
        "batch_size": 8,
        "canvas_size": 8,
        "seed": 0,
        "start_step": 0,
        "num_workers": 0,
        "num_threads": 2,
        "max_bad_records": 0,
    }
    batches = loader.train_batches(source, **(options | overrides))
    try:
        return list(itertools.islice(batches, steps))
    finally:
        batches.close()


def values(batches: Batches) -> np.ndarray:
    """The grey value of every image, in order."""
    return np.concatenate([batch["canvas"][:, 0, 0, 0] for batch in batches])


@pytest.fixture
def flat_folder(tmp_path: Path) -> Path:
    """20 images without labels; image i has the grey value 10 + i."""
    for i in range(20):
        write_image(tmp_path / "flat" / f"{i:02}.png", 10 + i)
    return tmp_path / "flat"


def test_reading_imports_neither_tensorflow_nor_torch():
    code = f"""
import sys
from esvit_jax.data import loader, sources
source = sources.open_source("{MINI}", "train")
batches = loader.train_batches(
    source, batch_size=4, canvas_size=28, seed=0, start_step=0, num_workers=0, num_threads=1,
    max_bad_records=0)
assert next(batches)["canvas"].any()
next(loader.eval_batches(source, batch_size=4, canvas_size=28, num_threads=1))
print([m for m in sys.modules if m.split(".")[0] in ("tensorflow", "torch")])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
    assert not done.stderr  # nor does it complain when it ends with batches still on their way


# The order of training.


def test_order_depends_on_the_seed_alone(flat_folder: Path):
    source = open_indexed(f"folder:{flat_folder}", "train")
    first = values(train(source, 10))
    np.testing.assert_array_equal(first, values(train(source, 10, num_threads=1)))
    assert (first != values(train(source, 10, seed=1))).any()


def test_order_is_that_of_grain(flat_folder: Path):
    source = open_indexed(f"folder:{flat_folder}", "train")
    grey = [10 + int(source[i]["id"][:2]) for i in range(20)]
    order = grain.MapDataset.source(grey).seed(3).shuffle().repeat()
    assert values(train(source, 10, seed=3)).tolist() == [order[k] for k in range(80)]


def test_every_epoch_is_another_permutation(flat_folder: Path):
    source = open_indexed(f"folder:{flat_folder}", "train")
    epochs = values(train(source, 10)).reshape(4, 20)  # batches of 8 cross the epochs' ends
    for epoch in epochs:
        assert sorted(epoch) == list(range(10, 30))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert sorted(epochs[0]) != epochs[0].tolist()


def test_resume_continues_the_stream(flat_folder: Path):
    source = open_indexed(f"folder:{flat_folder}", "train")
    whole = train(source, 12)
    for start_step in (1, 7):
        resumed = train(source, 12 - start_step, start_step=start_step)
        for a, b in zip(whole[start_step:], resumed, strict=True):
            for key in ("canvas", "size", "label"):
                np.testing.assert_array_equal(a[key], b[key])


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_share_each_batch_in_order(flat_folder: Path, process_count: int):
    source = open_indexed(f"folder:{flat_folder}", "train")
    alone = train(source, 6, start_step=2)
    shares = [
        train(source, 6, start_step=2, process_index=p, process_count=process_count)
        for p in range(process_count)
    ]
    for t in range(6):
        together = np.concatenate([share[t]["canvas"] for share in shares])
        np.testing.assert_array_equal(together, alone[t]["canvas"])
    with pytest.raises(UserError, match="batch_size = 8: 3 processes"):
        train(source, 1, process_count=3)


def test_batch_larger_than_the_data_set(flat_folder: Path):
    source = open_indexed(f"folder:{flat_folder}", "train[:3]")
    (batch,) = train(source, 1)
    assert np.bincount(values([batch]), minlength=30).max() == 3  # 8 = 3 + 3 + 2
    one = open_indexed(f"folder:{flat_folder}", "train[:1]")
    assert len(set(values(train(one, 2)))) == 1


def test_batch_shapes_and_labels():
    source = open_indexed(MINI, "train[:40]")
    (batch,) = train(source, 1, canvas_size=32)
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
        "canvas": ((8, 32, 32, 3), "uint8"),
        "size": ((8, 2), "int32"),
        "label": ((8,), "int32"),
    }
    by_image = {}
    for i in range(40):
        canvas, _ = decode(source[i]["image"], 32)
        by_image[canvas.tobytes()] = source[i]["label"]
    assert [by_image[canvas.tobytes()] for canvas in batch["canvas"]] == batch["label"].tolist()
    assert (batch["size"] == 28).all()


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("batch_size", 0),
        ("batch_size", -8),
        ("canvas_size", 0),
        ("seed", -1),
        ("start_step", -1),
        ("num_workers", -1),
        ("num_threads", 0),
        ("max_bad_records", -1),
        ("process_count", 0),
        ("process_index", -1),
        ("process_index", 1),
    ],
)
def test_arguments_out_of_range_are_one_line(flat_folder: Path, argument: str, value: int):
    source = open_indexed(f"folder:{flat_folder}", "train")
    with pytest.raises(UserError) as error:
        train(source, 1, **{argument: value})
    assert (error.value.argument, error.value.value) == (argument, value)
    evaluation = {"batch_size": 8, "canvas_size": 8, "num_threads": 1, argument: value}
    if argument in ("seed", "start_step", "num_workers", "max_bad_records"):
        return
    with pytest.raises(UserError) as error:
        loader.eval_batches(source, **evaluation)
    assert (error.value.argument, error.value.value) == (argument, value)


# Bad records.


@pytest.fixture
def bad_folder(flat_folder: Path) -> Path:
    """20 images of which two cannot be decoded."""
    (flat_folder / "04.png").write_bytes(b"")
    whole = (flat_folder / "13.png").read_bytes()
    (flat_folder / "13.png").write_bytes(whole[: len(whole) - 20])
    return flat_folder


def test_bad_records_are_replaced_by_the_next_named_once_and_counted(
    bad_folder: Path, caplog: pytest.LogCaptureFixture
):
    source = open_indexed(f"folder:{bad_folder}", "train")
    ids = [source[i]["id"] for i in range(20)]
    grey = [10 + int(name[:2]) for name in ids]
    for i in reversed(range(20)):
        if ids[i] in ("04.png", "13.png"):
            grey[i] = grey[(i + 1) % 20]
    order = grain.MapDataset.source(grey).seed(0).shuffle().repeat()
    batches = train(source, 10, max_bad_records=2)
    assert values(batches).tolist() == [order[k] for k in range(80)]
    resumed = train(source, 4, start_step=6, max_bad_records=2)
    np.testing.assert_array_equal(values(batches[6:]), values(resumed))
    for name in ("04.png", "13.png"):
        # Once a run, of which there were two; four epochs do not count a record four times.
        assert sum(f"{name} cannot be decoded" in line for line in caplog.messages) == 2


def test_too_many_bad_records_stop_the_run(bad_folder: Path):
    source = open_indexed(f"folder:{bad_folder}", "train")
    with pytest.raises(UserError) as error:
        train(source, 10, max_bad_records=1)
    message = str(error.value)
    assert message.startswith("max_bad_records = 1: ") and "2 of the 20" in message
    assert "04.png" in message and "13.png" in message and "\n" not in message


def test_nothing_but_bad_records_stops_the_run(tmp_path: Path):
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(b"no image")
    source = open_indexed(f"folder:{tmp_path}", "train")
    with pytest.raises(UserError, match="3 of the 3 records") as error:
        train(source, 1, max_bad_records=100)
    assert str(error.value).endswith("; mend the data")  # to raise the limit would not help


@pytest.mark.slow
def test_worker_processes_give_the_same_batches_and_count_bad_records(
    bad_folder: Path, caplog: pytest.LogCaptureFixture
):
    source = open_indexed(f"folder:{bad_folder}", "train")
    alone = train(source, 8, start_step=1, max_bad_records=2)
    caplog.clear()
    workers = train(source, 8, start_step=1, max_bad_records=2, num_workers=2)
    for a, b in zip(alone, workers, strict=True):
        for key in ("canvas", "size", "label"):
            assert type(b[key]) is np.ndarray
            np.testing.assert_array_equal(a[key], b[key])
    assert sum("cannot be decoded" in line for line in caplog.messages) == 2
    with pytest.raises(UserError, match="max_bad_records = 1"):
        train(source, 8, max_bad_records=1, num_workers=1)


# Evaluation.


@pytest.mark.parametrize("process_count", [1, 2])
def test_eval_reads_every_record_once_in_order(
    bad_folder: Path, caplog: pytest.LogCaptureFixture, process_count: int
):
    source = open_indexed(f"folder:{bad_folder}", "train")
    shares = [
        list(
            loader.eval_batches(
                source,
                batch_size=8,
                canvas_size=8,
                num_threads=2,
                process_index=p,
                process_count=process_count,
            )
        )
        for p in range(process_count)
    ]
    assert {len(share) for share in shares} == {3}
    ids, mask, grey, sizes = [], [], [], []
    for batches in zip(*shares, strict=True):
        for batch in batches:
            assert batch["canvas"].shape == (8 // process_count, 8, 8, 3)
            assert batch["mask"].dtype == bool
            ids += batch["id"]
            mask += batch["mask"].tolist()
            grey += batch["canvas"][:, 0, 0, 0].tolist()
            sizes += batch["size"].tolist()
    assert ids == [source[i]["id"] for i in range(20)] + [""] * 4
    assert mask == [bool(name) and name not in ("04.png", "13.png") for name in ids]
    assert [g for g, m in zip(grey, mask, strict=True) if m] == [
        10 + int(name[:2]) for name, m in zip(ids, mask, strict=True) if m
    ]
    assert all(size == ([6, 4] if m else [1, 1]) for size, m in zip(sizes, mask, strict=True))
    assert sum("cannot be decoded" in line for line in caplog.messages) == 2


def test_eval_labels_and_shares():
    source = open_indexed(MINI, "test[:20]")
    batches = list(loader.eval_batches(source, batch_size=20, canvas_size=28, num_threads=1))
    assert len(batches) == 1 and batches[0]["mask"].all()
    assert batches[0]["label"].tolist() == [source[i]["label"] for i in range(20)]
    with pytest.raises(UserError, match="batch_size = 8: 3 processes"):
        loader.eval_batches(source, batch_size=8, canvas_size=8, num_threads=1, process_count=3)


# TFRecord files.


@pytest.fixture(scope="module")
def tfrecord_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tensorflow")

    class Greys(tfds.core.GeneratorBasedBuilder):
        """Image i has the grey value i and the label i % 2; the last cannot be decoded."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 1)),
                "label": tfds.features.ClassLabel(num_classes=2),
                "note": tfds.features.Text(),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(21):
                image = encoded(np.full((6, 4), i, np.uint8)) if i < 20 else b"no image"
                yield i, {"image": image, "label": i % 2, "note": "unread"}

    builder = Greys(data_dir=tmp_path_factory.mktemp("tfrecord"), file_format="tfrecord")
    builder.download_and_prepare()
    return Path(builder.data_dir)


def test_tfrecord_trains_shuffled_and_shared(
    tfrecord_directory: Path, caplog: pytest.LogCaptureFixture
):
    source = sources.open_source(str(tfrecord_directory), "train")
    assert isinstance(source, sources.TFRecordSource)
    assert (len(source), source.num_classes) == (21, 2)
    batches = train(source, 10, max_bad_records=1)
    grey = values(batches)
    assert sorted(grey[:20]) == list(range(20)) and grey[:20].tolist() != list(range(20))
    assert (grey % 2 == np.concatenate([batch["label"] for batch in batches])).all()
    assert any(
        "TFRecord" in line and "resumed run shuffles anew" in line for line in caplog.messages
    )
    np.testing.assert_array_equal(grey, values(train(source, 10, max_bad_records=1)))
    resumed = values(train(source, 5, start_step=5, max_bad_records=1))
    assert (resumed != grey[40:]).any()

    shares = [
        values(train(source, 5, process_index=p, process_count=2, max_bad_records=1))
        for p in range(2)
    ]
    assert not set(shares[0]) & set(shares[1])
    assert set(shares[0]) | set(shares[1]) == set(range(20))
    with pytest.raises(UserError, match="max_bad_records = 0"):
        train(source, 10)


def test_tfrecord_evaluates_in_order(tfrecord_directory: Path):
    source = sources.open_source(str(tfrecord_directory), "train")
    batches = list(loader.eval_batches(source, batch_size=8, canvas_size=8, num_threads=2))
    assert (
        np.concatenate([batch["mask"] for batch in batches]).tolist() == [True] * 20 + [False] * 4
    )
    assert values(batches)[:20].tolist() == list(range(20))
    assert batches[0]["id"][3].endswith("-00000-of-00001__3")
