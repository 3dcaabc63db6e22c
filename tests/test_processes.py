"""Runs of several processes on this machine: connecting, failing together, the same run."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny
from conftest import QUICK_COMPILE
from images import encoded, noise
from rich.console import Console
from test_knn_command import save_random

from esvit_jax import checkpoint, cluster, loop
from esvit_jax.config import ConfigDict
from esvit_jax.errors import RUN_ERROR, USER_ERROR, UserError
from esvit_jax.runlog.writer import read_metrics

CONFIG = Path(__file__).with_name("tiny.py")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(
    index: int,
    *arguments: str,
    devices: int = 2,
    stderr: int = subprocess.STDOUT,
    **variables: str,
) -> subprocess.Popen:
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
        stdout=subprocess.PIPE, stderr=stderr, text=True,
    )  # fmt: skip


def start_all(
    count: int, command: str, *arguments: str, own: tuple[str, ...] = (), **fields: Any
) -> list[subprocess.Popen]:
    """`count` processes of one command, the last of which has arguments of its own too."""
    flags = [command, f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={count}"]
    return [
        start(
            i, *flags, f"--process_id={i}", *arguments, *(own if i == count - 1 else ()), **fields
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


def json_of(output: str) -> dict[str, Any]:
    (line,) = (line for line in output.splitlines() if line.startswith("{"))
    return json.loads(line)


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
        cluster.connect(**given)


def undetected(*arguments, **keywords):
    raise ValueError("Number of processes must be defined.")


def test_the_environment_names_the_processes(monkeypatch):
    seen = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: seen.append((a, k)))
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "10.0.0.2:8476")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "3")
    monkeypatch.setenv("JAX_PROCESS_ID", "two")
    with pytest.raises(UserError, match="JAX_PROCESS_ID = 'two': it must be a whole number"):
        cluster.connect()
    monkeypatch.setenv("JAX_PROCESS_ID", "2")
    cluster.connect(heartbeat_seconds=7)
    ((arguments, keywords),) = seen
    assert arguments == ("10.0.0.2:8476",)
    assert keywords["num_processes"] == 3 and keywords["process_id"] == 2
    assert keywords["heartbeat_timeout_seconds"] == 7


def test_one_process_connects_to_nothing(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", undetected)
    cluster.connect(num_processes=1)


@pytest.mark.parametrize("index", [0, 1])
def test_who_waits_in_vain_says_so(index):
    code = (
        "from esvit_jax import cluster; "
        f"cluster.connect('127.0.0.1:{free_port()}', {index}, 2, connect_seconds=3)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert found.returncode == RUN_ERROR
    assert found.stderr.splitlines()[-1] == (
        "esvit: other processes did not come in 3 s; all are started alike, with the same number"
    )


@pytest.mark.parametrize(("tasks", "all_gpus"), [("2", True), ("16", False)])
def test_a_slurm_task_that_is_alone_on_its_host_takes_all_gpus(monkeypatch, tasks, all_gpus):
    """jax would give it one."""
    set_to = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: None)
    monkeypatch.setattr(jax.config, "update", set_to.__setitem__)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", tasks)
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "2")
    cluster.connect()
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


STEPS = 40
# As `run_config`; and loading in a process of its own.
OVERRIDES = (
    f"--config={CONFIG}", f"--config.total_steps={STEPS}", "--config.checkpoint_every_steps=100",
    "--config.backbone.drop_path_rate=0.5",
)  # fmt: skip
WORKERS = "--config.data.num_workers=1"


def run_config(mode: str = "pmap") -> ConfigDict:
    config = tiny.tiny_config()
    config.total_steps, config.checkpoint_every_steps = STEPS, 100
    config.backbone.drop_path_rate = 0.5
    config.parallel = mode
    return config


def losses(workdir: Path) -> list[float]:
    return [r["loss"] for r in read_metrics(workdir / "metrics.jsonl") if "loss" in r]


def wait_for_step(workdir: Path, step: int, processes: list[subprocess.Popen]) -> None:
    """Until so many steps are logged, or all have ended."""
    path = workdir / "metrics.jsonl"
    while any(process.poll() is None for process in processes):
        if path.exists() and len(losses(workdir)) >= step:
            return
        time.sleep(0.01)


def assert_same_run(workdir: Path, other: Path) -> None:
    """Losses, and at the end params, teacher and centers."""
    mine, expected = losses(workdir), losses(other)
    assert len(mine) == len(expected) == STEPS
    np.testing.assert_allclose(mine[:20], expected[:20], rtol=1e-6)
    np.testing.assert_allclose(mine, expected, rtol=1e-4)
    states = (jax.tree.leaves(checkpoint.load_model(path)[3:6]) for path in (workdir, other))
    for ours, theirs in zip(*states, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> Path:
    """A whole run in this process, on its four devices."""
    workdir = tmp_path_factory.mktemp("one_process")
    loop.train(run_config(), workdir, console=Console(quiet=True))
    return workdir


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> tuple[Path, int]:
    """A run of 2 processes x 2 devices, one of which got SIGTERM; and its step."""
    workdir = tmp_path_factory.mktemp("stopped")
    processes = start_all(2, "train", f"--workdir={workdir}", *OVERRIDES, WORKERS)
    wait_for_step(workdir, 3, processes)
    processes[1].send_signal(signal.SIGTERM)
    outputs = finish(processes)
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    step = len(losses(workdir))
    assert f"stopped by a signal after step {step}; start it again" in outputs[0]
    return workdir, step


def test_a_signal_to_one_process_stops_all_after_the_same_step(stopped):
    workdir, step = stopped
    assert 3 <= step < STEPS
    assert max(int(path.name) for path in (workdir / "checkpoints").iterdir()) == step


def test_one_process_goes_on_with_a_run_of_two(stopped, one_process, tmp_path):
    """With the same images, views and drop path, to the same end."""
    workdir = shutil.copytree(stopped[0], tmp_path / "run")
    result = loop.train(run_config(), workdir, console=Console(quiet=True))
    assert result.step == STEPS
    assert_same_run(workdir, one_process)


def test_knn_of_two_processes_is_that_of_one(one_process, tmp_path):
    arguments = (f"--workdir={one_process}", "--train_split=train[:300]", "--json")
    processes = start_all(
        2, "knn", *arguments, own=(f"--out={tmp_path}/of_another.json",), stderr=subprocess.PIPE
    )
    (output, silent), (alone,) = finish(processes), finish([start(0, "knn", *arguments)])
    assert json.loads(output) == json_of(alone)  # nothing else: gloo tells its connections, too
    assert json_of(alone)["train_images"] == 300
    assert not silent and not (tmp_path / "of_another.json").exists()


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> Path:
    """A workdir with random params."""
    return save_random(tmp_path_factory.mktemp("network") / "run", run_config(), seed=1)


PROBE = ("--blocks=1,2", "--learning_rates=0.1,1", "--epochs=2", "--train_split=train[:80]")
TUNE = (
    "--epochs=2",
    "--warmup_epochs=0",
    "--train_split=train[:80]",
    "--learning_rate=0.05",
    "--batch_size=20",
)


@pytest.mark.parametrize("command", ["linear", "finetune"])
def test_training_on_labels_by_two_processes_is_that_by_one(network, tmp_path, command):
    """Two processes of two devices, and one of four."""
    reports = []
    for name, (count, devices) in {"two": (2, 2), "one": (1, 4)}.items():
        flags = [f"--workdir={network}", "--test_split=test[:40]", "--json"]
        flags += PROBE if command == "linear" else (*TUNE, f"--out={tmp_path / name}")
        processes = start_all(count, command, *flags, devices=devices, stderr=subprocess.PIPE)
        first, *silent = finish(processes)
        assert [process.returncode for process in processes] == [0] * count
        assert silent == [""] * (count - 1)
        reports.append(json.loads(first) | {"workdir": ""})
    assert reports[0] == reports[1]


def embed_flags(network: Path, out: Path, split: str) -> list[str]:
    return [f"--workdir={network}", f"--out={out}", f"--split={split}", "--batch_size=20"]


def embed_alone(network: Path, out: Path, split: str) -> str:
    """What one process with two devices says."""
    process = start(0, "embed", *embed_flags(network, out, split), "--regions")
    (output,) = finish([process])
    assert process.returncode == 0, output
    return output


def test_embed_of_two_processes_is_that_of_one(network, tmp_path):
    alone, out = tmp_path / "alone.npz", tmp_path / "together.npz"
    embed_alone(network, alone, "train[:90]")
    processes = start_all(2, "embed", *embed_flags(network, out, "train[:90]"), "--regions")
    outputs = finish(processes)
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert f"features of 90 images: {out}" in outputs[0] and "features of" not in outputs[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone.npz", "together.npz"]
    expected, found = np.load(alone), np.load(out)
    assert expected["region_features"].shape == (90, 2, 2, 16)
    for name in expected.files:
        np.testing.assert_array_equal(found[name], expected[name])


@pytest.mark.slow
def test_few_shots_of_two_processes_are_those_of_one(one_process):
    """The rows of each block of features are spread over all of their devices."""
    arguments = (f"--workdir={one_process}", "--train_split=train[:300]", "--shots=1,5", "--json")
    output, _ = finish(start_all(2, "fewshot", *arguments))
    (alone,) = finish([start(0, "fewshot", *arguments)])
    assert json_of(output) == json_of(alone)


@pytest.mark.slow
def test_one_device_goes_on_with_a_run_of_two_processes(stopped, one_process, tmp_path):
    workdir = shutil.copytree(stopped[0], tmp_path / "run")
    process = start(0, "train", f"--workdir={workdir}", *OVERRIDES, devices=1)
    (output,) = finish([process])
    assert process.returncode == 0, output
    assert_same_run(workdir, one_process)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["pmap", "shard_map"])
def test_two_processes_take_the_steps_of_one(one_process, tmp_path, mode):
    flags = (f"--workdir={tmp_path}", f"--config.parallel={mode}", *OVERRIDES, WORKERS)
    processes = start_all(2, "train", *flags)
    outputs = finish(processes)
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert_same_run(tmp_path, one_process)


@pytest.mark.slow
def test_two_processes_spread_the_state(one_process, tmp_path):
    """And stop; what they leave goes on likewise, and in one process with whole replicas."""
    mine, other = tmp_path / "mine", tmp_path / "other"
    flags = (f"--workdir={mine}", "--config.parallel=fsdp", *OVERRIDES)
    processes = start_all(2, "train", *flags)
    wait_for_step(mine, 3, processes)
    processes[0].send_signal(signal.SIGTERM)
    outputs = finish(processes)
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert 3 <= len(losses(mine)) < STEPS
    shutil.copytree(mine, other)
    loop.train(run_config("pmap"), other, console=Console(quiet=True))
    assert_same_run(other, one_process)
    processes = start_all(2, "train", *flags)
    outputs = finish(processes)
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert_same_run(mine, one_process)


@pytest.mark.slow
def test_embed_goes_on_after_a_process_has_died(network, tmp_path):
    """With another number of processes; what both had written is not computed again."""
    alone, out, split = tmp_path / "alone.npz", tmp_path / "f.npz", "train[:3000]"
    embed_alone(network, alone, split)
    flags = (*embed_flags(network, out, split), "--regions", "--heartbeat_seconds=10")
    processes = start_all(2, "embed", *flags)
    parts = out.with_name("f.npz.parts")
    while not (parts / "00000075.npz").exists() and processes[1].poll() is None:
        time.sleep(0.01)
    processes[1].kill()
    output, _ = finish(processes)
    assert processes[0].returncode in (RUN_ERROR, -signal.SIGABRT), output
    assert not out.exists() and (parts / "00000000.npz").exists()
    assert "of 150 batches are there already" in embed_alone(network, out, split)
    expected, found = np.load(alone), np.load(out)
    for name in expected.files:
        np.testing.assert_array_equal(found[name], expected[name])


@pytest.mark.slow
def test_eight_processes_of_one_device(one_process, tmp_path):
    """At least five steps of a schedule of 40; then each of them gets SIGTERM."""
    flags = (f"--workdir={tmp_path}", *OVERRIDES, "--config.evaluate.batch_size=96")
    processes = start_all(8, "train", *flags, devices=1)
    wait_for_step(tmp_path, 3, processes)
    for process in processes:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.08)
    outputs = finish(processes, timeout=600)
    assert [process.returncode for process in processes] == [0] * 8, "\n".join(outputs)
    found = losses(tmp_path)
    assert len(found) >= 5
    np.testing.assert_allclose(found[:20], losses(one_process)[: len(found)][:20], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_or_frozen_process_ends_the_other(tmp_path, victim, number):
    """By the broken connection with a line, or by the heartbeat, when jax aborts."""
    flags = ("--heartbeat_seconds=10", "--config.total_steps=100000")
    processes = start_all(2, "train", f"--workdir={tmp_path}", *OVERRIDES, *flags)
    wait_for_step(tmp_path, 3, processes)
    processes[victim].send_signal(number)
    sent, other = time.monotonic(), processes[1 - victim]
    output, _ = other.communicate(timeout=120)
    took = time.monotonic() - sent
    processes[victim].kill()
    finish([processes[victim]])
    assert took < 60
    assert other.returncode in (RUN_ERROR, -signal.SIGABRT), output
    if other.returncode == RUN_ERROR:
        assert "another process is gone" in output.splitlines()[-1]
