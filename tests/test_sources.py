"""Data sets by their names: bundled, TFDS, folders."""

import io
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from images import write_image
from PIL import Image

from esvit_jax.data import sources
from esvit_jax.data.sources import IndexedSource, Record
from esvit_jax.errors import UserError

MINI = "bundled/fashion_mnist_mini"


def open_indexed(name: str, split: str, data_dir: str | None = None) -> IndexedSource:
    source = sources.open_source(name, split, data_dir)
    assert isinstance(source, IndexedSource)
    return source


def stored(record: Record) -> bytes:
    assert isinstance(record["image"], bytes)
    return record["image"]


def records_of(source: IndexedSource) -> list[Record]:
    return [source[i] for i in range(len(source))]


@pytest.fixture
def flat_folder(tmp_path: Path) -> Path:
    """20 images without labels; image i has the grey value 10 + i."""
    for i in range(20):
        write_image(tmp_path / "flat" / f"{i:02}.png", 10 + i)
    return tmp_path / "flat"


# The bundled data set.


def test_bundled_data_set_is_balanced_grey_png_and_small():
    for split, per_class in (("train", 600), ("test", 150)):
        source = open_indexed(MINI, split)
        assert len(source) == 10 * per_class
        assert source.num_classes == 10
        assert source.class_names[0] == "t_shirt_top" and source.class_names[9] == "ankle_boot"
        records = records_of(source)
        assert np.bincount([r["label"] for r in records]).tolist() == [per_class] * 10
        assert len({r["id"] for r in records}) == len(records)
        image = Image.open(io.BytesIO(stored(records[0])))
        assert (image.format, image.mode, image.size) == ("PNG", "L", (28, 28))
    folder = sources.BUNDLED / "fashion_mnist_mini"
    assert sum(f.stat().st_size for f in folder.iterdir()) <= 5_000_000
    assert "MIT License" in (folder / "LICENSE").read_text(encoding="utf-8")


def test_bundled_images_do_not_repeat_between_splits():
    train_split, test_split = (open_indexed(MINI, split) for split in ("train", "test"))
    train_images = {stored(train_split[i]) for i in range(len(train_split))}
    assert len(train_images) == len(train_split)
    assert not train_images & {stored(test_split[i]) for i in range(len(test_split))}


def test_record_ids_name_shard_and_position_also_in_slices():
    whole = open_indexed(MINI, "train")
    part = open_indexed(MINI, "train[50%:]+test[-2:]")
    assert len(part) == 3002
    assert part[0] == whole[3000] and part[2999] == whole[5999]
    assert whole[3000]["id"] == "fashion_mnist_mini-train.array_record-00000-of-00001__3000"
    assert part[3001] == open_indexed(MINI, "test")[1499]
    with pytest.raises(IndexError):
        part[3002]
    assert sum(1 for _ in open_indexed(MINI, "test[:7]")) == 7


# Names and splits.


@pytest.mark.parametrize(
    ("argument", "name", "split", "words"),
    [
        ("name", "bundled/nothing", "train", ["bundled/nothing", MINI]),
        ("name", "no_such_set", "train", ["no_such_set", "tfds build", "data_dir"]),
        ("name", "no_such_set:1.0.0", "train", ["no_such_set:1.0.0", "tfds build"]),
        ("name", "no name", "train", ["no name", "tfds build"]),
        ("name", "", "train", ["not prepared"]),
        ("name", "/no/such/folder", "train", ["no such directory"]),
        ("name", "nul\0", "train", ["not prepared"]),
        ("name", "folder:/no/such/folder", "train", ["no such folder"]),
        ("name", "folder:", "train", ["no such folder"]),
        ("split", MINI, "validation", [MINI, "train (6000 records), test (1500", "train[:90%]"]),
        ("split", MINI, "train[x]", ["no such split"]),
        ("split", MINI, "train+", ["no such split"]),
        ("split", MINI, "", ["no such split"]),
        ("split", MINI, "train[9000:]", ["no such split"]),
        ("split", MINI, "train[:0]", ["of the 6000 records", "selects none"]),
        ("split", MINI, "train[10:5]", ["selects none", "from 10 to 5"]),
        ("split", MINI, "train[-5:-10]", ["from 5995 to 5990"]),
        ("split", MINI, "test+train[10:5]", ["records of train", "from 10 to 5"]),
    ],
)
def test_wrong_names_and_splits_are_one_line(
    argument: str, name: str, split: str, words: list[str], tmp_path: Path
):
    with pytest.raises(UserError) as error:
        sources.open_source(name, split, data_dir=str(tmp_path))
    message = str(error.value)
    assert error.value.argument == argument
    assert error.value.value == {"name": name, "split": split}[argument]
    assert "\n" not in message and message.startswith(f"{argument} = ")
    assert all(word in message for word in words), message


def test_a_data_dir_that_is_not_there(tmp_path: Path):
    with pytest.raises(UserError, match="there is no such directory") as error:
        sources.open_source("mnist", "train", data_dir=str(tmp_path / "missing"))
    assert (error.value.argument, error.value.value) == ("data_dir", str(tmp_path / "missing"))


def test_a_folder_of_images_without_its_prefix(flat_folder: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match=f"is written folder:{flat_folder}"):
        sources.open_source(str(flat_folder), "train")
    monkeypatch.chdir(flat_folder.parent)
    with pytest.raises(UserError, match="is written folder:flat"):
        sources.open_source("flat", "train")


@pytest.mark.parametrize("content", ["", "{}", "{"])
def test_a_broken_tfds_directory_is_one_line(tmp_path: Path, content: str):
    (tmp_path / "features.json").write_text("{")
    (tmp_path / "dataset_info.json").write_text(content)
    with pytest.raises(UserError, match="no whole TFDS data set") as error:
        sources.open_source(str(tmp_path), "train")
    assert error.value.argument == "name" and "\n" not in str(error.value)


def test_tfds_directory_and_name_in_data_dir_open(tmp_path: Path):
    prepared = sources.BUNDLED / "fashion_mnist_mini"
    by_path = open_indexed(str(prepared), "test")
    (tmp_path / "fashion_mnist_mini").mkdir()
    (tmp_path / "fashion_mnist_mini" / "1.0.0").symlink_to(prepared)
    for name in ("fashion_mnist_mini", "fashion_mnist_mini:1.0.0"):
        by_name = open_indexed(name, "test", data_dir=str(tmp_path))
        assert len(by_name) == 1500 and by_name[7] == by_path[7]


def test_sources_pickle(flat_folder: Path):
    for name in (MINI, f"folder:{flat_folder}"):
        source = open_indexed(name, "train")
        copy = pickle.loads(pickle.dumps(source))
        assert len(copy) == len(source) and copy[5] == source[5]
        assert copy.class_names == source.class_names


def test_a_missing_shard_is_named_before_it_is_read(tmp_path: Path):
    copy = Path(shutil.copytree(sources.BUNDLED / "fashion_mnist_mini", tmp_path / "copy"))
    missing = next(copy.glob("*train.array_record*"))
    missing.unlink()
    with pytest.raises(UserError, match=f"no whole TFDS data set: {missing} is missing"):
        sources.open_source(str(copy), "train")
    assert len(sources.open_source(str(copy), "test")) == 1500


def tfds_info_stub(tmp_path: Path, features: str, file_format: str) -> None:
    """A TFDS directory with one train record, that no writer is needed for."""
    (tmp_path / "features.json").write_text(features)
    template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    (tmp_path / "dataset_info.json").write_text(
        f'{{"fileFormat": "{file_format}", "name": "stub", "version": "1.0.0", "splits": '
        f'[{{"name": "train", "shardLengths": ["1"], "filepathTemplate": "{template}"}}]}}'
    )
    assert tfds.builder_from_directory(tmp_path).info.splits["train"].num_examples == 1


def test_tfrecord_without_tensorflow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    features = (sources.BUNDLED / "fashion_mnist_mini" / "features.json").read_text()
    tfds_info_stub(tmp_path, features, "tfrecord")
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        sources.open_source(str(tmp_path), "train")
    assert "pip install esvit_jax[tf]" in str(error.value) and "tfrecord" in str(error.value)
    assert "\n" not in str(error.value)


def test_data_set_without_images_is_refused(tmp_path: Path):
    features = (sources.BUNDLED / "fashion_mnist_mini" / "features.json").read_text()
    content = json.loads(features)
    del content["featuresDict"]["features"]["image"]
    tfds_info_stub(tmp_path, json.dumps(content), "array_record")
    with pytest.raises(UserError, match="no image feature; it has label"):
        sources.open_source(str(tmp_path), "train")


# Folders.


def test_flat_folder_has_no_labels_and_one_split(flat_folder: Path):
    source = open_indexed(f"folder:{flat_folder}", "train")
    assert len(source) == 20 and source.num_classes == 0
    assert {record["label"] for record in records_of(source)} == {-1}
    assert sorted(r["id"] for r in records_of(source)) == [f"{i:02}.png" for i in range(20)]
    with pytest.raises(UserError, match=r"no such split or slice; it has train \(20 records\)"):
        sources.open_source(f"folder:{flat_folder}", "test")


def test_a_class_has_one_label_in_all_splits(tmp_path: Path):
    for split, of_split in (("train", "bird cat cat"), ("test", "ant bird cat")):
        for i, label in enumerate(of_split.split()):
            write_image(tmp_path / split / label / f"{i}.png")
    train = open_indexed(f"folder:{tmp_path}", "train")
    test = open_indexed(f"folder:{tmp_path}", "test")
    assert train.class_names == test.class_names == ("ant", "bird", "cat")
    assert sorted((r["id"], r["label"]) for r in records_of(train)) == [
        ("train/bird/0.png", 1),
        ("train/cat/1.png", 2),
        ("train/cat/2.png", 2),
    ]
    assert sorted(r["label"] for r in records_of(test)) == [0, 1, 2]
    both = open_indexed(f"folder:{tmp_path}", "test+train")
    assert records_of(both) == records_of(test) + records_of(train)


def test_folder_slices_part_the_images_and_new_files_move_none(flat_folder: Path):
    def ids(split: str) -> list[str]:
        return [r["id"] for r in records_of(open_indexed(f"folder:{flat_folder}", split))]

    whole = ids("train")
    assert whole != sorted(whole)  # a slice of sorted photos would be one evening, or one class
    assert ids("train[:75%]") == whole[:15] and ids("train[75%:]") == whole[15:]
    assert ids("train[-3:]") == whole[-3:]
    write_image(flat_folder / "new.png")
    assert [name for name in ids("train") if name != "new.png"] == whole


def test_a_file_that_has_gone_has_no_bytes(flat_folder: Path):
    source = open_indexed(f"folder:{flat_folder}", "train")
    (flat_folder / source[3]["id"]).unlink()
    assert source[3]["image"] == b"" and source[4]["image"]
