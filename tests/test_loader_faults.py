"""What happens to the files and the workers of a loader while it is read."""

import itertools
import multiprocessing
import os
import re
import shutil
import signal
import time
import types
from collections.abc import Generator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_loader import flat_folder, open_indexed, values

from esvit_jax.data import loader, patience, sources
from esvit_jax.errors import RunError, Stalled, UserError

__all__ = ["flat_folder"]  # a fixture


def some_batches(source, **overrides) -> Generator[dict[str, np.ndarray], None, None]:
    options: dict[str, Any] = {
        "batch_size": 10, "canvas_size": 28, "seed": 0, "start_step": 0, "num_workers": 0,
        "num_threads": 1, "max_bad_records": 0,
    }  # fmt: skip
    return loader.train_batches(source, **(options | overrides))


@pytest.mark.parametrize("how", ["removed", "cut off"])
def test_files_that_vanish_become_bad_records(
    flat_folder: Path, how: str, caplog: pytest.LogCaptureFixture
):
    source = open_indexed(f"folder:{flat_folder}", "train")
    batches = some_batches(source, max_bad_records=2)
    next(batches)
    for name in ("03.png", "11.png"):
        file = flat_folder / name
        file.unlink() if how == "removed" else file.write_bytes(file.read_bytes()[:-30])
    seen = {int(grey) for grey in values(list(itertools.islice(batches, 2, 8)))}
    assert seen == {10 + i for i in range(20)} - {13, 21}
    named = [line for line in caplog.messages if "cannot be decoded" in line]
    assert len(named) == 2 and "03.png" in named[0] + named[1] and "11.png" in named[0] + named[1]
    batches.close()
    (flat_folder / "15.png").unlink()
    with pytest.raises(UserError, match=r"max_bad_records = 2: 3 of the 20 records .*15\.png"):
        list(itertools.islice(some_batches(source, max_bad_records=2), 8))


def test_an_array_record_file_that_is_cut_off_is_named(tmp_path: Path):
    folder = shutil.copytree(sources.BUNDLED / "fashion_mnist_mini", tmp_path / "data")
    source = open_indexed(str(folder), "train")
    batches = some_batches(source, max_bad_records=3)
    next(batches)
    (file,) = folder.glob("*train.array_record*")
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(UserError, match=rf"of the 6000 records .* are {file.name}__\d+, .*mend"):
        list(itertools.islice(batches, 20))


def two_workers(before) -> list[Any]:
    workers = sorted(set(multiprocessing.active_children()) - before, key=lambda p: p.pid or 0)
    assert len(workers) == 2
    return workers


def test_a_killed_worker_ends_the_run_in_a_line(flat_folder: Path):
    source = open_indexed(f"folder:{flat_folder}", "train")
    before = set(multiprocessing.active_children())
    batches = some_batches(source, num_workers=2)
    next(batches)
    os.kill(two_workers(before)[0].pid or 0, signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(RunError, match=r"^a worker process .* \(exit code -9;") as error:
        list(itertools.islice(batches, 100_000))
    assert len(str(error.value).splitlines()) == 1
    assert time.monotonic() - start < 60


def test_a_frozen_worker_ends_the_run_in_a_line(
    flat_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """After words, and without the workers; a second of the test is 20 of the wait."""
    source = open_indexed(f"folder:{flat_folder}", "train")
    before = set(multiprocessing.active_children())
    batches = some_batches(source, num_workers=2, max_wait_seconds=70.0)
    next(batches)
    os.kill(two_workers(before)[1].pid or 0, signal.SIGSTOP)
    fast = types.SimpleNamespace(monotonic=lambda: 20 * time.monotonic())
    monkeypatch.setattr(patience, "time", fast)
    monkeypatch.setattr(patience, "wait", lambda futures, seconds: wait(futures, seconds / 20))
    start = time.monotonic()
    with pytest.raises(Stalled) as error:
        list(itertools.islice(batches, 100_000))
    assert 3.5 < time.monotonic() - start < 20
    name = f"folder:{flat_folder} train"
    assert str(error.value) == (
        f"nothing came of {name} for 70 s (max_wait_seconds): the disk or bucket with the data "
        "does not answer, or a worker process is frozen; start again to go on from the newest "
        "checkpoint"
    )
    said = rf"waiting for {name}: nothing for [36]\d of at most 70 s"
    assert len(caplog.messages) == 2 and all(re.fullmatch(said, x) for x in caplog.messages)
    assert set(multiprocessing.active_children()) <= before


@pytest.mark.parametrize("training", [True, False])
def test_data_that_does_not_answer_ends_the_run_in_a_line(
    flat_folder: Path, monkeypatch: pytest.MonkeyPatch, training: bool
):
    """A named pipe, which nobody writes to, in the place of an image."""
    source = open_indexed(f"folder:{flat_folder}", "train")
    (flat_folder / "07.png").unlink()
    os.mkfifo(flat_folder / "07.png")
    if training:
        batches = some_batches(source, max_wait_seconds=1.0)
    else:
        batches = loader.eval_batches(
            source, batch_size=5, canvas_size=28, num_threads=1, max_wait_seconds=1.0
        )
    start = time.monotonic()
    with pytest.raises(Stalled, match=r"^nothing came of folder:\S+ train for 1 s"):
        list(itertools.islice(batches, 100))
    assert 1 < time.monotonic() - start < 10
    (flat_folder / "07.png").write_bytes(b"")  # lets the threads go


def test_patience_changes_nothing():
    taken = []

    def numbers():
        for i in range(5):
            taken.append(i)
            yield i
        raise KeyError("the end")

    items = patience.patiently(numbers(), what="numbers", max_wait_seconds=10.0)
    assert taken == []
    assert next(items) == 0 and taken == [0]  # none ahead
    with pytest.raises(KeyError, match="the end"):
        for i in items:
            assert taken[-1] == i
    assert list(patience.patiently(iter("ab"), what="letters", max_wait_seconds=10.0)) == ["a", "b"]
