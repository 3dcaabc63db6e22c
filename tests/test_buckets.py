"""Workdirs, data and files in a bucket, behind a real server on this machine."""

import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from etils import epath
from etils.epath import backend
from rich.console import Console
from test_loop import environment

import esvit_jax
from esvit_jax import buckets, checkpoint, loop
from esvit_jax.commands import embed, finetune, knn, linear
from esvit_jax.data import sources
from esvit_jax.errors import RUN_ERROR, RunError, UserError
from esvit_jax.lock import Lock
from esvit_jax.runlog.writer import MetricWriter, read_metrics
from esvit_jax.workdir import usable_workdir

bucket = pytest.importorskip("bucket")
CONFIG = os.path.join(os.path.dirname(__file__), "tiny.py")


def run_losses(workdir):
    lines = read_metrics(epath.Path(workdir) / "metrics.jsonl")
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def start(server, command, *flags):
    """A command in a process of its own, on one device."""
    return subprocess.Popen(
        [sys.executable, "-m", "esvit_jax", command, *flags],
        env=environment(devices=1) | server.environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def train(server, workdir, *overrides):
    return start(server, "train", f"--config={CONFIG}", f"--workdir={workdir}", *overrides)


def finished(process, status=0, timeout=300):
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == status, output
    return output


# Folders.


def test_a_folder_is_tried_and_left_empty(server, remote):
    assert usable_workdir(f"{remote}/") == remote
    assert not list(bucket.listing(server, "/".join(remote.parts[3:])))


def test_no_bucket(server):
    with pytest.raises(UserError) as error:
        usable_workdir("gs://nowhere/run")
    assert str(error.value) == (
        "workdir = 'gs://nowhere/run': there is no bucket nowhere, or you may not see it"
    )


def test_no_permission(remote, monkeypatch):
    def refuse(*arguments):
        raise OSError("Forbidden: b/bucket/o\nyou lack storage.objects.create")

    monkeypatch.setattr(backend.fsspec_backend, "open", refuse)
    with pytest.raises(
        UserError, match=r"run': it cannot be written to: Forbidden: b/bucket/o you"
    ):
        usable_workdir(remote / "run")


def test_without_gcsfs(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    buckets.make_ready.cache_clear()
    for function in (usable_workdir, checkpoint.load_model):
        with pytest.raises(UserError, match=r"need gcsfs: pip install 'esvit_jax\[gcs\]'$"):
            function("gs://bucket/run")
    buckets.make_ready.cache_clear()


def test_errors_of_clients_name_the_path(remote):
    class ClientError(Exception):
        pass

    ClientError.__module__ = "aiohttp.client_exceptions"
    for error in (ClientError("gone"), ValueError(f"{remote}/x: CURL error")):
        with pytest.raises(RunError) as caught, buckets.reaching(remote):
            raise error
        assert str(caught.value).startswith(f"{remote} cannot be reached: ")
        assert len(str(caught.value).splitlines()) == 1
    damaged = ValueError(f"DATA_LOSS: {remote}/x: checksum")
    for error in (
        damaged,
        ValueError("CURL error"),
        UserError(f"{remote}: a mistake"),
        KeyError("x"),
    ):
        with pytest.raises(type(error)) as caught, buckets.reaching(remote):
            raise error
        assert caught.value is error


# Metrics.


def test_metrics_are_there_after_a_flush_and_go_on(remote):
    with MetricWriter(remote) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": step})
        assert not (remote / "metrics.jsonl").exists()
        writer.flush()
        assert [line["step"] for line in read_metrics(remote / "metrics.jsonl")] == [1, 2, 3]
        writer.write(4, {"loss": 4})
    assert [line["step"] for line in read_metrics(remote / "metrics.jsonl")] == [1, 2, 3, 4]
    with MetricWriter(remote, resume_step=2) as writer:
        writer.write(3, {"loss": 30})
    assert [line["loss"] for line in read_metrics(remote / "metrics.jsonl")] == [1, 2, 30]
    assert len(list((remote / "tensorboard").iterdir())) == 2


# A run.


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A whole run of 8 steps on a disk, to compare with."""
    workdir = tmp_path_factory.mktemp("local")
    process = subprocess.Popen(
        [sys.executable, "-m", "esvit_jax", "train", f"--config={CONFIG}",
         f"--workdir={workdir}", "--config.total_steps=8"],
        env=environment(devices=1), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    finished(process)
    return workdir


# A run of 8 steps that kills a process, itself or the server, while it saves after step 6.
INTERRUPTED = """
import os, signal, sys
from esvit_jax import checkpoint
from esvit_jax.__main__ import run

config, workdir, victim = sys.argv[1:]
save = checkpoint.Checkpoints.save

def interrupted(self, step, *arguments, **named):
    if step == 6:
        self._manager.wait_until_finished()  # step 3 is whole
    save(self, step, *arguments, **named)
    if step == 6:
        os.kill(int(victim) or os.getpid(), signal.SIGKILL)

checkpoint.Checkpoints.save = interrupted
flags = [f"--config={config}", f"--workdir={workdir}", "--config.total_steps=8"]
sys.exit(run("train", flags))
"""


def train_interrupted(server, workdir, victim=0):
    return subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, CONFIG, str(workdir), str(victim)],
        env=environment(devices=1) | server.environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def killed(server, local):
    """The same in a bucket, killed in the middle of its second save, and started again."""
    workdir = epath.Path("gs://bucket/killed")
    finished(train_interrupted(server, workdir), -signal.SIGKILL)
    assert (workdir / "lock.json").exists()
    assert list(run_losses(workdir)) == [1, 2, 3, 4, 5, 6]  # all up to the save are there
    step = max(kept_steps(server, "killed"))
    assert step in (3, 6)
    assert f"from step {step})" in finished(train(server, workdir, "--config.total_steps=8"))
    return workdir


def kept_steps(server, workdir):
    """Steps of checkpoints that are whole."""
    paths = [name.split("/") for name in bucket.listing(server, f"{workdir}/checkpoints/")]
    return sorted(int(path[2]) for path in paths if path[3:] == ["commit_success.txt"])


def test_a_killed_run_goes_on_bit_equal(server, local, killed):
    assert list(run_losses(killed)) == list(range(1, 9))
    assert run_losses(killed) == run_losses(local)
    ours, theirs = checkpoint.load_model(killed), checkpoint.load_model(local)
    assert ours.step == theirs.step == 8
    jax.tree.map(np.testing.assert_array_equal, ours[3:6], theirs[3:6])
    assert not (killed / "lock.json").exists()
    for name in ("loss.png", "views.png"):
        assert (killed / "figures" / name).read_bytes().startswith(b"\x89PNG")
    config = json.loads((killed / "config.json").read_text())
    assert config == json.loads((local / "config.json").read_text())


def test_a_second_run_is_refused(killed, tiny_config):
    tiny_config.total_steps = 8
    lock = Lock(killed, 60.0)
    before = (killed / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=rf"another run is there: process {os.getpid()} of "):
        loop.train(tiny_config, killed, console=Console(quiet=True))
    assert (killed / "metrics.jsonl").read_bytes() == before
    lock.check()
    lock.close()


def test_evaluations_read_and_write(killed, local, tmp_path, capsys):
    knn.main([f"--workdir={killed}"])
    knn.main([f"--workdir={local}", f"--out={tmp_path}/knn.json"])
    assert json.loads((killed / "knn.json").read_text()) == json.loads(
        (tmp_path / "knn.json").read_text()
    )
    data = ["--data=bundled/fashion_mnist_mini", "--split=test[:40]"]
    embed.main([f"--workdir={killed}", f"--out={killed}/features.npz", *data])
    embed.main([f"--workdir={local}", f"--out={tmp_path}/features.npz", *data])
    with (killed / "features.npz").open("rb") as file:
        ours = dict(np.load(io.BytesIO(file.read())))
    theirs = np.load(tmp_path / "features.npz")
    np.testing.assert_array_equal(ours["view_features"], theirs["view_features"])
    assert list(ours["id"]) == list(theirs["id"]) and len(ours["id"]) == 40
    with pytest.raises(UserError, match=r"--out=gs://.*features.npz: it exists already"):
        embed.main([f"--workdir={killed}", f"--out={killed}/features.npz", *data])


def test_training_on_labels_reads_and_writes(killed, local, tmp_path):
    """From a bucket, with what is kept on the way in it, as from a local folder."""
    data = ["--train_split=train[:60]", "--test_split=test[:40]", "--epochs=2", "--batch_size=20"]
    probe = [*data, "--blocks=1,2", "--learning_rates=0.1,1"]
    linear.main([f"--workdir={killed}", f"--out={killed}/probe.json", *probe])
    linear.main([f"--workdir={local}", f"--out={tmp_path}/probe.json", *probe])
    ours = json.loads((killed / "probe.json").read_text())
    assert ours == json.loads((tmp_path / "probe.json").read_text())

    data.append("--warmup_epochs=0")
    finetune.main([f"--workdir={killed}", f"--out={killed}/tuned", *data])
    finetune.main([f"--workdir={local}", f"--out={tmp_path}/tuned", *data])
    ours, theirs = (esvit_jax.load(f"{folder}/tuned") for folder in (killed, tmp_path))
    jax.tree.map(np.testing.assert_array_equal, ours.variables, theirs.variables)
    files = {path.name for path in (killed / "tuned").iterdir()}
    assert files >= {"checkpoints", "classifier.npz", "config.json", "metrics.jsonl"}


def test_exports_and_conversions_read(killed, tmp_path):
    esvit_jax.export(killed, tmp_path / "out", format="esvit")
    (weights,) = [p for p in (tmp_path / "out").iterdir() if p.suffix == ".safetensors"]
    (killed / "weights.safetensors").write_bytes(weights.read_bytes())
    esvit_jax.convert(f"{killed}/weights.safetensors", tmp_path / "converted")
    esvit_jax.convert(weights, tmp_path / "expected")
    ours, theirs = (checkpoint.load_model(tmp_path / n) for n in ("converted", "expected"))
    jax.tree.map(np.testing.assert_array_equal, ours.teacher, theirs.teacher)
    with pytest.raises(UserError, match=r"source = 'gs://.*none.pth': there is no such file"):
        esvit_jax.convert(f"{killed}/none.pth", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_partial_upload_is_no_checkpoint(remote, killed):
    """The last object of a checkpoint says that it is whole; until then it is not there."""
    for name in ("config.json", "checkpoints/6", "checkpoints/8"):
        copy_tree(killed / name, remote / name)
    (remote / "checkpoints" / "8" / "commit_success.txt").unlink()
    assert checkpoint.load_model(remote).step == 6
    assert checkpoint.Checkpoints(str(remote)).latest_step() == 6
    (remote / "checkpoints" / "6" / "commit_success.txt").unlink()
    assert not checkpoint.has_checkpoint(remote)
    with pytest.raises(UserError, match="has no checkpoint; it has none"):
        checkpoint.load_model(remote)


def copy_tree(source, target):
    if not source.is_dir():
        target.write_bytes(source.read_bytes())
        return
    for path in source.iterdir():
        copy_tree(path, target / path.name)


# A server that goes away.


@pytest.mark.slow
def test_a_server_that_is_gone_is_named():
    """Words after some seconds, and one line in the end; half a minute of gcsfs's patience."""
    gone = {name: "http://127.0.0.1:9" for name in bucket_variables()}
    code = (
        "import sys; from esvit_jax.workdir import usable_workdir; from esvit_jax import errors\n"
        "try: usable_workdir('gs://bucket/run')\n"
        "except errors.RunError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | gone, capture_output=True, text=True,
        timeout=100, check=True,
    )  # fmt: skip
    assert done.stdout.startswith("gs://bucket/run cannot be reached: Cannot connect to host 127")
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr.splitlines()[0] == "waiting for gs://bucket/run (5 s)"


def bucket_variables():
    return ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL", "CLOUD_STORAGE_EMULATOR_ENDPOINT")


@pytest.fixture
def own_server(tmp_path):
    """One that may be killed; its content outlives it."""
    server = bucket.Server(tmp_path / "content")
    yield server
    server.stop()


def losses_there(server):
    lines = map(json.loads, server.content("run/metrics.jsonl").splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}  # the account has none


@pytest.mark.slow
def test_a_server_that_comes_back_is_waited_for(own_server, local):
    process = train_interrupted(own_server, "gs://bucket/run", own_server.process.pid)
    own_server.process.wait(timeout=300)
    time.sleep(20)
    own_server.start()
    finished(process)
    assert kept_steps(own_server, "run") == [6, 8]
    assert losses_there(own_server) == run_losses(local)


@pytest.mark.slow
def test_a_server_that_is_gone_for_good(own_server, local):
    process = train_interrupted(own_server, "gs://bucket/run", own_server.process.pid)
    own_server.process.wait(timeout=300)
    gone = time.monotonic()
    output = finished(process, RUN_ERROR)
    assert time.monotonic() - gone < 240
    lines = output.splitlines()
    assert lines[-1].startswith("esvit train: gs://bucket/run cannot be reached: ")
    assert "Traceback" not in output
    assert any(line.startswith("waiting for gs://bucket/run") for line in lines)
    own_server.start()
    assert kept_steps(own_server, "run") == [1, 3]
    assert "from step 3)" in finished(
        train(own_server, "gs://bucket/run", "--config.total_steps=8")
    )
    assert losses_there(own_server) == run_losses(local)


@pytest.mark.slow
def test_data_in_a_bucket(server, remote):
    """array_record files are read by array_record itself, with a client of its own."""
    folder = sources.BUNDLED / "fashion_mnist_mini"
    for path in folder.iterdir():
        (remote / path.name).write_bytes(path.read_bytes())
    code = (
        "import sys, hashlib; from esvit_jax.data.sources import open_source\n"
        "source = open_source(sys.argv[1], 'train')\n"
        "records = [source[i] for i in range(0, len(source), 500)]\n"
        "print(len(source), [hashlib.sha1(r['image']).hexdigest() for r in records])\n"
        "print([r['id'] for r in records])"
    )
    seen = [
        subprocess.run(
            [sys.executable, "-c", code, str(place)], env=os.environ | server.environment,
            capture_output=True, text=True, timeout=100, check=True,
        ).stdout
        for place in (remote, folder)
    ]  # fmt: skip
    assert seen[0] == seen[1] and seen[0].startswith("6000 [")


@pytest.mark.slow
def test_data_that_is_gone_while_training(own_server, tmp_path, monkeypatch):
    """array_record's client would wait for ever; a word after half a minute, then one line."""
    for name, url in own_server.environment.items():
        monkeypatch.setenv(name, url)
    code = (
        "import sys; from pathlib import Path; from etils import epath\n"
        "from esvit_jax import buckets; buckets.make_ready()\n"
        "for path in filter(Path.is_file, Path(sys.argv[1]).iterdir()):\n"
        "    (epath.Path('gs://bucket/data') / path.name).write_bytes(path.read_bytes())"
    )
    folder = str(sources.BUNDLED / "fashion_mnist_mini")
    subprocess.run([sys.executable, "-c", code, folder], check=True, timeout=100)
    process = train(
        own_server, tmp_path / "run", "--config.total_steps=100000",
        "--config.data.name=gs://bucket/data", "--config.data.max_wait_seconds=35",
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step      4/"):
            break
    own_server.stop()
    lines = finished(process, RUN_ERROR).splitlines()
    assert lines[-1].startswith(
        "esvit train: nothing came of gs://bucket/data train for 35 s (max_wait_seconds): "
    )
    assert "waiting for gs://bucket/data train: nothing for 30 of at most 35 s" in lines[-2]
    assert checkpoint.load_model(tmp_path / "run").step >= 3
