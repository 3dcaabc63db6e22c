"""What each pixel of an image is: masks and depths that TFDS data sets have beside their images."""

from typing import Any

import cv2
import numpy as np
import tensorflow_datasets as tfds

from esvit_jax.data.sources import IndexedSource, TfdsRecords, open_source, tfds_builder
from esvit_jax.errors import UserError


class DenseTargets:
    """The images of a split, and by their ids a number for each of their pixels.

    Args:
      name, split, data_dir: see `open_source`.
      key: of the feature: an image of one channel (masks), or an array [h, w] or [h, w, 1].

    Raises:
      UserError: see `open_source`; there is no such feature, it is something else, or the records
        are not in array_record files.
    """

    def __init__(self, name: str, split: str, data_dir: str | None, key: str):
        source = open_source(name, split, data_dir)
        records = source.records if isinstance(source, IndexedSource) else None
        if not isinstance(source, IndexedSource) or not isinstance(records, TfdsRecords):
            raise UserError(
                "masks and depths are read from TFDS data sets in array_record files",
                argument="name", value=name,
            )  # fmt: skip
        features = dict(tfds_builder(name, data_dir).info.features.items())
        feature = features.get(key)
        if not isinstance(feature, tfds.features.Image | tfds.features.Tensor):
            raise UserError(
                f"{name} has no mask or depth of that name; it has {', '.join(features)}",
                argument="key", value=key,
            )  # fmt: skip
        self.source, self._key, self._raw = source, key, records.raw
        self._features = tfds.features.FeaturesDict({key: feature})
        self._index = {records.id(i): i for i in range(len(records))}

    def read(self, name: str) -> np.ndarray:
        """Numbers [h, w] of the image of an id.

        Raises:
          UserError: they are no such array.
        """
        example: Any = self._features.deserialize_example_np(
            self._raw[self._index[name]], decoders={self._key: tfds.decode.SkipDecoding()}
        )
        value = example[self._key]
        if isinstance(value, bytes):
            value = cv2.imdecode(np.frombuffer(value, np.uint8), cv2.IMREAD_UNCHANGED)
        if value is None or value.ndim not in (2, 3) or value.shape[2:] not in ((), (1,)):
            shape = "no image" if value is None else list(value.shape)
            raise UserError(
                f"{self.source.name} {name}: {self._key} is {shape}, not one number a pixel"
            )
        return value.reshape(value.shape[:2])


def center_of(target: np.ndarray, view_size: int, crop: float) -> np.ndarray:
    """Numbers [view_size, view_size] of the pixels that `augment.center_view` shows.

    Each is that of the nearest pixel; none is a mean of several, which would be no class.

    Args:
      target: numbers [h, w] of the whole image, at any scale.
      view_size, crop: see `center_view`.
    """
    shorter = round(view_size / crop)
    shape = np.array(target.shape)
    resized = shorter * shape // shape.min()
    first = np.round((resized - view_size) / 2)
    rows, columns = (
        np.clip((first[i] + np.arange(view_size) + 0.5) * shape[i] / resized[i], 0, shape[i] - 1)
        for i in range(2)
    )
    return target[rows.astype(int)][:, columns.astype(int)]
