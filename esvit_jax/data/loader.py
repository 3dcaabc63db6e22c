"""Records → canvases → batches on the host: each image is decoded once, every view is cut later.

A batch is `{"canvas": uint8[b, s, s, 3], "size": int32[b, 2], "label": int32[b]}`: RGB images in
the top-left corner of a square of s pixels, their (height, width) there, and -1 for no label.

The order of training is a function of the seed and the step alone: example k of the run is record
`shuffle(seed, k // n)[k % n]` of n, global batch t is examples t·B … (t+1)·B − 1, and a process
takes its contiguous share of each. So a resumed run needs no state of the loader, only its step,
and continues exactly, on any number of processes.
"""

import collections
import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import cv2
import grain
import numpy as np
from absl import flags, logging

from esvit_jax.data.sources import Record, Source, TFRecordSource
from esvit_jax.errors import UserError

# Images are decoded side by side, here and in worker processes (which import this module too);
# threads of OpenCV's own would only fight for the same cores.
cv2.setNumThreads(0)


class DecodeError(ValueError):
    """A record that holds no readable image; the message says why."""


class BadRecord(NamedTuple):
    """A record that could not be decoded, and why."""

    id: str
    why: str


def decode(image: bytes | np.ndarray, canvas_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Decodes an image and fits it into a canvas.

    Grey becomes RGB; alpha is dropped, as Pillow's `convert("RGB")` does; 16 bits become the upper
    8; the EXIF orientation is applied. An image whose longer side exceeds `canvas_size` is scaled
    down to it by averaging areas; none is scaled up.

    Args:
      image: the bytes of a JPEG, PNG, WebP, … file, or uint8 or uint16 [h, w], [h, w, 1 | 3 | 4].
      canvas_size: pixels along the side of the canvas.

    Returns:
      The canvas uint8[canvas_size, canvas_size, 3], zero outside of the image in its top-left
      corner, and the image's (height, width) there, int32[2].

    Raises:
      DecodeError: no image, or one that is cut off.
    """
    rgb = _rgb_of_bytes(image) if isinstance(image, bytes) else _rgb_of_array(image)
    height, width = rgb.shape[:2]
    scale = canvas_size / max(height, width)
    if scale < 1:
        height, width = max(1, round(height * scale)), max(1, round(width * scale))
        rgb = cv2.resize(rgb, (width, height), interpolation=cv2.INTER_AREA)
    canvas = np.zeros((canvas_size, canvas_size, 3), np.uint8)
    canvas[:height, :width] = rgb
    return canvas, np.array([height, width], np.int32)


def _rgb_of_bytes(data: bytes) -> np.ndarray:
    if not data:
        raise DecodeError("it is empty or cannot be read")
    try:
        rgb = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error as error:  # such as an image of more pixels than OpenCV allows
        raise DecodeError(str(error).strip().splitlines()[-1]) from error
    if rgb is None:
        raise DecodeError(f"OpenCV reads no whole image from its {len(data)} bytes")
    return rgb


def _rgb_of_array(image: np.ndarray) -> np.ndarray:
    channels = image.shape[2] if image.ndim == 3 else 1
    if image.dtype not in (np.uint8, np.uint16) or image.ndim not in (2, 3) or not image.size:
        raise DecodeError(f"an array {image.dtype}{list(image.shape)} is no image")
    if channels not in (1, 3, 4):
        raise DecodeError(f"it has {channels} channels; 1, 3 and 4 can be read")
    if image.dtype == np.uint16:
        image = (image >> 8).astype(np.uint8)
    image = image.reshape(*image.shape[:2], channels)[..., :3]
    return np.ascontiguousarray(np.broadcast_to(image, (*image.shape[:2], 3)))


class _Example(NamedTuple):
    canvas: np.ndarray  # uint8[s, s, 3]
    size: np.ndarray  # int32[2]
    label: int
    id: str
    bad: tuple[BadRecord, ...]  # records that could not be decoded on the way to this one


def _decode_record(record: Record, canvas_size: int) -> _Example:
    """One record as an example; a bad one is blank (1 × 1 black pixel) and says so."""
    try:
        canvas, size = decode(record["image"], canvas_size)
        return _Example(canvas, size, record["label"], record["id"], ())
    except DecodeError as error:
        blank = np.zeros((canvas_size, canvas_size, 3), np.uint8)
        bad = BadRecord(record["id"], str(error))
        return _Example(blank, np.ones(2, np.int32), -1, record["id"], (bad,))


def _stack(examples: list[_Example]) -> dict[str, np.ndarray]:
    return {
        "canvas": np.stack([example.canvas for example in examples]),
        "size": np.stack([example.size for example in examples]),
        "label": np.array([example.label for example in examples], np.int32),
    }


@dataclasses.dataclass(frozen=True)
class _Decoded:
    """Random access to the examples of a source, each of them readable.

    In place of a bad record comes the next one of the source that decodes, so that the order of
    all others does not change. More than `max_bad_records` are not stepped over: the run stops.
    """

    source: Source
    canvas_size: int
    max_bad_records: int

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> _Example:
        example = _decode_record(self.source[index], self.canvas_size)
        bad = example.bad
        while example.bad and len(bad) < min(len(self), self.max_bad_records + 1):
            index = (index + 1) % len(self)
            example = _decode_record(self.source[index], self.canvas_size)
            bad += example.bad
        return example._replace(bad=bad)


@dataclasses.dataclass(frozen=True)
class _Batches:
    """Random access to this process's share of the global batches, by step."""

    examples: Any  # grain.MapDataset[_Example] of the whole run, endless
    batch_size: int  # global
    process_index: int
    process_count: int
    num_threads: int

    def __len__(self) -> int:
        return sys.maxsize

    @functools.cached_property
    def pool(self) -> ThreadPoolExecutor:
        """The threads of this process; they are not carried over to a worker process."""
        return ThreadPoolExecutor(self.num_threads, thread_name_prefix="decode")

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def __getitem__(self, index: int) -> tuple[dict[str, np.ndarray], tuple[BadRecord, ...]]:
        share = self.batch_size // self.process_count
        first = index * self.batch_size + self.process_index * share
        examples = list(self.pool.map(self.examples.__getitem__, range(first, first + share)))
        return _stack(examples), tuple(itertools.chain(*(example.bad for example in examples)))


class _BadRecords:
    """Counts the distinct bad records that this process met, names each once, stops at a limit."""

    def __init__(self, source: Source | TFRecordSource, limit: int):
        self.source = source
        self.limit = limit
        self.ids: list[str] = []

    def add(self, bad: Iterable[BadRecord]) -> None:
        for record in bad:
            if record.id not in self.ids:
                self.ids.append(record.id)
                _log_bad(self.source, record)
        if len(self.ids) > self.limit or len(self.ids) == len(self.source):
            raise UserError(
                f"config.data.max_bad_records = {self.limit}: {len(self.ids)} of the "
                f"{len(self.source)} records of {self.source.name} {self.source.split} cannot be "
                f"decoded, the last ones are {', '.join(self.ids[-5:])}; mend the data or raise it"
            )


def _log_bad(source: Source | TFRecordSource, bad: BadRecord) -> None:
    logging.warning("%s %s: %s cannot be decoded: %s", source.name, source.split, *bad)


def train_batches(
    source: Source | TFRecordSource,
    *,
    batch_size: int,
    canvas_size: int,
    seed: int,
    start_step: int,
    num_workers: int,
    num_threads: int,
    max_bad_records: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Generator[dict[str, np.ndarray], None, None]:
    """This process's share of the global batches from `start_step` on, without end.

    Shapes and order are those of the module's docstring; b is `batch_size / process_count`. The
    last examples of an epoch and the first of the next share a batch, so any size of data set will
    do. A `TFRecordSource` is ordered as its `shuffled` says instead, and read in this process.

    Args:
      source: what to train on.
      batch_size: images in a global batch, B.
      canvas_size: pixels along the side of a canvas.
      seed: of the order, ≥ 0.
      start_step: step of the first batch, counted from 0.
      num_workers: worker processes that prepare batches; 0 means threads of this process alone. A
        script that asks for workers needs the usual `if __name__ == "__main__":`.
      num_threads: threads that decode, in each of those processes, ≥ 1.
      max_bad_records: distinct records that this process may find undecodable. They are named in
        the log and replaced by the next one that decodes.
      process_index: index of this process (`jax.process_index()`).
      process_count: number of processes that share a batch.

    Raises:
      UserError: at once, if the processes cannot share a batch evenly; later, on more than
        `max_bad_records` bad records, or if there are no others.
    """
    _check_share("config.batch_size", batch_size, process_count)
    bad_records = _BadRecords(source, max_bad_records)
    if isinstance(source, TFRecordSource):
        records = source.shuffled(
            seed, start_step=start_step, process_index=process_index, process_count=process_count
        )
        decode_record = functools.partial(_decode_record, canvas_size=canvas_size)
        examples = _map_ahead(decode_record, records, num_threads)
        return _stream_batches(examples, batch_size // process_count, bad_records)

    decoded = _Decoded(source, canvas_size, max_bad_records)
    batches = _Batches(
        examples=grain.MapDataset.source(decoded).seed(seed).shuffle().repeat(),
        batch_size=batch_size,
        process_index=process_index,
        process_count=process_count,
        num_threads=num_threads,
    )
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain reads absl flags when it starts workers
    # Two batches at a time: the second keeps the threads busy while the first is being finished.
    dataset = grain.MapDataset.source(batches)[start_step:].to_iter_dataset(
        grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)
    )
    dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers))
    return _checked_batches(dataset, bad_records, copy=num_workers > 0)


def _check_share(field: str, batch_size: int, process_count: int) -> None:
    if batch_size % process_count:
        raise UserError(f"{field} = {batch_size} cannot be shared by {process_count} processes")


def _checked_batches(
    dataset: grain.IterDataset, bad_records: _BadRecords, *, copy: bool
) -> Generator[dict[str, np.ndarray], None, None]:
    """Batches without their bad records; `copy` takes them out of the workers' shared memory.

    grain frees that memory with the array that owns it, and leaks it when a view outlives this one.
    """
    iterator = iter(dataset)
    try:
        for batch, bad in iterator:
            if bad:
                bad_records.add(bad)
            yield {key: np.array(value) for key, value in batch.items()} if copy else batch
    finally:
        iterator.close()


def _stream_batches(
    examples: Iterator[_Example], share: int, bad_records: _BadRecords
) -> Generator[dict[str, np.ndarray], None, None]:
    batch: list[_Example] = []
    for example in examples:
        if example.bad:
            bad_records.add(example.bad)
            continue
        batch.append(example)
        if len(batch) == share:
            yield _stack(batch)
            batch = []


def eval_batches(
    source: Source | TFRecordSource,
    *,
    batch_size: int,
    canvas_size: int,
    num_threads: int,
    first_batch: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Generator[dict[str, Any], None, None]:
    """Every record once, in order: this process's share of ceil(n / batch_size) global batches.

    Each batch has, beside the fields of a training batch, "mask" bool[b], False for padding after
    the last record and for records that cannot be decoded (which the log names), and "id", a list
    of b strings ("" for padding). Masked canvases are black, of size 1 × 1 and label -1.

    Args:
      source: what to read.
      batch_size: images in a global batch.
      canvas_size: pixels along the side of a canvas.
      num_threads: threads that decode, ≥ 1.
      first_batch: global batches that are left out at the beginning.
      process_index: index of this process.
      process_count: number of processes that share a batch.

    Raises:
      UserError: the processes cannot share a batch evenly.
    """
    _check_share("config.evaluate.batch_size", batch_size, process_count)
    share = batch_size // process_count
    # Indices are read in the threads; a stream of records is read here.
    items = source.in_order() if isinstance(source, TFRecordSource) else range(len(source))
    items = itertools.islice(items, first_batch * batch_size, None)
    padded = itertools.chain(items, itertools.repeat(None, -len(source) % batch_size))
    mine = (item for k, item in enumerate(padded) if k % batch_size // share == process_index)

    def example(item: Any) -> _Example:
        if item is None:
            return _decode_record({"image": b"", "label": -1, "id": ""}, canvas_size)
        record = item if isinstance(source, TFRecordSource) else source[item]
        return _decode_record(record, canvas_size)

    return _eval_batches(source, _map_ahead(example, mine, num_threads), share)


def _eval_batches(
    source: Source | TFRecordSource, examples: Iterator[_Example], share: int
) -> Generator[dict[str, Any], None, None]:
    while batch := list(itertools.islice(examples, share)):
        for bad in itertools.chain(*(example.bad for example in batch)):
            if bad.id:
                _log_bad(source, bad)
        yield {
            **_stack(batch),
            "mask": np.array([not example.bad for example in batch]),
            "id": [example.id for example in batch],
        }


def _map_ahead(
    function: Callable[[Any], _Example], items: Iterable[Any], num_threads: int
) -> Iterator[_Example]:
    """`map` in threads, in order, a few results ahead of what is asked for."""
    with ThreadPoolExecutor(num_threads, thread_name_prefix="decode") as pool:
        ahead: collections.deque[Future[_Example]] = collections.deque()
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) > 4 * num_threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
