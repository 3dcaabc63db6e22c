"""Metrics on disk, after kills too, and what TensorBoard reads."""

import json
import os
import signal
import struct
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

from esvit_jax.runlog.writer import MetricWriter, read_metrics


def read_strict(path):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def read_events(workdir):
    """All TensorBoard events, in the order in which TensorBoard reads the files.

    A record is its length (uint64), a checksum (4 bytes), an Event, another checksum.
    """
    events = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            events.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += 16 + length
    return events


def test_lines_are_strict_json(tmp_path):
    with MetricWriter(tmp_path / "new" / "dir") as writer:
        scalars = {"loss": jnp.float32(2.5), "bad_steps": 3, "rate": np.float64(0.1)}
        writer.write(10, scalars)
        writer.write(20, {"loss": float("nan"), "gradient_norm": jnp.float32(jnp.inf)})
    path = tmp_path / "new" / "dir" / "metrics.jsonl"
    assert read_strict(path) == [
        {"step": 10, "loss": 2.5, "bad_steps": 3, "rate": 0.1},
        {"step": 20, "loss": None, "gradient_norm": None},
    ]
    assert path.read_text().startswith('{"step": 10, "loss"')
    assert read_metrics(path) == read_strict(path)


def test_tensorboard_events(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(10, {"loss": 2.5, "knn/top1/20": 70})
        writer.write(20, {"loss": 2.0})
    values = [
        (e.step, v.tag, v.simple_value) for e in read_events(tmp_path) for v in e.summary.value
    ]
    assert values == [(10, "loss", 2.5), (10, "knn/top1/20", 70), (20, "loss", 2.0)]


def test_resume_reads_as_one_run(tmp_path):
    with MetricWriter(tmp_path / "whole") as writer:
        for step in range(10, 70, 10):
            writer.write(step, {"loss": 100 - step})
            writer.write(step, {"knn/top1/20": step})
    with MetricWriter(tmp_path / "killed") as writer:
        for step in range(10, 50, 10):  # the checkpoint of step 30 is the last one
            writer.write(step, {"loss": 100 - step})
            writer.write(step, {"knn/top1/20": step})
    with MetricWriter(tmp_path / "killed", resume_step=30) as writer:
        for step in range(40, 70, 10):
            writer.write(step, {"loss": 100 - step})
            writer.write(step, {"knn/top1/20": step})
    whole, killed = (
        (tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "killed")
    )
    assert killed == whole
    # TensorBoard hides events from the step of a START (1) on.
    starts = [e.step for e in read_events(tmp_path / "killed") if e.session_log.status == 1]
    assert starts == [0, 31]
    assert len(list((tmp_path / "killed" / "tensorboard").iterdir())) == 2


@pytest.mark.parametrize("torn", [b'{"step": 30, "lo', b'{"step": 30}', b"\x00\x00\x00\n"])
def test_torn_line_is_dropped(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    whole = b'{"step": 10, "loss": 1}\n{"step": 20, "loss": 2}\n'
    path.write_bytes(whole + torn)
    assert [line["step"] for line in read_metrics(path)] == [10, 20]
    with MetricWriter(tmp_path, resume_step=30) as writer:
        assert path.read_bytes() == whole
        writer.write(40, {"loss": 4})
    assert [line["step"] for line in read_strict(path)] == [10, 20, 40]


@pytest.mark.parametrize(
    "damage", [b"\0" * 24 + b"\n", b'{"step": 5, "lo\xff\x80\n', b"5\n", b'{"loss": 1}\n', b"\n"]
)
def test_a_damaged_line_costs_only_itself(tmp_path, damage):
    """As a disk leaves it that lost power: bytes of one line, and whole ones after it."""
    path, said = tmp_path / "metrics.jsonl", []
    lines = [b'{"step": %d, "loss": %d}\n' % (step, 2 * step) for step in range(1, 17)]
    lines[4] = damage
    path.write_bytes(b"".join(lines))
    steps = [step for step in range(1, 17) if step != 5]
    assert [line["step"] for line in read_metrics(path)] == steps
    with MetricWriter(tmp_path, resume_step=14, report=said.append) as writer:
        writer.write(15, {"loss": 30})
    assert path.read_bytes() == b"".join(lines[:4] + lines[5:15])
    assert said == ["damaged and left out: line 5 of metrics.jsonl; those around it are kept"]
    assert not list(tmp_path.glob("*.tmp"))


def test_many_damaged_lines_are_told_in_one_line(tmp_path):
    path, said = tmp_path / "metrics.jsonl", []
    path.write_bytes(b'{"step": 1}\n' + b"?\n" * 12 + b'{"step": 2}\n{"step": 3}\n')
    with MetricWriter(tmp_path, resume_step=2, report=said.append):
        assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    assert len(said) == 1 and "line 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, … of" in said[0]
    with MetricWriter(tmp_path, resume_step=2, report=said.append):
        assert len(said) == 1  # nothing is damaged any more


def test_a_run_from_the_beginning_starts_empty(tmp_path):
    for loss in (1, 2):
        with MetricWriter(tmp_path) as writer:
            writer.write(0, {"loss": loss})
    assert read_strict(tmp_path / "metrics.jsonl") == [{"step": 0, "loss": 2}]


def test_resume_without_a_file(tmp_path):
    with MetricWriter(tmp_path, resume_step=5) as writer:
        writer.write(6, {"loss": 1})
    assert read_strict(tmp_path / "metrics.jsonl") == [{"step": 6, "loss": 1}]


def test_other_processes_write_nothing(tmp_path):
    with MetricWriter(tmp_path, enabled=False) as writer:
        writer.write(1, {"loss": 1})
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_loses_no_line(tmp_path):
    code = (
        "import os, signal, sys; from esvit_jax.runlog.writer import MetricWriter\n"
        "writer = MetricWriter(sys.argv[1])\n"
        "for step in range(5): writer.write(step, {'loss': step})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert [line["loss"] for line in read_strict(tmp_path / "metrics.jsonl")] == list(range(5))
