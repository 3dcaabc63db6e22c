"""Runs of several processes on this machine: connecting, failing together, the same run."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import QUICK_COMPILE
from images import encoded, noise

from esvit_jax import parallel
from esvit_jax.errors import USER_ERROR, UserError

CONFIG = Path(__file__).with_name("tiny.py")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(index: int, *arguments: str, devices: int = 2, **variables: str) -> subprocess.Popen:
    """`esvit ARGUMENTS` as process `index` of several, which see so many devices each."""
    environment = os.environ | {
        "XLA_FLAGS": f"{QUICK_COMPILE} --xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": os.pathsep.join([str(CONFIG.parent), os.environ.get("PYTHONPATH", "")]),
        "PYTHONUNBUFFERED": "1",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "esvit_jax", *arguments],
        env=environment | variables,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def start_all(
    count: int, command: str, *arguments: str, own: tuple[str, ...] = (), devices: int = 2
) -> list[subprocess.Popen]:
    """`count` processes of one command, the last of which has arguments of its own too."""
    flags = [command, f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={count}"]
    return [
        start(
            i, *flags, f"--process_id={i}", *arguments, *(own if i == count - 1 else ()),
            devices=devices,
        )
        for i in range(count)
    ]  # fmt: skip


def finish(processes: list[subprocess.Popen], timeout: float = 300) -> list[str]:
    """What all of them printed; none may be left."""
    try:
        return [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


def last_lines(outputs: list[str]) -> list[str]:
    return [output.splitlines()[-1] for output in outputs]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"coordinator": "host"}, r"coordinator = 'host': it must be host:port"),
        ({"process_id": 2, "num_processes": 2}, r"process_id = 2: 2 processes .* from 0 to 1"),
        ({"process_id": -1}, r"process_id = -1: the processes are counted from 0"),
        ({"num_processes": 0}, r"num_processes = 0: it must be at least 1"),
        ({"coordinator": "a:1", "num_processes": 2}, r"no cluster is .* give --process_id, or"),
        ({}, r"give --coordinator and --process_id and --num_processes, or start one process"),
    ],
)
def test_processes_that_cannot_be_are_refused(given, message, monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", undetected)
    with pytest.raises(UserError, match=message):
        parallel.start(**given)


def undetected(*arguments, **keywords):
    raise ValueError("Number of processes must be defined.")


def test_the_environment_names_the_processes(monkeypatch):
    seen = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: seen.append((a, k)))
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "10.0.0.2:8476")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "3")
    monkeypatch.setenv("JAX_PROCESS_ID", "two")
    with pytest.raises(UserError, match="JAX_PROCESS_ID = 'two': it must be a whole number"):
        parallel.start()
    monkeypatch.setenv("JAX_PROCESS_ID", "2")
    parallel.start(heartbeat_seconds=7)
    ((arguments, keywords),) = seen
    assert arguments == ("10.0.0.2:8476",)
    assert keywords["num_processes"] == 3 and keywords["process_id"] == 2
    assert keywords["heartbeat_timeout_seconds"] == 7


def test_one_process_connects_to_nothing(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", undetected)
    parallel.start(num_processes=1)


@pytest.mark.parametrize(("tasks", "all_gpus"), [("2", True), ("16", False)])
def test_a_slurm_task_that_is_alone_on_its_host_takes_all_gpus(monkeypatch, tasks, all_gpus):
    """jax would give it one."""
    set_to = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: None)
    monkeypatch.setattr(jax.config, "update", set_to.__setitem__)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", tasks)
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "2")
    parallel.start()
    assert (set_to.get("jax_cuda_visible_devices") == "all") == all_gpus


def test_another_config_in_one_process_ends_all(tmp_path):
    """Processes as Slurm starts them: `--distributed` finds each other."""
    port = str(free_port())
    arguments = ("train", f"--config={CONFIG}", f"--workdir={tmp_path}/run", "--distributed")
    processes = [
        start(
            i, *arguments, f"--config.optimizer.learning_rate={[0.5, 0.25][i]}",
            SLURM_JOB_ID="1", SLURM_STEP_NODELIST="localhost", SLURM_NTASKS="2",
            SLURM_PROCID=str(i), SLURM_LOCALID=str(i), JAX_COORDINATOR_PORT=port,
        )
        for i in range(2)
    ]  # fmt: skip
    outputs = finish(processes)
    line = (
        "config.optimizer.learning_rate is 0.25 in process 1 and 0.5 in process 0; start all alike"
    )
    assert last_lines(outputs) == [f"esvit train: process 1: {line}", f"esvit train: {line}"]
    assert [process.returncode for process in processes] == [USER_ERROR, USER_ERROR]
    assert not (tmp_path / "run").exists()


def test_a_failure_of_one_process_ends_all(tmp_path):
    """One of them meets the image that cannot be read."""
    for i in range(8):
        (tmp_path / f"{i}.png").write_bytes(encoded(noise(i, 20, 20, 3)))
    (tmp_path / "3.png").write_bytes(b"nothing")
    began = time.monotonic()
    processes = start_all(
        2, "train", f"--config={CONFIG}", f"--workdir={tmp_path}/run",
        f"--config.data.name=folder:{tmp_path}", "--config.data.max_bad_records=0",
    )  # fmt: skip
    outputs = finish(processes)
    assert [process.returncode for process in processes] == [USER_ERROR, USER_ERROR]
    line = "config.data.max_bad_records = 0: 1 of the 8 records"
    own = [f"esvit train: {line}" in output for output in outputs]
    assert sum(own) == 1
    failed = own.index(True)
    assert last_lines(outputs)[1 - failed].startswith(f"esvit train: process {failed}: {line}")
    assert not any("Traceback" in output for output in outputs)
    assert time.monotonic() - began < 240
