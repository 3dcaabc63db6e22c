"""`esvit doctor`: what it measures, what it calls bad, what it leaves behind."""

import json
import os
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import QUICK_COMPILE

from esvit_jax import __main__ as command_line
from esvit_jax import doctor, parallel, preflight
from esvit_jax.errors import UserError
from esvit_jax.preflight import GIB


def esvit(monkeypatch, capsys, *argv):
    """Status and what was printed, of `esvit doctor` in this process."""
    monkeypatch.setattr(sys, "argv", ["esvit", "doctor", *argv])
    monkeypatch.setenv("GLIBC_TUNABLES", "")
    return command_line.main(), *capsys.readouterr()


def test_devices_add_up():
    ok, text, values = doctor.all_reduce()
    assert ok and text.startswith("4 devices add up, 4 MiB of each in ")
    assert values["bandwidth"] == pytest.approx(1.5 * 4 * 2**20 / values["seconds"])


def test_a_wrong_sum_is_bad(monkeypatch):
    """A device that does not take part."""

    def without_the_last(step, mode):
        return lambda _, arrays: np.asarray(arrays)[:-1].sum(0)

    monkeypatch.setattr(parallel, "on_all_devices", without_the_last)
    ok, text, _ = doctor.all_reduce()
    assert not ok and text == "4 devices add up to 6, not 10"


def test_an_accelerator_that_is_not_used_is_bad(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "ACCELERATORS", {str(tmp_path / "none"): "tpu"})
    ok, text, values = doctor.devices()
    assert ok and text.startswith("4 × cpu of ") and values["count"] == 4
    monkeypatch.setattr(doctor, "ACCELERATORS", {str(tmp_path): "cuda"})
    ok, text, _ = doctor.devices()
    assert not ok and text.endswith("pip install 'esvit_jax[cuda]'")


def test_other_versions_are_bad(monkeypatch):
    ok, text, values = doctor.versions()
    assert ok and f"jax {jax.__version__}" in text and values["jax"] == jax.__version__
    versions = {"jax": "0.10.2", "jaxlib": "0.9.0"}
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: versions.get(name, "1"))
    assert not doctor.versions()[0]


def test_a_checkpoint_goes_there_and_back(tmp_path):
    workdir = tmp_path / "run"
    assert doctor.checkpoint(str(workdir))[0]
    assert list(tmp_path.iterdir()) == []
    workdir.mkdir()
    (workdir / "config.json").touch()
    ok, text, values = doctor.checkpoint(str(workdir))
    assert ok and str(workdir) in text and values["write_seconds"] > 0
    assert [path.name for path in workdir.iterdir()] == ["config.json"]


def test_a_checkpoint_that_comes_back_otherwise_is_bad(tmp_path, monkeypatch):
    restore = doctor.ocp.StandardCheckpointer.restore

    def damaged(self, *arguments):
        return jax.tree.map(lambda x: x.at[-1].add(1), restore(self, *arguments))

    monkeypatch.setattr(doctor.ocp.StandardCheckpointer, "restore", damaged)
    ok, text, _ = doctor.checkpoint(str(tmp_path / "run"))
    assert not ok and "came back as something else" in text
    assert list(tmp_path.iterdir()) == []


def test_clocks(tmp_path, monkeypatch):
    ok, text, values = doctor.clocks(str(tmp_path / "not" / "yet"))
    assert ok and set(values) == {"processes", "workdir"}
    assert list(tmp_path.iterdir()) == []
    ahead = time.time() + 30
    monkeypatch.setattr(doctor.time, "time", lambda: ahead)
    ok, text, values = doctor.clocks(str(tmp_path))
    assert not ok and 29 < values["workdir"] < 31 and "NTP" in text
    monkeypatch.setattr(doctor.multihost_utils, "sync_global_devices", lambda name: None)
    monkeypatch.setattr(
        doctor.multihost_utils, "process_allgather", lambda x: np.stack([x, x + [3, 0], x])
    )
    assert doctor.clocks(None)[2]["processes"] == pytest.approx(3, abs=1e-5)


def test_data_are_read(tiny_config, monkeypatch):
    monkeypatch.setattr(doctor, "READING", 0.2)
    ok, text, values = doctor.data(tiny_config)
    assert ok and values["records"] == 6000 and values["records_per_second"] > 0
    assert text.startswith("bundled/fashion_mnist_mini train: 6,000 records, ")
    tiny_config.data.name = "folder:/nowhere"
    finding = doctor.within(60.0, "data", lambda: doctor.data(tiny_config))
    assert not finding.ok and finding.text.startswith("config.data.name = 'folder:/nowhere'")


SIZE = preflight.Size(
    backbone_parameters=1, parameters=1, step_bytes=3 * GIB, step_operations=1, state_bytes=GIB,
    memory=4 * GIB,
)  # fmt: skip


def test_what_the_run_needs(tiny_config, monkeypatch, tmp_path):
    monkeypatch.setattr(preflight, "measure_size", lambda *_: SIZE)
    monkeypatch.setattr(doctor, "available_memory", lambda: 14 * GIB)
    batches = 8 * 8 * 3 * 28**2
    assert doctor.host_bytes(tiny_config, SIZE) == 4 * 3 * GIB + GIB + batches
    ok, text, values = doctor.room(tiny_config, str(tmp_path))
    assert ok and values["host_memory"] == 14 * GIB
    assert text.startswith("a step needs about 3.0 GiB a device of 4.0; the host about 13.0 GiB of")
    monkeypatch.setattr(doctor, "available_memory", lambda: 13 * GIB)
    assert not doctor.room(tiny_config, None)[0]
    monkeypatch.setattr(preflight, "measure_size", lambda *_: SIZE._replace(memory=GIB))
    with pytest.raises(UserError, match="config.batch_size"):
        doctor.room(tiny_config, None)


def test_what_hangs_or_fails_is_named():
    def fails():
        raise OSError("no such bucket\n  at all")

    assert doctor.within(60.0, "x", fails).text == "OSError: no such bucket at all"
    finding = doctor.within(0.01, "x", lambda: time.sleep(5) or (True, "", {}))
    assert finding == ("x", False, "no answer within 0 s", {}, True)


def test_command(monkeypatch, capsys, tmp_path):
    findings = [doctor.Finding("a", True, "well", {"n": 1}), doctor.Finding("b", True, "[x]", {})]
    asked = []

    def examine(workdir, config):
        asked.append((workdir, config and config.batch_size))
        return iter(findings)

    monkeypatch.setattr(doctor, "examine", examine)
    status, out, err = esvit(monkeypatch, capsys, "--workdir=w")
    assert (status, err) == (0, "") and asked == [("w", None)]
    assert out.splitlines() == ["ok      a                well", "ok      b                [x]"]
    findings.append(doctor.Finding("c d", False, "ill", {}))
    status, out, err = esvit(monkeypatch, capsys, "--config=quickstart", "--config.batch_size=4")
    assert (status, asked[1]) == (3, (None, 4))
    assert out.splitlines()[-1] == "FAILED  c d              ill"
    assert err == "esvit doctor: 1 of 3 checks failed: c d\n"
    status, out, err = esvit(monkeypatch, capsys, "--json")
    report = json.loads(out)
    assert status == 3 and not report["ok"]
    assert report["checks"][0] == {
        "check": "a", "ok": True, "text": "well", "values": {"n": 1}, "hangs": False
    }  # fmt: skip


def test_all_checks_are_made(tiny_config, monkeypatch, tmp_path):
    names = ("versions", "devices", "all_reduce", "data", "room", "checkpoint", "clocks")
    for name in names:
        monkeypatch.setattr(doctor, name, lambda *_, name=name: (True, name, {}))
    assert [x.text for x in doctor.examine(str(tmp_path), tiny_config)] == list(names)
    assert [x.text for x in doctor.examine()] == ["versions", "devices", "all_reduce", "clocks"]


def test_two_processes(tmp_path):
    """With two devices each, on loopback."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = f"{QUICK_COMPILE} --xla_force_host_platform_device_count=2"
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "esvit_jax", "doctor", f"--coordinator={address}",
             "--num_processes=2", f"--process_id={i}", f"--workdir={tmp_path / 'run'}", "--json"],
            env=os.environ | {"XLA_FLAGS": flags}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for i in range(2)
    ]  # fmt: skip
    outputs = []
    for process in running:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        outputs.append([line for line in out.splitlines() if line.startswith("{")])
    [[report], nothing] = outputs
    assert nothing == []
    checks = {check["check"]: check for check in json.loads(report)["checks"]}
    assert [name for name, check in checks.items() if not check["ok"]] == []
    assert list(checks) == ["versions", "devices", "all-reduce", "checkpoint", "clocks"]
    assert checks["devices"]["values"]["processes"] == 2
    assert checks["all-reduce"]["text"].startswith("4 devices add up, ")
    assert list(tmp_path.iterdir()) == []
