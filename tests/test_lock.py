"""A workdir belongs to one run: on a disk and in a bucket."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from etils import epath

from esvit_jax import lock as lock_lib
from esvit_jax.errors import RunError, UserError
from esvit_jax.lock import Lock


@pytest.fixture(params=["local", "bucket"])
def workdir(request, tmp_path):
    if request.param == "local":
        return epath.Path(tmp_path / "run")
    return request.getfixturevalue("remote")


@pytest.fixture(autouse=True)
def _no_settling(monkeypatch):
    monkeypatch.setattr(lock_lib, "SETTLE", 0.05)


def change(workdir, **fields):
    """Makes a lock another's."""
    path = workdir / "lock.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refusal(workdir):
    with pytest.raises(UserError) as error:
        Lock(workdir, 60.0)
    assert error.value.argument == "workdir" and len(str(error.value).splitlines()) == 1
    return error.value.message


def names(workdir):
    return sorted(path.name for path in workdir.iterdir())


def test_the_second_is_refused_and_the_first_goes_on(workdir):
    first = Lock(workdir, 60.0)
    message = refusal(workdir)
    assert f"process {os.getpid()} of " in message and f" on {os.uname().nodename}, " in message
    assert f"since {json.loads((workdir / 'lock.json').read_text())['since']};" in message
    first.check()
    assert names(workdir) == ["lock.json"]
    first.close()
    assert not (workdir / "lock.json").exists()
    Lock(workdir, 60.0).close()


def test_a_killed_run_does_not_block(workdir):
    code = (
        "import sys, time; from etils import epath; from esvit_jax import buckets, lock\n"
        "buckets.is_remote(sys.argv[1]) and buckets.make_ready()\n"
        "lock.Lock(epath.Path(sys.argv[1]), 60.0); print('taken', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(workdir)], stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None and other.stdout.readline() == "taken\n"
    assert f"process {other.pid} of " in refusal(workdir)
    other.send_signal(signal.SIGKILL)
    other.communicate()
    Lock(workdir, 60.0).close()


@pytest.mark.parametrize(("silent", "dead"), [(50, False), (70, True), (-3600, False)])
def test_a_run_elsewhere_is_dead_by_its_age(workdir, silent, dead):
    first = Lock(workdir, 60.0)
    change(workdir, owner="other", host="far", machine="far", seen=time.time() - silent)
    if dead:
        Lock(workdir, 60.0).close()
    else:
        assert "on far, " in refusal(workdir) and "wait 60 s" in refusal(workdir)
    first.close()


def test_another_process_of_the_same_number_is_not_the_run(workdir):
    first = Lock(workdir, 60.0)
    change(workdir, owner="other", process_started="1")
    Lock(workdir, 60.0).close()
    first.close()


def test_signs_of_life(workdir):
    first = Lock(workdir, 0.4)
    seen = json.loads((workdir / "lock.json").read_text())["seen"]
    deadline = time.monotonic() + 10
    while json.loads((workdir / "lock.json").read_text())["seen"] == seen:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    first.close()


@pytest.mark.parametrize("seconds", [0.2, 60.0])
def test_a_run_that_lost_its_lock_is_told_and_leaves_the_others(workdir, seconds):
    first = Lock(workdir, seconds)
    change(workdir, owner="other")
    with pytest.raises(RunError, match="taken over by another run, .* nothing more is saved"):
        first.check()
    first.close()
    assert json.loads((workdir / "lock.json").read_text())["owner"] == "other"


@pytest.mark.parametrize("content", [b"", b"\0\0\0", b"[]", b'{"owner": 1}'])
def test_a_lock_that_says_nothing_is_taken(workdir, content):
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "lock.json").write_bytes(content)
    lock = Lock(workdir, 60.0)
    lock.check()
    lock.close()


def test_other_processes_of_a_run_take_none(workdir):
    with_it = Lock(workdir, 60.0)
    without = Lock(workdir, 60.0, enabled=False)
    without.check()
    without.close()
    with_it.check()
    with_it.close()


def test_a_place_without_links(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    first = Lock(epath.Path(tmp_path), 60.0)
    assert "another run is there" in refusal(epath.Path(tmp_path))
    first.close()
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    assert refusal(epath.Path(tmp_path / "file" / "run")).startswith("it cannot be written to: ")
