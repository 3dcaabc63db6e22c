"""TFDS data sets for tests, written without TensorFlow."""

import json
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.proto import tf_example_pb2

from esvit_jax.data.sources import BUNDLED

Value = bytes | list[int] | list[float]


def write_set(
    directory: Path, features: tfds.features.FeaturesDict, splits: dict[str, list[dict[str, Value]]]
) -> None:
    """A data set whose records hold bytes, whole numbers or floats by the names of features."""
    directory.mkdir(parents=True)
    features.save_config(str(directory))
    info = json.loads((BUNDLED / "fashion_mnist_mini" / "dataset_info.json").read_text())
    info.pop("supervisedKeys", None)
    described = []
    for split, records in splits.items():
        file = directory / f"small-{split}.array_record-00000-of-00001"
        writer = ArrayRecordWriter(str(file), "group_size:1")
        for record in records:
            example: Any = getattr(tf_example_pb2, "Example")()  # noqa: B009
            for key, value in record.items():
                feature = example.features.feature[key]
                if isinstance(value, bytes):
                    feature.bytes_list.value.append(value)
                elif value and isinstance(value[0], float):
                    feature.float_list.value.extend(value)
                else:
                    feature.int64_list.value.extend(value)
            writer.write(example.SerializeToString())
        writer.close()
        described.append(
            {"name": split, "shardLengths": [str(len(records))],
             "numBytes": str(file.stat().st_size),
             "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"}
        )  # fmt: skip
    info |= {"name": "small", "version": "1.0.0", "splits": described, "fileFormat": "array_record"}
    (directory / "dataset_info.json").write_text(json.dumps(info))
