"""Data sets whose images have several classes each, such as PASCAL VOC."""

from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from esvit_jax.data.sources import IndexedSource, TfdsRecords, open_source, tfds_builder
from esvit_jax.errors import UserError


class MultilabelSource(NamedTuple):
    """A split with the classes of each image.

    Attributes:
      source: of the images, whose own labels are -1.
      class_names: as TFDS has them.
      targets: {id of the record: int32[classes] of 1 (is), 0 (is not), -1 (does not count)}.
    """

    source: IndexedSource
    class_names: tuple[str, ...]
    targets: dict[str, np.ndarray]


def open_multilabel(
    name: str,
    split: str,
    data_dir: str | None = None,
    *,
    certain: str = "labels_no_difficult",
    possible: str = "labels",
) -> MultilabelSource:
    """Opens a split and reads the classes of all its records; no image is decoded.

    Args:
      name, split, data_dir: see `open_source`.
      certain: feature with the classes that count.
      possible: feature with those, and with classes that do not count: VOC's "difficult" objects.

    Raises:
      UserError: see `open_source`; there are no such features, or the records are TFRecord files.
    """
    source = open_source(name, split, data_dir)
    records = source.records if isinstance(source, IndexedSource) else None
    if not isinstance(source, IndexedSource) or not isinstance(records, TfdsRecords):
        raise UserError(
            "several classes an image are read from array_record files only; prepare it again "
            "with `tfds build --file_format=array_record`",
            argument="name", value=name,
        )  # fmt: skip
    features = tfds_builder(name, data_dir).info.features
    missing = [key for key in (certain, possible) if key not in features]
    if missing:
        raise UserError(
            f"it has no feature {missing[0]}; it has {', '.join(features)}",
            argument="name", value=name,
        )  # fmt: skip
    class_names = tuple(features[possible].feature.names)
    wanted = tfds.features.FeaturesDict({key: features[key] for key in (certain, possible)})
    targets = {}
    for index in range(len(source)):
        example: Any = wanted.deserialize_example_np(records.raw[index])
        row = np.zeros(len(class_names), np.int32)
        row[example[possible]] = -1
        row[example[certain]] = 1
        targets[records.id(index)] = row
    return MultilabelSource(source, class_names, targets)
