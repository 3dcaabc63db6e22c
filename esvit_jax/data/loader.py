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
import multiprocessing
import re
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import grain
import numpy as np
from absl import flags, logging

from esvit_jax.data.decode import DecodeError, decode
from esvit_jax.data.patience import MAX_WAIT, patiently
from esvit_jax.data.sources import IndexedSource, Record, Source, TFRecordSource
from esvit_jax.errors import RunError, UserError

_Item = TypeVar("_Item")


class BadRecord(NamedTuple):
    """A record that could not be decoded, and why."""

    id: str
    why: str


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

    source: IndexedSource
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

    examples: grain.MapDataset[_Example]  # of the whole run, endless
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
        indices = range(first, first + share)
        examples = list(self.pool.map(lambda k: self.examples[k], indices))
        return _stack(examples), tuple(itertools.chain(*(example.bad for example in examples)))


class _BadRecords:
    """Counts the distinct bad records that this process met, names each once, stops at a limit."""

    def __init__(self, source: Source, limit: int):
        self.source = source
        self.limit = limit
        self.ids: list[str] = []

    def add(self, bad: Iterable[BadRecord]) -> None:
        for record in bad:
            if record.id not in self.ids:
                self.ids.append(record.id)
                _log_bad(self.source, record)
        all_bad = len(self.ids) == len(self.source)
        if len(self.ids) > self.limit or all_bad:
            advice = "mend the data" if all_bad else "mend the data, or raise the limit"
            raise UserError(
                f"{len(self.ids)} of the {len(self.source)} records of {self.source.name} "
                f"{self.source.split} cannot be decoded, the last ones are "
                f"{', '.join(self.ids[-5:])}; {advice}",
                argument="max_bad_records",
                value=self.limit,
            )


def _log_bad(source: Source, bad: BadRecord) -> None:
    logging.warning("%s %s: %s cannot be decoded: %s", source.name, source.split, *bad)


def train_batches(
    source: Source,
    *,
    batch_size: int,
    canvas_size: int,
    seed: int,
    start_step: int,
    num_workers: int,
    num_threads: int,
    max_bad_records: int,
    max_wait_seconds: float = MAX_WAIT,
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
      max_wait_seconds: for a batch; the log names a wait of more than half a minute.
      process_index, process_count: of this process, and of all that share a batch.

    Raises:
      UserError: at once, on an argument out of its range or a `batch_size` that the processes
        cannot share evenly; from the iterator, of `max_bad_records`, on more bad records than
        that, or if there are no others.
      RunError: from the iterator, where a worker process was killed; as `Stalled`, where no batch
        came for `max_wait_seconds`: a worker is frozen, or a disk or bucket does not answer.
    """
    _check_arguments(
        batch_size=(batch_size, 1),
        canvas_size=(canvas_size, 1),
        seed=(seed, 0),
        start_step=(start_step, 0),
        num_workers=(num_workers, 0),
        num_threads=(num_threads, 1),
        max_bad_records=(max_bad_records, 0),
    )
    _check_processes(batch_size, process_index, process_count)
    bad_records, share = _BadRecords(source, max_bad_records), batch_size // process_count
    in_time = _in_time(source, max_wait_seconds)
    if isinstance(source, TFRecordSource):
        process = {"process_index": process_index, "process_count": process_count}
        records = source.shuffled(seed, start_step=start_step, **process)
        decode_record = functools.partial(_decode_record, canvas_size=canvas_size)
        examples = _map_ahead(decode_record, records, num_threads)
        return in_time(_stream_batches(examples, share, bad_records))

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
    return _checked_batches(dataset, bad_records, in_time, copy=num_workers > 0)


def _in_time(source: Source, max_wait_seconds: float) -> Callable[[Iterator[Any]], Any]:
    what = f"{source.name} {source.split}"
    return functools.partial(patiently, what=what, max_wait_seconds=max_wait_seconds)


def _check_arguments(**arguments: tuple[int, int]) -> None:
    """Checks {argument: (value, least value)}."""
    for argument, (value, least) in arguments.items():
        if value < least:
            raise UserError(f"it must be at least {least}", argument=argument, value=value)


def _check_processes(batch_size: int, process_index: int, process_count: int) -> None:
    _check_arguments(process_count=(process_count, 1), process_index=(process_index, 0))
    if process_index >= process_count:
        raise UserError(
            f"there are {process_count} processes", argument="process_index", value=process_index
        )
    if batch_size % process_count:
        raise UserError(
            f"{process_count} processes cannot share it evenly",
            argument="batch_size",
            value=batch_size,
        )


def _checked_batches(
    dataset: grain.IterDataset,
    bad_records: _BadRecords,
    in_time: Callable[[Iterator[Any]], Iterator[Any]],
    *,
    copy: bool,
) -> Generator[dict[str, np.ndarray], None, None]:
    """Batches without their bad records; `copy` takes them out of the workers' shared memory.

    grain frees that memory with the array that owns it, and leaks it when a view outlives this one.
    """
    iterator = iter(dataset)
    try:
        for batch, bad in in_time(iterator):
            if bad:
                bad_records.add(bad)
            yield {key: np.array(value) for key, value in batch.items()} if copy else batch
    except RuntimeError as error:
        _kill_workers()
        if ended := re.match("Worker process .* with (exit code -?[0-9]+)", str(error)):
            raise RunError(
                f"a worker process that prepares batches ended ({ended[1]}; -9 is often too little "
                "memory: fewer num_workers need less); start again to go on from the newest "
                "checkpoint"
            ) from error
        raise
    finally:
        iterator.close()


def _kill_workers() -> None:
    """grain would wait half a minute for each that does not answer."""
    for process in multiprocessing.active_children():
        if process.name.startswith("grain-"):
            process.kill()


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
    source: Source,
    *,
    batch_size: int,
    canvas_size: int,
    num_threads: int,
    first_batch: int = 0,
    max_wait_seconds: float = MAX_WAIT,
    process_index: int = 0,
    process_count: int = 1,
) -> Generator[dict[str, Any], None, None]:
    """Every record once, in order: this process's share of ceil(n / batch_size) global batches.

    Each batch has, beside the fields of a training batch, "mask" bool[b], False for padding after
    the last record and for records that cannot be decoded (which the log names), and "id", a list
    of b strings ("" for padding). Masked canvases are black, of size 1 × 1 and label -1. So the
    images of a source are as many as the mask is true, and may be fewer than its records.

    Args:
      source: what to read.
      batch_size: images in a global batch.
      canvas_size: pixels along the side of a canvas.
      num_threads: threads that decode, ≥ 1.
      first_batch: global batches that are left out at the beginning.
      max_wait_seconds: for a batch; the log names a wait of more than half a minute.
      process_index: index of this process.
      process_count: number of processes that share a batch.

    Raises:
      UserError: an argument out of its range, or a `batch_size` that the processes cannot share
        evenly.
      Stalled: from the iterator, where no batch came for `max_wait_seconds`.
    """
    _check_arguments(
        batch_size=(batch_size, 1),
        canvas_size=(canvas_size, 1),
        num_threads=(num_threads, 1),
        first_batch=(first_batch, 0),
    )
    _check_processes(batch_size, process_index, process_count)
    share = batch_size // process_count
    # A source with random access is read in the threads, a stream of records here.
    if isinstance(source, TFRecordSource):
        reads = (functools.partial(_itself, record) for record in source.in_order())
    else:
        reads = (functools.partial(source.__getitem__, i) for i in range(len(source)))
    reads = itertools.islice(reads, first_batch * batch_size, None)
    padding = itertools.repeat(_padding_record, -len(source) % batch_size)
    mine = (
        read
        for k, read in enumerate(itertools.chain(reads, padding))
        if k % batch_size // share == process_index
    )

    def example(read: Callable[[], Record]) -> _Example:
        return _decode_record(read(), canvas_size)

    batches = _eval_batches(source, _map_ahead(example, mine, num_threads), share)
    return _in_time(source, max_wait_seconds)(batches)


def _itself(record: Record) -> Record:
    return record


def _padding_record() -> Record:
    return {"image": b"", "label": -1, "id": ""}


def _eval_batches(
    source: Source, examples: Iterator[_Example], share: int
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
    function: Callable[[_Item], _Example], items: Iterable[_Item], num_threads: int
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
