"""The data road: sources of records, decoding into canvases, the order of batches."""

import io
import itertools
import json
import pickle
import subprocess
import sys
from pathlib import Path

import grain
import numpy as np
import pytest
import tensorflow_datasets as tfds
from absl import logging
from PIL import Image, ImageOps

from esvit_jax.data import loader, sources
from esvit_jax.errors import UserError

MINI = "bundled/fashion_mnist_mini"


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(
        file, format, **options
    )
    return file.getvalue()


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_image(path, value, size=(6, 4)):
    """A grey PNG of one value, by which a test recognises it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(np.full(size, value, np.uint8)))


def train(source, steps, *, start_step=0, **overrides):
    """`steps` batches of `train_batches` with small defaults."""
    options = {
        "batch_size": 8,
        "canvas_size": 8,
        "seed": 0,
        "start_step": start_step,
        "num_workers": 0,
        "num_threads": 2,
        "max_bad_records": 0,
    }
    batches = loader.train_batches(source, **(options | overrides))
    try:
        return list(itertools.islice(batches, steps))
    finally:
        batches.close()


def values(batches):
    """The grey value of every image, in order."""
    return np.concatenate([batch["canvas"][:, 0, 0, 0] for batch in batches])


@pytest.fixture
def flat_folder(tmp_path):
    """20 images without labels; image i has the grey value 10 + i."""
    for i in range(20):
        write_image(tmp_path / "flat" / f"{i:02}.png", 10 + i)
    return tmp_path / "flat"


@pytest.fixture
def log_lines():
    """What the package logs, as a list of lines."""
    lines = []

    class Handler(logging.PythonHandler):
        def emit(self, record):
            lines.append(record.getMessage())

    handler = Handler()
    logging.get_absl_logger().addHandler(handler)
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.INFO)
    yield lines
    logging.set_verbosity(verbosity)
    logging.get_absl_logger().removeHandler(handler)


# The bundled data set.


def test_bundled_data_set_is_balanced_grey_png_and_small():
    for split, per_class in (("train", 600), ("test", 150)):
        source = sources.open_source(MINI, split)
        assert len(source) == 10 * per_class
        assert source.num_classes == 10
        assert source.class_names[0] == "t_shirt_top" and source.class_names[9] == "ankle_boot"
        records = [source[i] for i in range(len(source))]
        assert np.bincount([r["label"] for r in records]).tolist() == [per_class] * 10
        assert len({r["id"] for r in records}) == len(records)
        image = Image.open(io.BytesIO(records[0]["image"]))
        assert (image.format, image.mode, image.size) == ("PNG", "L", (28, 28))
    folder = sources.BUNDLED / "fashion_mnist_mini"
    assert sum(f.stat().st_size for f in folder.iterdir()) <= 5_000_000
    assert "MIT License" in (folder / "LICENSE").read_text(encoding="utf-8")


def test_bundled_images_do_not_repeat_between_splits():
    train_split, test_split = (sources.open_source(MINI, split) for split in ("train", "test"))
    train_images = {train_split[i]["image"] for i in range(len(train_split))}
    assert len(train_images) == len(train_split)
    assert not train_images & {test_split[i]["image"] for i in range(len(test_split))}


def test_record_ids_name_shard_and_position_also_in_slices():
    whole = sources.open_source(MINI, "train")
    part = sources.open_source(MINI, "train[50%:]+test[-2:]")
    assert len(part) == 3002
    assert part[0] == whole[3000] and part[2999] == whole[5999]
    assert whole[3000]["id"] == "fashion_mnist_mini-train.array_record-00000-of-00001__3000"
    assert part[3001] == sources.open_source(MINI, "test")[1499]
    with pytest.raises(IndexError):
        part[3002]
    assert sum(1 for _ in sources.open_source(MINI, "test[:7]")) == 7


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


# Names and splits.


@pytest.mark.parametrize(
    ("name", "split", "words"),
    [
        ("bundled/nothing", "train", ["bundled/nothing", MINI]),
        ("no_such_set", "train", ["no_such_set", "tfds build", "data_dir"]),
        ("no_such_set:1.0.0", "train", ["no_such_set:1.0.0", "tfds build"]),
        ("/no/such/folder", "train", ["/no/such/folder", "features.json", "folder:"]),
        ("folder:/no/such/folder", "train", ["folder:/no/such/folder", "no folder"]),
        (MINI, "validation", ["validation", "train, test", "train[:90%]"]),
        (MINI, "train[x]", ["train[x]"]),
        (MINI, "train[:0]", ["train[:0]", "no records"]),
    ],
)
def test_wrong_names_are_one_line_errors(name, split, words, tmp_path):
    with pytest.raises(UserError) as error:
        sources.open_source(name, split, data_dir=str(tmp_path))
    message = str(error.value)
    assert "\n" not in message and "config.data" in message
    assert all(word in message for word in words), message


def test_tfds_directory_and_name_in_data_dir_open(tmp_path):
    prepared = sources.BUNDLED / "fashion_mnist_mini"
    by_path = sources.open_source(str(prepared), "test")
    (tmp_path / "fashion_mnist_mini").mkdir()
    (tmp_path / "fashion_mnist_mini" / "1.0.0").symlink_to(prepared)
    for name in ("fashion_mnist_mini", "fashion_mnist_mini:1.0.0"):
        by_name = sources.open_source(name, "test", data_dir=str(tmp_path))
        assert len(by_name) == 1500 and by_name[7] == by_path[7]


def test_sources_pickle(flat_folder):
    for name in (MINI, f"folder:{flat_folder}"):
        source = sources.open_source(name, "train")
        copy = pickle.loads(pickle.dumps(source))
        assert len(copy) == len(source) and copy[5] == source[5]
        assert copy.class_names == source.class_names


def tfds_info_stub(tmp_path, features, file_format):
    """A TFDS directory with one train record, that no writer is needed for."""
    (tmp_path / "features.json").write_text(features)
    template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    (tmp_path / "dataset_info.json").write_text(
        f'{{"fileFormat": "{file_format}", "name": "stub", "version": "1.0.0", "splits": '
        f'[{{"name": "train", "shardLengths": ["1"], "filepathTemplate": "{template}"}}]}}'
    )
    assert tfds.builder_from_directory(tmp_path).info.splits["train"].num_examples == 1


def test_tfrecord_without_tensorflow_says_what_to_install(tmp_path, monkeypatch):
    features = (sources.BUNDLED / "fashion_mnist_mini" / "features.json").read_text()
    tfds_info_stub(tmp_path, features, "tfrecord")
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        sources.open_source(str(tmp_path), "train")
    assert "pip install esvit_jax[tf]" in str(error.value) and "tfrecord" in str(error.value)
    assert "\n" not in str(error.value)


def test_data_set_without_images_is_refused(tmp_path):
    features = (sources.BUNDLED / "fashion_mnist_mini" / "features.json").read_text()
    content = json.loads(features)
    del content["featuresDict"]["features"]["image"]
    tfds_info_stub(tmp_path, json.dumps(content), "array_record")
    with pytest.raises(UserError, match="no image feature; it has label"):
        sources.open_source(str(tmp_path), "train")


# Folders.


def test_flat_folder_has_no_labels_and_one_split(flat_folder):
    source = sources.open_source(f"folder:{flat_folder}", "train")
    assert len(source) == 20 and source.num_classes == 0
    assert {source[i]["label"] for i in range(20)} == {-1}
    assert sorted(source[i]["id"] for i in range(20)) == [f"{i:02}.png" for i in range(20)]
    with pytest.raises(UserError, match=r"no split 'test'; it has train.*train\[:90%\]"):
        sources.open_source(f"folder:{flat_folder}", "test")


def test_label_folders_and_split_folders(tmp_path):
    labels = {"bird": 2, "cat": 3}
    for split, of_split in (("", labels), ("train", labels), ("test", {"ant": 1} | labels)):
        for label, count in of_split.items():
            for i in range(count):
                root = tmp_path / ("with_splits" if split else "labels")
                write_image(root / split / label / f"{i}.PNG", i)
    (tmp_path / "labels" / "bird" / "notes.txt").write_text("no image")
    (tmp_path / "labels" / "bird" / "._0.png").write_bytes(b"left by another system")

    source = sources.open_source(f"folder:{tmp_path}/labels", "train")
    assert source.class_names == ("bird", "cat")
    assert sorted((source[i]["id"], source[i]["label"]) for i in range(len(source))) == [
        ("bird/0.PNG", 0),
        ("bird/1.PNG", 0),
        ("cat/0.PNG", 1),
        ("cat/1.PNG", 1),
        ("cat/2.PNG", 1),
    ]
    train_split = sources.open_source(f"folder:{tmp_path}/with_splits", "train")
    test_split = sources.open_source(f"folder:{tmp_path}/with_splits", "test")
    # A class has one label in all splits, also where a split lacks a class.
    assert train_split.class_names == test_split.class_names == ("ant", "bird", "cat")
    assert sorted(train_split[i]["label"] for i in range(5)) == [1, 1, 2, 2, 2]
    assert sorted(test_split[i]["label"] for i in range(6)) == [0, 1, 1, 2, 2, 2]
    assert test_split[0]["id"].startswith("test/")
    with pytest.raises(UserError, match="no split 'validation'; it has test, train"):
        sources.open_source(f"folder:{tmp_path}/with_splits", "validation")


def test_split_folders_without_labels(tmp_path):
    write_image(tmp_path / "train" / "a.png", 1)
    write_image(tmp_path / "test" / "b.png", 2)
    source = sources.open_source(f"folder:{tmp_path}", "test")
    assert (len(source), source[0]["id"], source[0]["label"]) == (1, "test/b.png", -1)


def test_folder_slices_part_the_images_and_new_files_move_none(flat_folder):
    def ids(split):
        source = sources.open_source(f"folder:{flat_folder}", split)
        return [source[i]["id"] for i in range(len(source))]

    whole = ids("train")
    assert whole != sorted(whole)  # a slice of sorted photos would be one evening, or one class
    assert ids("train[:75%]") == whole[:15] and ids("train[75%:]") == whole[15:]
    assert ids("train[-3:]") == whole[-3:]
    write_image(flat_folder / "new.png", 0)
    assert [name for name in ids("train") if name != "new.png"] == whole


def test_folders_that_cannot_be_read_are_refused(tmp_path, flat_folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no images.*label/image"):
        sources.open_source(f"folder:{tmp_path / 'empty'}", "train")
    write_image(flat_folder / "cat" / "a.png", 0)
    with pytest.raises(UserError, match="beside folders of images .cat."):
        sources.open_source(f"folder:{flat_folder}", "train")


# Decoding.


def test_small_images_are_not_scaled():
    image = noise(0, 5, 7, 3)
    canvas, size = loader.decode(encoded(image), 8)
    assert canvas.dtype == np.uint8 and size.dtype == np.int32
    assert size.tolist() == [5, 7]
    np.testing.assert_array_equal(canvas[:5, :7], image)
    assert not canvas[5:].any() and not canvas[:, 7:].any()


def test_scaling_by_a_whole_factor_is_the_mean_of_blocks():
    image = noise(1, 24, 48, 3)
    canvas, size = loader.decode(image, 16)
    assert size.tolist() == [8, 16]
    blocks = image.reshape(8, 3, 16, 3, 3).mean((1, 3))
    assert np.abs(canvas[:8].astype(float) - blocks).max() <= 0.5 + 1e-6
    assert not canvas[8:].any()


@pytest.mark.parametrize(("height", "width"), [(100, 75), (61, 200), (33, 32), (300, 1)])
def test_scaling_is_the_mean_over_areas(height, width):
    image = noise(2, height, width, 3)
    canvas, size = loader.decode(image, 32)
    scale = 32 / max(height, width)
    assert size.tolist() == [max(1, round(height * scale)), max(1, round(width * scale))]
    expected = area_mean(image, size)
    assert np.abs(canvas[: size[0], : size[1]] - expected).max() <= 1.0


def test_scaling_agrees_with_pillow_reduce():
    image = noise(3, 96, 64, 3)
    halved, size = loader.decode(encoded(image), 48)
    assert size.tolist() == [48, 32]
    reduced = np.asarray(Image.fromarray(image).reduce(2))
    assert np.abs(halved[:48, :32].astype(int) - reduced).max() <= 1


def area_mean(image, size):
    """Mean over each output pixel's area, by weights of overlap: [h, w, 3] → [*size, 3]."""

    def weights(new, old):
        edges = np.linspace(0, old, new + 1)
        low, high = edges[:-1, None], edges[1:, None]
        pixel = np.arange(old)[None]
        overlap = np.clip(np.minimum(high, pixel + 1) - np.maximum(low, pixel), 0, None)
        return overlap / overlap.sum(1, keepdims=True)

    rows, columns = weights(size[0], image.shape[0]), weights(size[1], image.shape[1])
    return np.einsum("yh,hwc,xw->yxc", rows, image.astype(float), columns)


def test_kinds_of_images_become_rgb():
    grey, rgba = noise(3, 6, 8), noise(4, 6, 8, 4)
    sixteen = np.random.default_rng(5).integers(0, 65536, (6, 8), dtype=np.uint16)
    palette = Image.fromarray(rgba[..., :3]).quantize(16)
    expected = {
        "grey png": (encoded(grey), grey[..., None].repeat(3, 2)),
        "grey array": (grey, grey[..., None].repeat(3, 2)),
        "grey array with a channel": (grey[..., None], grey[..., None].repeat(3, 2)),
        "alpha is dropped": (encoded(rgba), rgba[..., :3]),
        "alpha array": (rgba, rgba[..., :3]),
        "palette": (encoded(palette), np.asarray(palette.convert("RGB"))),
        "16 bit png": (encoded(sixteen), (sixteen >> 8).astype(np.uint8)[..., None].repeat(3, 2)),
        "16 bit array": (sixteen, (sixteen >> 8).astype(np.uint8)[..., None].repeat(3, 2)),
        "webp": (encoded(rgba[..., :3], "WEBP", lossless=True), rgba[..., :3]),
    }
    for kind, (image, rgb) in expected.items():
        canvas, size = loader.decode(image, 8)
        assert size.tolist() == [6, 8], kind
        np.testing.assert_array_equal(canvas[:6], rgb, err_msg=kind)


def test_jpeg_agrees_with_pillow():
    smooth = Image.fromarray(noise(6, 5, 6, 3)).resize((48, 40), Image.Resampling.BICUBIC)
    data = encoded(smooth, "JPEG", quality=90)
    canvas, _ = loader.decode(data, 48)
    reading = np.asarray(Image.open(io.BytesIO(data)))
    assert np.abs(canvas[:40].astype(int) - reading).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    image = Image.fromarray(noise(7, 3, 4, 3)).resize((32, 24), Image.Resampling.NEAREST)
    exif = image.getexif()
    exif[0x0112] = orientation
    data = encoded(image, "PNG", exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    canvas, size = loader.decode(data, 32)
    assert tuple(size) == upright.shape[:2]
    np.testing.assert_array_equal(canvas[: size[0], : size[1]], upright)


def test_what_is_no_image_is_refused():
    whole = encoded(noise(8, 40, 40, 3), "JPEG")
    for image in (b"", b"text", whole[: len(whole) // 2], encoded(noise(8, 40, 40))[:-30]):
        with pytest.raises(loader.DecodeError):
            loader.decode(image, 8)
    for array in (np.zeros((4, 4, 2), np.uint8), np.zeros((4, 4)), np.zeros((0, 4), np.uint8)):
        with pytest.raises(loader.DecodeError):
            loader.decode(array, 8)


# The order of training.


def test_order_depends_on_the_seed_alone(flat_folder):
    source = sources.open_source(f"folder:{flat_folder}", "train")
    first = values(train(source, 10))
    np.testing.assert_array_equal(first, values(train(source, 10, num_threads=1)))
    assert (first != values(train(source, 10, seed=1))).any()


def test_order_is_that_of_grain(flat_folder):
    source = sources.open_source(f"folder:{flat_folder}", "train")
    grey = [10 + int(source[i]["id"][:2]) for i in range(20)]
    order = grain.MapDataset.source(grey).seed(3).shuffle().repeat()
    assert values(train(source, 10, seed=3)).tolist() == [order[k] for k in range(80)]


def test_every_epoch_is_another_permutation(flat_folder):
    source = sources.open_source(f"folder:{flat_folder}", "train")
    epochs = values(train(source, 10)).reshape(4, 20)  # batches of 8 cross the epochs' ends
    for epoch in epochs:
        assert sorted(epoch) == list(range(10, 30))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert sorted(epochs[0]) != epochs[0].tolist()


def test_resume_continues_the_stream(flat_folder):
    source = sources.open_source(f"folder:{flat_folder}", "train")
    whole = train(source, 12)
    for start_step in (1, 7):
        resumed = train(source, 12 - start_step, start_step=start_step)
        for a, b in zip(whole[start_step:], resumed, strict=True):
            for key in ("canvas", "size", "label"):
                np.testing.assert_array_equal(a[key], b[key])


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_share_each_batch_in_order(flat_folder, process_count):
    source = sources.open_source(f"folder:{flat_folder}", "train")
    alone = train(source, 6, start_step=2)
    shares = [
        train(source, 6, start_step=2, process_index=p, process_count=process_count)
        for p in range(process_count)
    ]
    for t in range(6):
        together = np.concatenate([share[t]["canvas"] for share in shares])
        np.testing.assert_array_equal(together, alone[t]["canvas"])
    with pytest.raises(UserError, match="config.batch_size = 8 .* 3 processes"):
        train(source, 1, process_count=3)


def test_batch_larger_than_the_data_set(flat_folder):
    source = sources.open_source(f"folder:{flat_folder}", "train[:3]")
    (batch,) = train(source, 1)
    assert np.bincount(values([batch]), minlength=30).max() == 3  # 8 = 3 + 3 + 2
    one = sources.open_source(f"folder:{flat_folder}", "train[:1]")
    assert len(set(values(train(one, 2)))) == 1


def test_batch_shapes_and_labels():
    source = sources.open_source(MINI, "train[:40]")
    (batch,) = train(source, 1, canvas_size=32)
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
        "canvas": ((8, 32, 32, 3), "uint8"),
        "size": ((8, 2), "int32"),
        "label": ((8,), "int32"),
    }
    by_image = {}
    for i in range(40):
        canvas, _ = loader.decode(source[i]["image"], 32)
        by_image[canvas.tobytes()] = source[i]["label"]
    assert [by_image[canvas.tobytes()] for canvas in batch["canvas"]] == batch["label"].tolist()
    assert (batch["size"] == 28).all()


# Bad records.


@pytest.fixture
def bad_folder(flat_folder):
    """20 images of which two cannot be decoded."""
    (flat_folder / "04.png").write_bytes(b"")
    whole = (flat_folder / "13.png").read_bytes()
    (flat_folder / "13.png").write_bytes(whole[: len(whole) - 20])
    return flat_folder


def test_bad_records_are_replaced_by_the_next_named_once_and_counted(bad_folder, log_lines):
    source = sources.open_source(f"folder:{bad_folder}", "train")
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
        assert sum(f"{name} cannot be decoded" in line for line in log_lines) == 2


def test_too_many_bad_records_stop_the_run(bad_folder):
    source = sources.open_source(f"folder:{bad_folder}", "train")
    with pytest.raises(UserError) as error:
        train(source, 10, max_bad_records=1)
    message = str(error.value)
    assert "config.data.max_bad_records = 1" in message and "2 of the 20" in message
    assert "04.png" in message and "13.png" in message and "\n" not in message


def test_nothing_but_bad_records_stops_the_run(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(b"no image")
    source = sources.open_source(f"folder:{tmp_path}", "train")
    with pytest.raises(UserError, match="3 of the 3 records"):
        train(source, 1, max_bad_records=100)


@pytest.mark.slow
def test_worker_processes_give_the_same_batches_and_count_bad_records(bad_folder, log_lines):
    source = sources.open_source(f"folder:{bad_folder}", "train")
    alone = train(source, 8, start_step=1, max_bad_records=2)
    log_lines.clear()
    workers = train(source, 8, start_step=1, max_bad_records=2, num_workers=2)
    for a, b in zip(alone, workers, strict=True):
        for key in ("canvas", "size", "label"):
            assert type(b[key]) is np.ndarray
            np.testing.assert_array_equal(a[key], b[key])
    assert sum("cannot be decoded" in line for line in log_lines) == 2
    with pytest.raises(UserError, match="config.data.max_bad_records = 1"):
        train(source, 8, max_bad_records=1, num_workers=1)


# Evaluation.


@pytest.mark.parametrize("process_count", [1, 2])
def test_eval_reads_every_record_once_in_order(bad_folder, log_lines, process_count):
    source = sources.open_source(f"folder:{bad_folder}", "train")
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
    assert sum("cannot be decoded" in line for line in log_lines) == 2


def test_eval_labels_and_shares():
    source = sources.open_source(MINI, "test[:20]")
    batches = list(loader.eval_batches(source, batch_size=20, canvas_size=28, num_threads=1))
    assert len(batches) == 1 and batches[0]["mask"].all()
    assert batches[0]["label"].tolist() == [source[i]["label"] for i in range(20)]
    with pytest.raises(UserError, match="config.evaluate.batch_size = 8"):
        loader.eval_batches(source, batch_size=8, canvas_size=8, num_threads=1, process_count=3)


# TFRecord files.


@pytest.fixture(scope="module")
def tfrecord_directory(tmp_path_factory):
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


def test_tfrecord_trains_shuffled_and_shared(tfrecord_directory, log_lines):
    source = sources.open_source(str(tfrecord_directory), "train")
    assert isinstance(source, sources.TFRecordSource)
    assert (len(source), source.num_classes) == (21, 2)
    batches = train(source, 10, max_bad_records=1)
    grey = values(batches)
    assert sorted(grey[:20]) == list(range(20)) and grey[:20].tolist() != list(range(20))
    assert (grey % 2 == np.concatenate([batch["label"] for batch in batches])).all()
    assert any("TFRecord" in line and "resumed run shuffles anew" in line for line in log_lines)
    np.testing.assert_array_equal(grey, values(train(source, 10, max_bad_records=1)))
    resumed = values(train(source, 5, start_step=5, max_bad_records=1))
    assert (resumed != grey[40:]).any()

    shares = [
        values(train(source, 5, process_index=p, process_count=2, max_bad_records=1))
        for p in range(2)
    ]
    assert not set(shares[0]) & set(shares[1])
    assert set(shares[0]) | set(shares[1]) == set(range(20))
    with pytest.raises(UserError, match="config.data.max_bad_records = 0"):
        train(source, 10)


def test_tfrecord_evaluates_in_order(tfrecord_directory):
    source = sources.open_source(str(tfrecord_directory), "train")
    batches = list(loader.eval_batches(source, batch_size=8, canvas_size=8, num_threads=2))
    assert (
        np.concatenate([batch["mask"] for batch in batches]).tolist() == [True] * 20 + [False] * 4
    )
    assert values(batches)[:20].tolist() == list(range(20))
    assert batches[0]["id"][3].endswith("-00000-of-00001__3")
