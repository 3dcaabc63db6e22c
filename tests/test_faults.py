"""What happens to a run from outside: a full disk, vanished files, killed processes."""

import errno
import io
import subprocess
from contextlib import closing

import jax
import numpy as np
import pytest
from damage import random_state
from rich.console import Console
from test_loop import losses, start

from esvit_jax import checkpoint, checksums, loop
from esvit_jax.checkpoint import Checkpoints, load_model
from esvit_jax.errors import RUN_ERROR, DiskFull
from esvit_jax.runlog.writer import MetricWriter

STEPS = "--config.total_steps=9"


def finish(workdir, *overrides, **variables) -> tuple[int, list[str]]:
    """Status and last lines of `esvit train` in a process of its own, once it has ended."""
    process = start(workdir, *overrides, **variables)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output.splitlines()


def assert_same_run(workdir, expected):
    """The same losses and the same final networks, to the last bit."""
    assert losses(workdir) == losses(expected)
    for ours, theirs in zip(
        jax.tree.leaves(load_model(workdir, strict=True)[3:6]),
        jax.tree.leaves(load_model(expected, strict=True)[3:6]),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A whole run of 9 steps on one device, with checkpoints 1, 3, 6 and 9."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    status, output = finish(workdir, STEPS)
    assert status == 0, output
    return workdir


# A full disk


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1.1 MB, where one checkpoint of a tiny run fits, and two do not."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1100k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root may mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_costs_nothing_older(small_disk, undisturbed):
    status, output = finish(small_disk / "run", STEPS)
    assert status == RUN_ERROR
    assert output[-1] == (
        f"esvit train: checkpoint 3 cannot be written to {small_disk}/run/checkpoints: No space "
        "left on device; the newest is that of step 1. Make room, and start it again"
    )
    assert all(line.startswith("step ") for line in output[-7:-1]), output
    assert load_model(small_disk / "run", strict=True).step == 1
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    status, output = finish(small_disk / "run", STEPS)
    assert status == 0 and any("(from step 1)" in line for line in output), output
    assert_same_run(small_disk / "run", undisturbed)


@pytest.mark.parametrize("when", ["in the save", "in the close"])
def test_a_checkpoint_without_room_is_named(tmp_path, tiny_config, monkeypatch, when):
    """Wherever the error comes out that Orbax met in another thread."""
    checkpoint.write_config(tmp_path, tiny_config, {})
    states = {step: random_state(tiny_config, step) for step in (1, 2, 3)}
    with closing(Checkpoints(str(tmp_path))) as checkpoints:
        checkpoints.save(1, states[1])

    def no_room(checkpoint):
        raise OSError(errno.ENOSPC, "No space left on device", str(checkpoint))

    monkeypatch.setattr(checksums, "write", no_room)
    checkpoints = Checkpoints(str(tmp_path))
    checkpoints.save(2, states[2])
    with pytest.raises(DiskFull) as error:
        if when == "in the save":
            checkpoints.save(3, states[3])
        else:
            checkpoints.close()
    assert str(error.value) == (
        f"checkpoint 2 cannot be written to {tmp_path}/checkpoints: No space left on device; the "
        "newest is that of step 1. Make room, and start it again"
    )
    checkpoints.close()
    assert load_model(tmp_path, strict=True).step == 1


def test_metrics_without_room_end_a_run_in_words(tmp_path, tiny_config, monkeypatch):
    def no_room(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(MetricWriter, "write", no_room)
    with pytest.raises(DiskFull, match=r"^No space left on device; make room, and start it again"):
        loop.train(tiny_config, tmp_path, console=Console(file=io.StringIO()))
