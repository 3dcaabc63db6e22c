"""Where images come from: TFDS data sets and folders as records, encoded as they were stored.

`open_source` gives a `Source` (random access) or, for TFRecord files, a `TFRecordSource` (stream).
Nothing here decodes an image; `loader.py` does, once.
"""

import bisect
import dataclasses
import hashlib
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypedDict, runtime_checkable

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from tensorflow_datasets.core import read_only_builder

from esvit_jax.errors import UserError

BUNDLED = Path(__file__).parent / "bundled"
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
# Folders of these names hold splits even where they hold images directly (no labels).
SPLIT_FOLDERS = {"train", "training", "val", "valid", "validation", "test", "testing"}
# Records of a TFRecord stream that are shuffled among each other, still encoded.
SHUFFLE_BUFFER = 8192


class Record(TypedDict):
    """One image as stored: `image` JPEG, PNG, … bytes or an array, `label` (-1 = none), `id`."""

    image: bytes | np.ndarray
    label: int
    id: str


@runtime_checkable
class _Records(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


@dataclasses.dataclass(frozen=True)
class _Split:
    name: str  # as in config.data.name
    split: str  # a TFDS split spec
    class_names: tuple[str, ...]  # empty without labels

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 without labels."""
        return len(self.class_names)


@dataclasses.dataclass(frozen=True)
class Source(_Split):
    """Records with random access: `source[i]` for 0 ≤ i < len(source). Pickles.

    Ids are unique: TFDS's `shard__index`, or the path of a file below its folder.
    """

    records: _Records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return self.records[index]


@dataclasses.dataclass(frozen=True)
class TFRecordSource(_Split):
    """Records of TFRecord files: no random access, read in order or as a shuffled stream."""

    length: int  # records in the split
    builder: Any  # tfds.core.DatasetBuilder
    image_key: str
    label_key: str | None

    def __len__(self) -> int:
        return self.length

    def in_order(self) -> Iterator[Record]:
        """Every record once, in the order of the files."""
        return self._records(self.split, shuffle_seed=None)

    def shuffled(
        self, seed: int, *, start_step: int, process_index: int, process_count: int
    ) -> Iterator[Record]:
        """This process's share of the records, shuffled in a buffer, again and again without end.

        The order depends on the seed, on `start_step` (so that a resumed run does not begin with
        what the interrupted one began with) and on the number of processes.
        """
        logging.info(
            "%s is stored as TFRecord: records are shuffled within %d, not over the whole set, and "
            "the order depends on the number of processes. A resumed run shuffles anew from its "
            "step: some images come twice before others come again. array_record is exact.",
            self.name,
            SHUFFLE_BUFFER,
        )
        if self.length < process_count:
            raise UserError(
                f"config.data: {self.name} {self.split} has {self.length} records, fewer than the "
                f"{process_count} processes that share them"
            )
        share = tfds.even_splits(self.split, process_count)[process_index]
        entropy = np.random.SeedSequence((seed, start_step))
        return self._records(share, shuffle_seed=int(entropy.generate_state(1)[0] >> 1))

    def _records(self, split: Any, *, shuffle_seed: int | None) -> Iterator[Record]:
        import tensorflow as tf

        # The accelerators are JAX's; TensorFlow would take their memory.
        tf.config.set_visible_devices([], "GPU")
        tf.config.set_visible_devices([], "TPU")
        shuffle = shuffle_seed is not None
        keys = {key: True for key in (self.image_key, self.label_key) if key}
        dataset = self.builder.as_dataset(
            split,
            shuffle_files=shuffle,
            decoders=tfds.decode.PartialDecoding(
                keys, decoders={self.image_key: tfds.decode.SkipDecoding()}
            ),
            read_config=tfds.ReadConfig(
                add_tfds_id=True,
                try_autocache=False,
                shuffle_seed=shuffle_seed,
                interleave_cycle_length=16 if shuffle else 1,
                enable_ordering_guard=False,  # ordered data sets are shuffled too
            ),
        )
        if shuffle:
            dataset = dataset.shuffle(SHUFFLE_BUFFER, shuffle_seed).repeat()
        for example in dataset.prefetch(tf.data.AUTOTUNE).as_numpy_iterator():
            yield {
                "image": example[self.image_key],
                "label": int(example[self.label_key]) if self.label_key else -1,
                "id": example["tfds_id"].decode(),
            }


@dataclasses.dataclass(frozen=True)
class _TfdsRecords:
    """Records of array_record (or Parquet) files; reads neither TensorFlow nor other features."""

    raw: Sequence[Any]  # bytes-like
    features: tfds.features.FeaturesDict  # of the image and the label, so no other is parsed
    image_key: str
    label_key: str | None
    shards: tuple[tuple[str, int], ...]  # (file name, first record taken from it)
    starts: tuple[int, ...]  # index of that record here

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, index: int) -> Record:
        example: Any = self.features.deserialize_example_np(
            self.raw[index], decoders={self.image_key: tfds.decode.SkipDecoding()}
        )
        shard = bisect.bisect_right(self.starts, index) - 1
        filename, first = self.shards[shard]
        return {
            "image": example[self.image_key],
            "label": int(example[self.label_key]) if self.label_key else -1,
            "id": f"{filename}__{first + index - self.starts[shard]}",
        }


@dataclasses.dataclass(frozen=True)
class _FolderRecords:
    """Image files, read whole; a file that cannot be read has no bytes, so decoding names it."""

    root: Path
    files: tuple[str, ...]  # below root
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Record:
        try:
            image = (self.root / self.files[index]).read_bytes()
        except OSError:
            image = b""
        return {"image": image, "label": self.labels[index], "id": self.files[index]}


def open_source(name: str, split: str, data_dir: str | None = None) -> Source | TFRecordSource:
    """Opens one split of a data set by `config.data.name`.

    Args:
      name: one of
        `bundled/NAME`, a data set inside this package;
        `folder:PATH`, images as PATH/split/label/image, PATH/split/image, PATH/label/image or
        PATH/image: without split folders everything is the split "train", in a fixed shuffled
        order, so that slices are fair samples;
        a directory (local or gs://) that holds a prepared TFDS data set (features.json);
        a TFDS name, `name`, `name/config` or `name:version`, already prepared in `data_dir`.
      split: a split or a slice or sum of splits, as in TFDS: "train", "train[:90%]", "test[-500:]".
      data_dir: where TFDS data sets lie; None or "" is TFDS's own default.

    Raises:
      UserError: nothing there, no such split, an empty split, no image feature; or TFRecord files
        and no TensorFlow.
    """
    if name.startswith("folder:"):
        return _open_folder(name, split)
    return _open_tfds(name, split, _tfds_builder(name, data_dir))


def _open_tfds(name: str, split: str, builder: Any) -> Source | TFRecordSource:
    info = builder.info
    image_key, label_key = _find_features(name, info.features)
    length = sum(stop - start for _, start, stop in _slices(name, split, info.splits))
    label = info.features[label_key] if label_key else None
    class_names = tuple(label.names) if label and label.num_classes else ()
    formats = {file_format.value for file_format in info.available_file_formats()}
    if not formats & {"array_record", "parquet"}:
        if importlib.util.find_spec("tensorflow") is None:
            raise UserError(
                f"config.data.name: {name} is stored as {'/'.join(formats)}, which needs "
                "TensorFlow: pip install esvit_jax[tf], or prepare it again with "
                "`tfds build --file_format=array_record`"
            )
        return TFRecordSource(name, split, class_names, length, builder, image_key, label_key)

    raw = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
    if len(raw) != length:  # TFDS reads Parquet files whole, whatever the slice
        raise UserError(
            f"config.data: {split!r} of {name} needs array_record files; of its "
            f"{'/'.join(formats)} files only whole splits can be read"
        )
    files = info.splits[split].file_instructions
    keys = [key for key in (image_key, label_key) if key]
    records = _TfdsRecords(
        raw=raw,
        features=tfds.features.FeaturesDict({key: info.features[key] for key in keys}),
        image_key=image_key,
        label_key=label_key,
        shards=tuple((Path(file.filename).name, file.skip) for file in files),
        starts=tuple(np.cumsum([0] + [file.take for file in files])[:-1].tolist()),
    )
    return Source(name, split, class_names, records)


def _tfds_builder(name: str, data_dir: str | None) -> Any:
    if name.startswith("bundled/"):
        directory = BUNDLED / name.removeprefix("bundled/")
        if not (directory / "features.json").is_file():
            there = sorted(f"bundled/{p.parent.name}" for p in BUNDLED.glob("*/features.json"))
            raise UserError(f"config.data.name: {name}: there is only {', '.join(there)}")
        return tfds.builder_from_directory(directory)

    is_path = name.startswith(("/", ".", "~")) or "://" in name
    try:
        directory = tfds.core.Path(name).expanduser()
        if (directory / "features.json").exists():
            return tfds.builder_from_directory(directory)
    except ImportError as error:
        raise UserError(f"config.data.name: {name} cannot be read here: {error}") from error
    if is_path:
        raise UserError(
            f"config.data.name: {name} holds no features.json, so it is no prepared TFDS data set "
            "(…/name/version); a folder of images is written folder:PATH"
        )
    try:
        return read_only_builder.builder_from_files(name, data_dir=data_dir or None)
    except ValueError as error:  # not found, or not a TFDS name at all
        where = data_dir or "TFDS's own data_dir"
        raise UserError(
            f"config.data.name: {name} is not prepared in {where}; prepare it with "
            f"`tfds build {name} --file_format=array_record`, or set config.data.data_dir"
        ) from error


def _find_features(name: str, features: Any) -> tuple[str, str | None]:
    """Keys of the image and the label; "image" and "label" win, else the first of their type."""

    def find(kind: type, preferred: str) -> str | None:
        keys = [key for key, feature in features.items() if type(feature) is kind]
        return preferred if preferred in keys else next(iter(keys), None)

    image_key = find(tfds.features.Image, "image")
    if image_key is None:
        raise UserError(
            f"config.data.name: {name} has no image feature; it has {', '.join(features)}"
        )
    if features[image_key].np_dtype not in (np.uint8, np.uint16):
        raise UserError(
            f"config.data.name: images of {name} are {features[image_key].np_dtype}; "
            "uint8 and uint16 can be read"
        )
    return image_key, find(tfds.features.ClassLabel, "label")


def _slices(name: str, split: str, splits: tfds.core.SplitDict) -> list[tuple[str, int, int]]:
    """What a split spec selects: (split, start, stop) in order.

    Raises:
      UserError: an unknown split, a spec that cannot be read, or nothing selected.
    """
    try:
        parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(splits)
    except (ValueError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"config.data: {name} has no split {split!r}; it has {', '.join(splits)}, and slices "
            "such as train[:90%] work"
        ) from error
    bounds = [slice(p.from_, p.to).indices(splits[p.splitname].num_examples) for p in parts]
    slices = [(p.splitname, start, stop) for p, (start, stop, _) in zip(parts, bounds, strict=True)]
    if sum(stop - start for _, start, stop in slices) == 0:
        raise UserError(f"config.data: split {split!r} of {name} holds no records")
    return slices


def _open_folder(name: str, split: str) -> Source:
    root = Path(name.removeprefix("folder:")).expanduser()
    if not root.is_dir():
        raise UserError(f"config.data.name: {name}: there is no folder {root}")
    folders = _folders(root)
    has_splits = any(map(_folders, folders)) or (
        folders and all(folder.name in SPLIT_FOLDERS for folder in folders)
    )
    split_folders = {f.name: f for f in folders} if has_splits else {"train": root}
    images = {key: _images(folder) for key, folder in split_folders.items()}
    infos = [
        tfds.core.SplitInfo(name=key, shard_lengths=[len(files)], num_bytes=0)
        for key, files in images.items()
        if files
    ]
    if not infos:
        raise UserError(
            f"config.data.name: {name} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}) as "
            "split/label/image, label/image or image"
        )
    slices = _slices(name, split, tfds.core.SplitDict(infos))
    files = [file for key, start, stop in slices for file in images[key][start:stop]]
    # Of all splits, so that a class has the same label in each of them.
    labels = {file.label for of_split in images.values() for file in of_split if file.label}
    class_names = tuple(sorted(labels))
    class_ids = {class_name: label for label, class_name in enumerate(class_names)}
    records = _FolderRecords(
        root=root,
        files=tuple(file.path.relative_to(root).as_posix() for file in files),
        labels=tuple(class_ids[file.label] if file.label else -1 for file in files),
    )
    return Source(name, split, class_names, records)


class _File(NamedTuple):
    path: Path
    label: str | None


def _folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _images(folder: Path) -> list[_File]:
    """Images of a split, as label/image or without labels, in an order fixed by their names alone.

    Sorted by a hash of the path: a slice is a fair sample, and a new file moves no other.
    """

    def files(directory: Path, label: str | None) -> list[_File]:
        paths = [p for p in directory.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES]
        return [_File(p, label) for p in paths if not p.name.startswith(".")]

    flat = files(folder, None)
    labelled = [file for label in _folders(folder) for file in files(label, label.name)]
    if flat and labelled:
        raise UserError(
            f"config.data.name: folder:{folder} holds images ({flat[0].path.name}) beside folders "
            f"of images ({labelled[0].label}); give every image a label folder, or none"
        )

    def key(file: _File) -> bytes:
        return hashlib.sha1(file.path.relative_to(folder).as_posix().encode()).digest()

    return sorted(flat or labelled, key=key)
