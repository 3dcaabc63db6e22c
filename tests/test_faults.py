"""What happens to a run from outside: a full disk, vanished files, killed processes."""

import errno
import io
import os
import re
import shutil
import signal
import subprocess
import time
from contextlib import closing

import jax
import numpy as np
import pytest
from damage import flip_bit, largest, random_state
from etils import epath
from rich.console import Console
from test_loop import environment, losses, start

from esvit_jax import checkpoint, checksums, loop
from esvit_jax.checkpoint import Checkpoints, load_model
from esvit_jax.errors import RUN_ERROR, USER_ERROR, DiskFull, UserError
from esvit_jax.runlog.writer import MetricWriter, read_metrics
from esvit_jax.whole import committed_steps

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
    """A whole run of 9 steps on one device, of which checkpoints 6 and 9 are kept."""
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
    steps = [line for line in output if line.startswith("step ")]
    assert steps and output[-1 - len(steps) : -1] == steps, output  # nothing beside them
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


# Files of the workdir


def test_without_config_json_a_run_does_not_go_on(undisturbed, tmp_path, tiny_config):
    """Nobody knows whose checkpoints they are; nothing is written."""
    workdir = shutil.copytree(undisturbed, tmp_path / "run")
    (workdir / "config.json").unlink()
    files = {file: file.stat().st_mtime_ns for file in workdir.rglob("*")}
    tiny_config.total_steps = 9
    with pytest.raises(UserError, match=r"has checkpoints but no config\.json to tell which run"):
        loop.train(tiny_config, workdir, console=Console(file=io.StringIO()))
    assert {file: file.stat().st_mtime_ns for file in workdir.rglob("*")} == files


def test_a_run_goes_on_from_before_a_damaged_checkpoint(undisturbed, tmp_path):
    """Bit-equal in the end; with --strict it is refused first."""
    workdir = shutil.copytree(undisturbed, tmp_path / "run")
    flip_bit(largest(workdir / "checkpoints" / "9" / "training" / "ocdbt.process_0"), 12345)
    status, output = finish(workdir, STEPS, "--strict")
    assert status == USER_ERROR
    assert re.match(r"esvit train: checkpoint 9 in \S+ is damaged \(training/\S+ has", output[-1])
    status, output = finish(workdir, STEPS)
    assert status == 0, output
    assert sum("checkpoint 6 is used" in line for line in output) == 1
    assert any("(from step 6)" in line for line in output)
    assert (workdir / "checkpoints" / "9.damaged").is_dir()
    assert_same_run(workdir, undisturbed)


# Signals


def logged(workdir) -> list[int]:
    """Steps of the lines of metrics that are there."""
    path = workdir / "metrics.jsonl"
    return [line["step"] for line in read_metrics(path)] if path.exists() else []


def test_sigterm_breaks_an_evaluation_off(undisturbed, tmp_path):
    """It is made up for; the final checkpoint's writing is in the account."""
    overrides = [STEPS, "--config.knn_every_steps=4"]
    process = start(tmp_path, *overrides)
    assert wait_for(lambda: logged(tmp_path)[-1:] == [4], process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "stopped by a signal after step 4;" in output, output
    assert evaluated(tmp_path) == []
    assert committed_steps(epath.Path(tmp_path) / "checkpoints")[-1] == 4
    status, lines = finish(tmp_path, *overrides)
    assert status == 0, lines
    assert evaluated(tmp_path) == [4, 8, 9]
    assert_same_run(tmp_path, undisturbed)


def evaluated(workdir) -> list[int]:
    lines = read_metrics(workdir / "metrics.jsonl")
    return [line["step"] for line in lines if "knn/top1/10" in line]


def test_sigterm_during_a_save(undisturbed, tmp_path):
    process = start(tmp_path, STEPS)
    assert wait_for(lambda: any((tmp_path / "checkpoints").glob("[1-9]*-tmp*")), process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "stopped by a signal after step" in output, output
    status, lines = finish(tmp_path, STEPS)
    assert status == 0, lines
    assert_same_run(tmp_path, undisturbed)


def test_the_last_checkpoint_is_in_the_account(tiny_config, tmp_path, monkeypatch):
    tiny_config.total_steps = 1

    def slow(folder, write=checksums.write):
        time.sleep(3)
        write(folder)

    monkeypatch.setattr(checksums, "write", slow)
    loop.train(tiny_config, tmp_path, console=Console(file=io.StringIO()))
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["spent_checkpoint"] > 2.5


# Other surroundings


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run that was killed after step 4, to be gone on with."""
    workdir = tmp_path_factory.mktemp("killed") / "run"
    process = start(workdir, STEPS)
    checkpoints = epath.Path(workdir) / "checkpoints"
    assert wait_for(lambda: 3 in committed_steps(checkpoints) and max(logged(workdir)) > 3, process)
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    return workdir


CLOCK = """
import os, time
real, real_ns, shift = time.time, time.time_ns, int(os.environ["CLOCK_SHIFT"])
time.time = lambda: real() + shift
time.time_ns = lambda: real_ns() + shift * 10**9
"""
LOCALE = "import locale; locale.setlocale(locale.LC_ALL, ''); assert f'{1.5:n}' == '1,5'"


def at_start(folder, code) -> dict[str, str]:
    """The variables of a process that runs some code before its own."""
    (folder / "sitecustomize.py").write_text(code)
    own = environment(devices=1)["PYTHONPATH"]
    return {"PYTHONPATH": os.pathsep.join([str(folder), own])}


@pytest.mark.parametrize(
    "where",
    ["a day ago", *(pytest.param(x, marks=pytest.mark.slow) for x in
                    ("in a day", "Tokyo", "ASCII", "German"))],
)  # fmt: skip
def test_a_run_goes_on_in_other_surroundings(killed, undisturbed, tmp_path, where):
    """Bit-equal, with its files readable by all."""
    workdir = shutil.copytree(killed, tmp_path / "run")
    if where in ("a day ago", "in a day"):
        variables = at_start(tmp_path, CLOCK)
        variables["CLOCK_SHIFT"] = "-86400" if where == "a day ago" else "86400"
    elif where == "Tokyo":
        variables = {"TZ": "Asia/Tokyo"}
    elif where == "ASCII":
        variables = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    else:
        made = subprocess.run(
            ["localedef", "-i", "de_DE", "-f", "UTF-8", str(tmp_path / "de_DE.UTF-8")],
            capture_output=True,
        )
        if made.returncode:
            pytest.skip("there is no German locale to be had")
        variables = at_start(tmp_path, LOCALE)
        variables |= {"LOCPATH": str(tmp_path), "LC_ALL": "de_DE.UTF-8"}
    status, output = finish(workdir, STEPS, **variables)
    assert status == 0 and any("(from step " in line for line in output), output
    assert_same_run(workdir, undisturbed)


def test_a_run_goes_on_from_another_folder(killed, undisturbed, tmp_path, monkeypatch):
    """By another relative path; data are looked for where their name says."""
    workdir = shutil.copytree(killed, tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    status, output = finish("../run", STEPS, "--config.data.name=./data")
    assert status == USER_ERROR
    assert output[-1] == ("esvit train: config.data.name = './data': there is no such directory")
    status, output = finish("../run", STEPS)
    assert status == 0, output
    assert_same_run(workdir, undisturbed)


# SIGKILL


def wait_for(condition, process, seconds=240.0) -> bool:
    """Whether something came true before the process ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if condition():
            return True
        time.sleep(0.0005)
    return False


@pytest.mark.slow
def test_killed_twenty_times_a_run_is_bit_equal(tmp_path):
    """At any moment; every second time while a checkpoint is being written."""
    overrides = ["--config.total_steps=60", "--config.checkpoint_every_steps=2"]
    expected, workdir = tmp_path / "expected", tmp_path / "run"
    status, output = finish(expected, *overrides)
    assert status == 0, output

    r, in_a_save, later = np.random.default_rng(0), 0, 0
    checkpoints = workdir / "checkpoints"
    for k in range(20):
        process = start(workdir, *overrides)
        if k % 2:
            wait_for(lambda: any(checkpoints.glob("*-tmp*/*")), process)
        elif k % 4:  # a checkpoint is there, and a while
            before = committed_steps(epath.Path(checkpoints))
            wait_for(
                lambda before=before: committed_steps(epath.Path(checkpoints)) != before, process
            )
            time.sleep(r.uniform(0, 0.3))
        else:
            time.sleep(r.uniform(1, 10))
        process.kill()
        process.communicate(timeout=60)
        if process.returncode != -signal.SIGKILL:
            break  # it was done
        in_a_save += any(checkpoints.glob("*-tmp*"))
        later += bool(committed_steps(epath.Path(checkpoints)))
    assert in_a_save >= 3 and later >= 10, (in_a_save, later)
    status, output = finish(workdir, *overrides)
    assert status == 0, output
    assert_same_run(workdir, expected)
    assert not list(checkpoints.glob("*.damaged"))
