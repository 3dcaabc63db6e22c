"""Makes `fashion_mnist_mini` from the idx files of Fashion-MNIST (README.md beside this file).

Needs TensorFlow, as all writing by TFDS does. Reading what it makes does not:

    pip install esvit_jax[tf]
    python make_fashion_mnist_mini.py --source=/usr/share/datasets/fashion-mnist
"""

import argparse
import gzip
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import tensorflow_datasets as tfds

LICENSE = """The MIT License (MIT) Copyright © 2017 Zalando SE, https://tech.zalando.com

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
associated documentation files (the “Software”), to deal in the Software without restriction,
including without limitation the rights to use, copy, modify, merge, publish, distribute,
sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or
substantial portions of the Software.

THE SOFTWARE IS PROVIDED “AS IS”, WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT
NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM,
DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT
OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""
IMAGES_PER_CLASS = {"train": 600, "test": 150}
FILE_PREFIX = {"train": "train", "test": "t10k"}
CLASS_NAMES = [
    "t_shirt_top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle_boot",
]
PNG_STRATEGIES = (
    cv2.IMWRITE_PNG_STRATEGY_DEFAULT,
    cv2.IMWRITE_PNG_STRATEGY_FILTERED,
    cv2.IMWRITE_PNG_STRATEGY_RLE,
)
PNG_FILTERS = (
    cv2.IMWRITE_PNG_FILTER_NONE,
    cv2.IMWRITE_PNG_FILTER_SUB,
    cv2.IMWRITE_PNG_FILTER_UP,
    cv2.IMWRITE_PNG_FILTER_AVG,
    cv2.IMWRITE_PNG_FILTER_PAETH,
    cv2.IMWRITE_PNG_ALL_FILTERS,
)


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array of a gzipped idx file: two zero bytes, type, rank, the shape, the data."""
    data = gzip.decompress(path.read_bytes())
    rank = data[3]
    shape = np.frombuffer(data, ">u4", count=rank, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


def encode_png(image: np.ndarray) -> bytes:
    """The smallest of a few lossless encodings of a grey image uint8[h, w]."""
    options = [
        [cv2.IMWRITE_PNG_COMPRESSION, 9, kind, value]
        for kind, values in (
            (cv2.IMWRITE_PNG_STRATEGY, PNG_STRATEGIES),
            (cv2.IMWRITE_PNG_FILTER, PNG_FILTERS),
        )
        for value in values
    ]
    return min((cv2.imencode(".png", image, o)[1].tobytes() for o in options), key=len)


class FashionMnistMini(tfds.core.GeneratorBasedBuilder):
    """The first 600 training and 150 test images of each class of Fashion-MNIST."""

    VERSION = tfds.core.Version("1.0.0")
    source: Path  # folder of the idx files

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(28, 28, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=CLASS_NAMES),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://github.com/zalandoresearch/fashion-mnist",
            license=LICENSE,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        del dl_manager  # nothing is downloaded
        return {split: self._generate_examples(split) for split in IMAGES_PER_CLASS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
        prefix = FILE_PREFIX[split]
        images = read_idx(self.source / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(self.source / f"{prefix}-labels-idx1-ubyte.gz")
        for label in range(len(CLASS_NAMES)):
            for index in np.flatnonzero(labels == label)[: IMAGES_PER_CLASS[split]]:
                yield int(index), {"image": encode_png(images[index]), "label": label}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Makes the bundled Fashion-MNIST mini.")
    parser.add_argument("--source", type=Path, required=True, help="folder of the idx files")
    here = Path(__file__).parent
    parser.add_argument("--out", type=Path, default=here / "fashion_mnist_mini")
    args = parser.parse_args()

    FashionMnistMini.source = args.source
    with tempfile.TemporaryDirectory() as data_dir:
        builder = FashionMnistMini(data_dir=data_dir, file_format="array_record")
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
        args.out.mkdir(parents=True, exist_ok=True)
        for path in Path(builder.data_dir).iterdir():
            shutil.copy(path, args.out)


if __name__ == "__main__":
    main()
