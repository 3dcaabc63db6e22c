"""Metrics on disk after kills, progress in both forms, the clock, and the collapse monitors."""

import io
import json
import math
import os
import signal
import struct
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

from esvit_jax.config import default_config
from esvit_jax.runlog.clock import StepClock
from esvit_jax.runlog.collapse import collapse_warning, effective_rank, feature_std
from esvit_jax.runlog.progress import Progress
from esvit_jax.runlog.writer import MetricWriter, read_metrics

# Metrics on disk.


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


# Progress.


def text(console):
    """What was written to a console whose file is a StringIO."""
    return console.file.getvalue()


PACE = {"img_per_s": 250.0, "data_wait_share": 0.012, "seconds_per_step": 2.0}


def test_plain_lines_align():
    console = Console(file=io.StringIO(), width=40)  # narrow, and still one line each
    with Progress(5000, console=console) as progress:
        for step in range(1, 101):
            progress.advance(step)
            if step % 50 == 0:
                progress.update(step, {"loss": jnp.float32(11.5 - step / 10), **PACE})
        progress.print("[a warning] in words, as it is, however long the line may turn out to be")
        progress.update(5000, {"loss": float("nan"), **PACE})
    assert text(console).splitlines() == [
        "step   50/5000  loss  6.5000    250.0 img/s  wait   1.2 %  ETA 2:45:00",
        "step  100/5000  loss  1.5000    250.0 img/s  wait   1.2 %  ETA 2:43:20",
        "[a warning] in words, as it is, however long the line may turn out to be",
        "step 5000/5000  loss     nan    250.0 img/s  wait   1.2 %  ETA 0:00:00",
    ]


def test_terminal_line():
    console = Console(
        file=io.StringIO(), width=100, force_terminal=True, color_system=None, _environ={}
    )
    with Progress(200, first_step=40, console=console) as progress:
        progress.update(60, {"loss": 6.5, **PACE})
        progress.print("[a warning]")
        progress.advance(61)
    screen = text(console)
    assert "\x1b[2K" in screen  # it redraws its line
    last = screen.splitlines()[-2]  # below it, the cursor is shown again
    assert "step 61/200" in last
    assert "loss  6.5000    250.0 img/s  wait   1.2 %  ETA 0:04:40" in last
    assert "━" in last
    assert sum("[a warning]" in line for line in screen.splitlines()) == 1


def test_terminal_line_before_the_first_numbers():
    console = Console(file=io.StringIO(), width=80, force_terminal=True, _environ={})
    with Progress(200, first_step=40, console=console):
        pass
    assert "step 40/200" in text(console)
    assert "compiling" in text(console)


def test_terminal_line_fits_80_columns():
    console = Console(
        file=io.StringIO(), width=80, force_terminal=True, color_system=None, _environ={}
    )
    with Progress(375000, console=console) as progress:
        progress.update(123456, {"loss": 11.0904, **PACE, "seconds_per_step": 1.0})
    last = text(console).splitlines()[-2].split("\x1b[2K")[-1]
    assert last.startswith("step 123456/375000 ")
    assert last.endswith("loss 11.0904    250.0 img/s  wait   1.2 %  ETA 69:52:24")


def test_quiet_console_is_silent():
    console = Console(file=io.StringIO(), quiet=True)
    with Progress(10, console=console) as progress:
        progress.update(5, {"loss": 1.0, **PACE})
        progress.print("words")
    assert text(console) == ""


# Throughput.


def test_clock(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    clock = StepClock()
    for _ in range(4):
        with clock.waiting_for_data():
            now += 0.25
        now += 0.75
    assert clock.report(80) == {"img_per_s": 20, "data_wait_share": 0.25, "seconds_per_step": 1}
    now += 50
    clock.restart()
    with clock.waiting_for_data():
        pass
    now += 2
    assert clock.report(10) == {"img_per_s": 5, "data_wait_share": 0, "seconds_per_step": 2}


# Collapse monitors.


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (64, 24), (2, 300)])
def test_feature_monitors_equal_numpy(shape):
    features = np.random.default_rng(0).normal(size=shape) + 0.5
    unit = np.stack([row / math.sqrt(sum(row**2)) for row in features])
    spread = np.mean([math.sqrt(np.mean((c - c.mean()) ** 2)) for c in unit.T])
    singular = np.linalg.svd(features, compute_uv=False)
    share = singular / singular.sum()
    rank = math.exp(-sum(p * math.log(p) for p in share))
    features = jnp.asarray(features, jnp.float32)
    std = jax.jit(lambda x: feature_std(features=x))(features)
    assert float(std) == pytest.approx(spread * math.sqrt(shape[1]), rel=1e-5)
    measured = jax.jit(lambda x: effective_rank(features=x))(features)
    assert float(measured) == pytest.approx(rank, rel=1e-5)


def test_feature_monitors_at_their_ends():
    rng = np.random.default_rng(0)
    uniform = jnp.asarray(rng.normal(size=(20000, 16)), jnp.float32)
    assert float(feature_std(features=uniform)) == pytest.approx(1, abs=1e-3)
    assert float(effective_rank(features=uniform)) == pytest.approx(16, abs=0.01)
    same = jnp.asarray(np.tile(rng.normal(size=(1, 768)), (96, 1)), jnp.float32)
    assert float(feature_std(features=same)) < 1e-4
    assert float(effective_rank(features=same)) == pytest.approx(1, abs=1e-3)
    # The length of a vector is no spread of its direction.
    longer = same * jnp.arange(1, 97)[:, None]
    assert float(feature_std(features=longer)) < 1e-4
    zeros = jnp.zeros((8, 4))
    assert float(feature_std(features=zeros)) == 0
    assert float(effective_rank(features=zeros)) == 1
    directions = jnp.repeat(jnp.eye(3, 64), 20, axis=0)
    assert float(effective_rank(features=directions)) == pytest.approx(3, abs=1e-4)


HEALTHY = {"teacher_entropy": 0.4, "view_loss": 6.0, "feature_std": 0.7, "feature_rank": 30.0}


@pytest.mark.parametrize(
    ("change", "start"),
    [
        ({}, None),
        ({"teacher_entropy": 0.995, "view_loss": 11.05}, "collapse to uniform"),
        ({"teacher_entropy": 1.0, "view_loss": 11.19}, "collapse to uniform"),
        ({"teacher_entropy": 0.995, "view_loss": 10.9}, None),  # the loss is below ln K
        ({"teacher_entropy": 0.98, "view_loss": 11.09}, None),  # the teacher has a preference
        ({"teacher_entropy": 0.001, "view_loss": 0.02}, "collapse to one prototype"),
        ({"teacher_entropy": 0.001, "view_loss": 3.0}, None),  # sharp, but it differs by image
        ({"feature_std": 0.04}, "collapse of the features"),
        ({"feature_rank": 1.4}, "collapse of the features"),
        ({"feature_std": 0.04, "teacher_entropy": 1.0, "view_loss": 11.09}, "collapse to uniform"),
        (dict.fromkeys(HEALTHY, math.nan), None),
    ],
)
def test_collapse_warning(change, start):
    warning = collapse_warning(HEALTHY | change, num_prototypes=65536)
    assert (warning and warning.split(":")[0]) == start


def test_collapse_warning_names_fields_that_exist_and_repeats_its_words():
    config = default_config().to_dict()
    kinds = [
        {"teacher_entropy": 1.0, "view_loss": math.log(256)},
        {"teacher_entropy": 0.0, "view_loss": 0.0},
        {"feature_std": 0.0},
    ]
    for kind in kinds:
        warning = collapse_warning(HEALTHY | kind, num_prototypes=256)
        assert warning is not None
        changed = HEALTHY | kind | {"loss": 1.234, "feature_rank": 20.0}
        assert collapse_warning(changed, num_prototypes=256) == warning
        fields = [word.strip(",;") for word in warning.split() if word.startswith("config.")]
        assert len(fields) >= 3
        for field in fields:
            section, name = field.split(".")[1:]
            assert name in config[section]
    assert "ln K = 5.55" in str(collapse_warning(HEALTHY | kinds[0], num_prototypes=256))
