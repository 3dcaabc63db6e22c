"""launch/measure_gpu.sh measures what it can, says what it could not, and makes tables of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from esvit_jax.bench.peaks import peak_flops
from esvit_jax.bench.report import report
from esvit_jax.errors import UserError

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "launch" / "measure_gpu.sh"
WHERE = {"device": "NVIDIA H100 80GB HBM3", "date": "2026-11-25", "versions": {"jax": "0.10.2"}}
OURS = {"step": [0.2, 0.1, 0.3], "images_per_second": 160.0, "peak_bytes": 3 * 2**29, "mfu": 0.123}
PEER = {"step": [0.25, 0.2, 0.3], "images_per_second": 128.0, "peak_bytes": 2**31}
# Stands in for Python: there is no memory for 4 images of ours, and no compiled peer.
STUB = f"""#!/usr/bin/env bash
echo "$@" >> "$0.calls"
case "$*" in
  *bench.report*) exec {sys.executable} "$@" ;;
  *batch_size=4*--parts=step*) echo "XlaRuntimeError: RESOURCE_EXHAUSTED" >&2; exit 1 ;;
  *--peer=torch-compiled*) exit 2 ;;
  *--peer=torch*) [[ $XLA_PYTHON_CLIENT_ALLOCATOR == platform ]] && echo '{{"peer_alone": PEER}}' ;;
  *--parts=step*) echo '{{"step": OURS}}' ;;
  *) echo '{{}}' ;;
esac
"""


def measure(folder, *arguments, **environment):
    """Runs the script in one virtual device's world; returns what it printed."""
    environment = os.environ | {"PYTHON": sys.executable, "XLA_FLAGS": "", **environment}
    run = subprocess.run(
        [SCRIPT, folder, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def results(*values: dict) -> str:
    return json.dumps({"where": WHERE} | {name: x for v in values for name, x in v.items()})


@pytest.fixture(name="stub")
def _stub(tmp_path):
    text = STUB.replace("{}'", results() + "'")
    text = text.replace('{"step": OURS}', results({"step": OURS}))
    text = text.replace('{"peer_alone": PEER}', results({"peer_alone": PEER}))
    path = tmp_path / "python"
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_a_failure_ends_no_other_and_is_tried_again(tmp_path, stub):
    folder = tmp_path / "results"
    settings = {"PYTHON": str(stub), "BATCHES": "2 4 8", "DTYPES": "float32"}
    text = measure(folder, **settings)
    assert "2-float32-ours: measured" in text
    assert "8-float32-ours: no result (status not-tried)" in text
    rows = [line for line in text.splitlines() if line.startswith("| float32")]
    assert rows == [
        "| float32 | 2 | 200.0 | 160 | 1.5 | 12.3% | 250.0 | 2.0 | 0.80 | failed |  |  |",
        "| float32 | 4 | out of memory |  |  |  | 250.0 | 2.0 |  | not tried |  |  |",
        "| float32 | 8 | not tried |  |  |  | 250.0 | 2.0 |  | not tried |  |  |",
    ]
    assert (folder / "report.md").read_text() in text
    assert "(NVIDIA H100 80GB HBM3, 2026-11-25, jax 0.10.2)" in text
    calls = Path(f"{stub}.calls")
    calls.unlink()
    measure(folder, **settings)
    again = calls.read_text().splitlines()
    assert len(again) == 4  # where, the two that failed, the report
    assert "--config.batch_size=4" in again[1] + again[2]
    assert "--config.batch_size=2" in again[1] + again[2]


def test_what_finds_no_time_left_is_said(tmp_path, stub):
    settings = {"PYTHON": str(stub), "BATCHES": "2 4", "DTYPES": "float32", "WHO": "ours"}
    text = measure(tmp_path / "results", BUDGET="5", **settings)
    assert "| float32 | 2 | no time |" in text
    assert "| float32 | 4 | not tried |" in text


def test_dry_run_prints_the_commands(tmp_path):
    lines = measure(tmp_path / "results", "--dry-run", PYTHON="python3").splitlines()
    assert not (tmp_path / "results").exists()
    assert len(lines) == 4 * 2 * 3 + 1
    assert lines[0] == (
        "python3 -m esvit_jax bench --config=esvit_swin --config.dtype=bfloat16 "
        "--config.batch_size=32 --rounds=15 --json --parts=step"
    )
    assert lines[2].endswith("--parts= --peer=torch-compiled --alone")
    assert "--config.dtype=float32 --config.batch_size=256" in lines[-2]
    training = measure(tmp_path / "results", "--dry-run", "--train", PYTHON="python3")
    assert training.splitlines()[0].startswith("python3 -m esvit_jax train --config=quickstart")


def test_a_wrong_flag_ends_in_a_line(tmp_path):
    run = subprocess.run([SCRIPT, tmp_path, "--large"], capture_output=True, text=True)
    assert run.returncode == 2
    assert "--large is no flag" in run.stderr
    assert len(run.stderr.splitlines()) == 1


def test_the_small_form_measures(tmp_path):
    text = measure(tmp_path / "results", "--small", BATCHES="2", WHO="ours", ROUNDS="1")
    result = json.loads((tmp_path / "results" / "2-float32-ours.json").read_text())
    milliseconds, speed = 1e3 * result["step"]["step"][0], result["step"]["images_per_second"]
    assert f"| float32 | 2 | {milliseconds:.1f} | {speed:.0f} |  |  | not yet measured |" in text
    assert text.count("(cpu, ") == 1


@pytest.mark.slow
def test_the_small_form_with_a_peer_and_a_training(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    folder = tmp_path / "results"
    measure(folder, "--small", BUDGET="900")
    text = measure(folder, "--small", "--train")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| float32")]
    assert [row[1] for row in rows] == ["2", "4"]
    for row in rows:
        assert float(row[8]) == pytest.approx(float(row[2]) / float(row[6]), abs=0.006)
    assert text.count("| raw pixels |") == text.count("| step 4 |") == 1


def test_a_training_is_told_by_its_metrics(tmp_path):
    (tmp_path / "where.json").write_text(results())
    (tmp_path / "train").mkdir()
    lines = [
        {"step": 0, "raw_pixels/knn/top1/10": 82.66, "raw_pixels/knn/top1/20": 82.1},
        {"step": 0, "knn/top1/10": 63.5, "knn/top1/20": 63.1},
        {"step": 50, "loss": 3.0, "img_per_s": 100.0, "data_wait_share": 0.5},
        {"step": 100, "loss": 2.0, "img_per_s": 300.0, "data_wait_share": 0.02},
        {"step": 150, "loss": 2.0, "img_per_s": 200.0, "data_wait_share": 0.03},
        {"step": 150, "knn/top1/10": 68.4, "knn/top1/20": 68.1},
    ]
    text = "\n".join(map(json.dumps, lines)) + "\n"
    (tmp_path / "train" / "metrics.jsonl").write_text(text)
    assert report(tmp_path).splitlines()[2:] == [
        "150 steps at 200 images/s, of which it waited for data 3.0% (medians).",
        "",
        "| k-NN top-1, % | k = 10 | k = 20 |",
        "| --- | ---: | ---: |",
        "| raw pixels | 82.7 | 82.1 |",
        "| step 0 | 63.5 | 63.1 |",
        "| step 150 | 68.4 | 68.1 |",
    ]


def test_a_folder_of_nothing_or_of_two_machines_is_refused(tmp_path):
    with pytest.raises(UserError, match="^folder = '.*': it has no measurements"):
        report(tmp_path)
    (tmp_path / "where.json").write_text(results())
    other = {"where": WHERE | {"device": "NVIDIA L4"}, "step": OURS}
    (tmp_path / "2-float32-ours.json").write_text(json.dumps(other))
    (tmp_path / "2-float32-ours.status").write_text("0\n")
    with pytest.raises(UserError, match="2-float32-ours.json is of another machine"):
        report(tmp_path)


def test_peaks_are_of_dense_products():
    assert peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-40GB", "float32") == 156e12
    assert peak_flops("NVIDIA L40S", "bfloat16") is None
    assert peak_flops("cpu", "float32") is None
    # Of a device, which is half a chip of a v3 and of a v7x, and two cores of a v5p.
    assert peak_flops("TPU v3", "bfloat16") == 61.5e12
    assert peak_flops("TPU7x", "bfloat16") == 2307e12 / 2
    assert peak_flops("TPU v5p", "float32") == 459e12
