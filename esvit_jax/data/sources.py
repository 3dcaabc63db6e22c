"""Where images come from: TFDS data sets and folders as records, encoded as they were stored.

`open_source` gives a `Source`: an `IndexedSource` (random access) or, for TFRecord files, a
`TFRecordSource` (stream). Nothing here decodes an image; `loader.py` does, once.
"""

import bisect
import dataclasses
import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypedDict, runtime_checkable

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from google.protobuf import json_format, message
from tensorflow_datasets.core import constants, read_only_builder

from esvit_jax import buckets
from esvit_jax.data.folders import printable, read_folder
from esvit_jax.errors import UserError

BUNDLED = Path(__file__).parent / "bundled"
# Records of a TFRecord stream that are shuffled among each other, still encoded.
SHUFFLE_BUFFER = 8192
_Builder = Any  # tfds.core.DatasetBuilder, whose own annotations do not fit its methods


class Record(TypedDict):
    """One image as stored: `image` JPEG, PNG, … bytes or an array, `label` (-1 = none), `id`."""

    image: bytes | np.ndarray
    label: int
    id: str


@runtime_checkable
class _Records(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


@runtime_checkable
class _OnDisk(Protocol):
    def facts(self) -> object:
        """What changes where the records do, without reading them; JSON holds it."""
        ...


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
class IndexedSource(_Split):
    """Records with random access: `source[i]` for 0 ≤ i < len(source). Pickles.

    Ids are unique: TFDS's `shard__index`, or the path of a file below its folder, `printable`.
    """

    records: _Records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return self.records[index]

    def fingerprint(self) -> str:
        """Another one where the records are others; of image files, by their sizes and times."""
        facts = self.records.facts() if isinstance(self.records, _OnDisk) else len(self)
        return _digest([self.name, self.split, self.class_names, facts])


@dataclasses.dataclass(frozen=True)
class TFRecordSource(_Split):
    """Records of TFRecord files: no random access, read in order or as a shuffled stream."""

    length: int  # records in the split
    builder: _Builder
    image_key: str
    label_key: str | None

    def __len__(self) -> int:
        return self.length

    def fingerprint(self) -> str:
        """Another one where the records are others."""
        return _digest([self.name, self.split, self.class_names, self.length])

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
        logging.warning(
            "%s is stored as TFRecord: records are shuffled within %d, not over the whole set, and "
            "the order depends on the number of processes. A resumed run shuffles anew from its "
            "step: some images come twice before others come again. array_record is exact.",
            self.name,
            SHUFFLE_BUFFER,
        )
        if self.length < process_count:
            raise UserError(
                f"{self.name} {self.split} has {self.length} records, fewer than the processes "
                "that share them",
                argument="process_count",
                value=process_count,
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


Source = IndexedSource | TFRecordSource


@dataclasses.dataclass(frozen=True)
class TfdsRecords:
    """Records of array_record (or Parquet) files; reads neither TensorFlow nor other features.

    A record that cannot be read, as its file was cut off since, has no bytes, so decoding names it.
    """

    raw: Sequence[Any]  # bytes-like
    features: tfds.features.FeaturesDict  # of the image and the label, so no other is parsed
    image_key: str
    label_key: str | None
    shards: tuple[tuple[str, int], ...]  # (file name, first record taken from it)
    starts: tuple[int, ...]  # index of that record here

    def __len__(self) -> int:
        return len(self.raw)

    def id(self, index: int) -> str:
        shard = bisect.bisect_right(self.starts, index) - 1
        filename, first = self.shards[shard]
        return f"{filename}__{first + index - self.starts[shard]}"

    def __getitem__(self, index: int) -> Record:
        try:
            example: Any = self.features.deserialize_example_np(
                self.raw[index], decoders={self.image_key: tfds.decode.SkipDecoding()}
            )
            label = int(example[self.label_key]) if self.label_key else -1
            image = example[self.image_key]
        except (TypeError, ValueError, RuntimeError, OSError, message.Error):
            image, label = None, -1
        return {"image": b"" if image is None else image, "label": label, "id": self.id(index)}

    def facts(self) -> object:
        return [len(self), self.shards, self.starts, self.image_key, self.label_key]


@dataclasses.dataclass(frozen=True)
class _FolderRecords:
    """Image files, read whole; a file that cannot be read has no bytes, so decoding names it."""

    folder: str
    files: tuple[str, ...]  # below the folder
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Record:
        try:
            image = Path(self.folder, self.files[index]).read_bytes()
        except OSError:
            image = b""
        return {"image": image, "label": self.labels[index], "id": printable(self.files[index])}

    def facts(self) -> object:
        def of_file(file: str) -> tuple[str, int, int]:
            try:
                status = os.stat(os.path.join(self.folder, file))
            except OSError:
                return printable(file), -1, -1
            return printable(file), status.st_size, status.st_mtime_ns

        return [[of_file(file) for file in self.files], self.labels]


def _digest(facts: object) -> str:
    return hashlib.sha1(json.dumps(facts).encode()).hexdigest()


def open_source(name: str, split: str, data_dir: str | None = None) -> Source:
    """Opens one split of a data set by `config.data.name`.

    Args:
      name: one of
        `bundled/NAME`, a data set inside this package;
        `folder:PATH`, images as PATH/split/label/image, PATH/split/image, PATH/label/image or
        PATH/image, or nested otherwise (see `folders.read_folder`): without split folders
        everything is the split "train", in a fixed shuffled order, so that slices are fair
        samples;
        a directory (local or gs://) that holds a prepared TFDS data set (features.json);
        a TFDS name, `name`, `name/config` or `name:version`, already prepared in `data_dir`.
      split: a split or a slice or sum of splits, as in TFDS: "train", "train[:90%]", "test[-500:]".
      data_dir: where TFDS data sets lie; None or "" is TFDS's own default.

    Raises:
      UserError: of `name`: nothing there, no image feature, or TFRecord files and no TensorFlow;
        of `split`: no such split, or a slice that selects nothing; of `data_dir`: not there.
    """
    if name.startswith("folder:"):
        return _open_folder(name, split)
    place = name if buckets.is_remote(name) else data_dir or ""
    if buckets.is_remote(place):
        try:
            buckets.make_ready()
        except UserError as error:
            raise _name_error(name, error.message) from error
    with buckets.reaching(place), buckets.waiting(place):
        return _open_tfds(name, split, tfds_builder(name, data_dir))


def _open_tfds(name: str, split: str, builder: _Builder) -> Source:
    info = builder.info
    image_key, label_key = _find_features(name, info.features)
    length = sum(stop - start for _, start, stop in _slices(name, split, info.splits))
    label = info.features[label_key] if label_key else None
    class_names = tuple(label.names) if label and label.num_classes else ()
    formats = {file_format.value for file_format in info.available_file_formats()}
    if not formats & {"array_record", "parquet"}:
        if importlib.util.find_spec("tensorflow") is None:
            raise _name_error(
                name,
                f"it is stored as {'/'.join(formats)}, which needs TensorFlow: pip install "
                "esvit_jax[tf], or prepare it again with `tfds build --file_format=array_record`",
            )
        return TFRecordSource(name, split, class_names, length, builder, image_key, label_key)

    raw = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
    if len(raw) != length:  # TFDS reads Parquet files whole, whatever the slice
        raise UserError(
            f"of the {'/'.join(formats)} files of {name} only whole splits can be read; "
            "parts need array_record files",
            argument="split",
            value=split,
        )
    files = info.splits[split].file_instructions
    for file in files:
        if "://" not in file.filename and not Path(file.filename).exists():
            raise _name_error(name, f"it is no whole TFDS data set: {file.filename} is missing")
    keys = [key for key in (image_key, label_key) if key]
    records = TfdsRecords(
        raw=raw,
        features=tfds.features.FeaturesDict({key: info.features[key] for key in keys}),
        image_key=image_key,
        label_key=label_key,
        shards=tuple((Path(file.filename).name, file.skip) for file in files),
        starts=tuple(np.cumsum([0] + [file.take for file in files])[:-1].tolist()),
    )
    return IndexedSource(name, split, class_names, records)


def tfds_builder(name: str, data_dir: str | None) -> _Builder:
    """What TFDS knows of a data set that is no folder; see `open_source`."""
    if name.startswith("bundled/"):
        directory = BUNDLED / name.removeprefix("bundled/")
        if not (directory / "features.json").is_file():
            there = sorted(f"bundled/{p.parent.name}" for p in BUNDLED.glob("*/features.json"))
            raise _name_error(name, f"there is only {', '.join(there)}")
        return tfds.builder_from_directory(directory)

    try:
        directory = tfds.core.Path(name).expanduser()
        if (directory / "features.json").exists():
            return tfds.builder_from_directory(directory)
        is_directory = directory.is_dir()
    except ImportError as error:
        raise _name_error(name, f"it cannot be read here: {error}") from error
    except (OSError, ValueError, KeyError, json_format.Error) as error:
        raise _name_error(name, f"it is no whole TFDS data set: {_one_line(error)}") from error
    if name.startswith(("/", ".", "~")) or "://" in name:
        raise _name_error(
            name,
            "it holds no features.json, so it is no prepared TFDS data set (…/name/version); a "
            f"folder of images is written folder:{name}"
            if is_directory
            else "there is no such directory",
        )
    if data_dir and not tfds.core.Path(data_dir).expanduser().is_dir():
        raise UserError("there is no such directory", argument="data_dir", value=data_dir)
    try:
        return read_only_builder.builder_from_files(name, data_dir=data_dir or None)
    except ValueError as error:  # not found, or not a TFDS name at all
        raise _name_error(
            name,
            f"it is not prepared in {data_dir or constants.DATA_DIR}; prepare it with "
            f"`tfds build {name} --file_format=array_record`, or set data_dir to where it is"
            + (f"; a folder of images is written folder:{name}" if is_directory else ""),
        ) from error


def _name_error(name: str, message: str) -> UserError:
    return UserError(message, argument="name", value=name)


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _find_features(name: str, features: tfds.features.FeaturesDict) -> tuple[str, str | None]:
    """Keys of the image and the label; "image" and "label" win, else the first of their type."""

    def find(kind: type, preferred: str) -> str | None:
        keys = [key for key, feature in features.items() if type(feature) is kind]
        return preferred if preferred in keys else next(iter(keys), None)

    image_key = find(tfds.features.Image, "image")
    if image_key is None:
        raise _name_error(name, f"it has no image feature; it has {', '.join(features)}")
    if features[image_key].np_dtype not in (np.uint8, np.uint16):
        raise _name_error(
            name,
            f"its images are {features[image_key].np_dtype}; uint8 and uint16 can be read",
        )
    return image_key, find(tfds.features.ClassLabel, "label")


def _slices(name: str, split: str, splits: tfds.core.SplitDict) -> list[tuple[str, int, int]]:
    """What a split spec selects: (split, start, stop) in order.

    Raises:
      UserError: an unknown split, a spec that cannot be read, or nothing selected.
    """
    sizes = {key: info.num_examples for key, info in splits.items()}
    try:
        parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(splits)
        bounds = [slice(p.from_, p.to).indices(sizes[p.splitname]) for p in parts]
    except (ValueError, AssertionError, NotImplementedError, AttributeError, TypeError) as error:
        known = ", ".join(
            f"{key} ({size} record{'s' * (size != 1)})" for key, size in sizes.items()
        )
        raise UserError(
            f"{name} has no such split or slice; it has {known}; a slice is train[:90%], say",
            argument="split",
            value=split,
        ) from error
    for part, (start, stop, _) in zip(parts, bounds, strict=True):
        if stop <= start:
            raise UserError(
                f"of the {sizes[part.splitname]} records of {part.splitname} in {name}, a slice "
                f"selects none: it goes from {start} to {stop}",
                argument="split",
                value=split,
            )
    return [(p.splitname, start, stop) for p, (start, stop, _) in zip(parts, bounds, strict=True)]


def _open_folder(name: str, split: str) -> IndexedSource:
    folder = name.removeprefix("folder:")
    try:
        images = read_folder(folder, split)
    except UserError as error:
        raise _name_error(name, error.message) from error
    infos = [
        tfds.core.SplitInfo(name=key, shard_lengths=[len(files)], num_bytes=0)
        for key, files in images.items()
    ]
    slices = _slices(name, split, tfds.core.SplitDict(infos))
    files = [file for key, start, stop in slices for file in images[key][start:stop]]
    # Of all splits, so that a class has the same label in each of them.
    labels = {file.label for of_split in images.values() for file in of_split}
    class_names = sorted(label for label in labels if label is not None)
    class_ids = {class_name: label for label, class_name in enumerate(class_names)}
    records = _FolderRecords(
        folder=os.path.expanduser(folder),
        files=tuple(file.path for file in files),
        labels=tuple(-1 if file.label is None else class_ids[file.label] for file in files),
    )
    return IndexedSource(name, split, tuple(map(printable, class_names)), records)
