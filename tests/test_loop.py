"""The loop: resuming, refusing, skipping, stopping, layouts."""

import contextlib
import functools
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import QUICK_COMPILE
from rich.console import Console

from esvit_jax import checkpoint, loop, parallel, preflight, recipe, steps
from esvit_jax.config import resolve
from esvit_jax.data.augment import augment
from esvit_jax.errors import RUN_ERROR, RunError, UserError
from esvit_jax.planning.estimate import StepCost
from esvit_jax.runlog.log import RunLog
from esvit_jax.runlog.writer import read_metrics
from esvit_jax.state import create_state, init_params

QUIET = Console(quiet=True)
CONFIG = os.path.join(os.path.dirname(__file__), "tiny.py")


def losses(workdir):
    return {r["step"]: r["loss"] for r in read_metrics(workdir / "metrics.jsonl") if "loss" in r}


def text_of(console):
    """What was written to a console whose file is a StringIO."""
    return console.file.getvalue()


def environment(*, devices):
    """Of a process that sees so many devices."""
    return os.environ | {
        "XLA_FLAGS": f"{QUICK_COMPILE} --xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": os.pathsep.join([os.path.dirname(CONFIG), os.environ.get("PYTHONPATH", "")]),
        "PYTHONUNBUFFERED": "1",
    }


def start(workdir, *overrides, devices=1, **variables):
    """`esvit train` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "esvit_jax", "train", f"--config={CONFIG}",
         f"--workdir={workdir}", *overrides],
        env=environment(devices=devices) | variables,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A whole run of 8 steps on one device."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    process = start(workdir, "--config.total_steps=8")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return workdir


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
def test_resumed_run_is_bit_equal(uninterrupted, tmp_path, kill):
    """Killed between two checkpoints (3 and 6), or asked to stop; then started again."""
    process = start(tmp_path, "--config.total_steps=8")
    deadline = time.time() + 240
    while time.time() < deadline and process.poll() is None:
        path = tmp_path / "metrics.jsonl"
        done = [r["step"] for r in read_metrics(path)] if path.exists() else []
        saved = (tmp_path / "checkpoints" / "3").exists()
        if done and done[-1] >= 4 and saved:
            process.send_signal(kill)
            break
        time.sleep(0.005)
    output, _ = process.communicate(timeout=120)
    stopped_at = checkpoint.Checkpoints(str(tmp_path)).latest_step()
    if kill == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL, output
        assert stopped_at in (3, 6)
    else:
        assert process.returncode == 0 and "stopped by a signal" in output
        assert stopped_at is not None and stopped_at >= 4

    process = start(tmp_path, "--config.total_steps=8")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert f"from step {stopped_at}" in output
    expected = losses(uninterrupted)
    assert list(expected) == list(range(1, 9))
    assert losses(tmp_path) == expected
    for ours, theirs in zip(
        jax.tree.leaves(checkpoint.load_model(tmp_path)[3:6]),
        jax.tree.leaves(checkpoint.load_model(uninterrupted)[3:6]),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_finished_run_has_nothing_left_to_train(uninterrupted, tiny_config):
    tiny_config.total_steps = 8
    console = Console(file=io.StringIO(), width=200)
    result = loop.train(tiny_config, str(uninterrupted), console=console)
    assert "it has taken all its steps; there is nothing left to train" in text_of(console)
    assert result.step == 8 and result.checkpoint == uninterrupted / "checkpoints" / "8"
    assert list(losses(uninterrupted)) == list(range(1, 9))


def test_other_run_in_workdir_is_refused(uninterrupted, tiny_config):
    tiny_config.total_steps = 9
    before = (uninterrupted / "config.json").read_bytes()
    with pytest.raises(UserError, match=r"another run: config.total_steps was 8 and is 9 now"):
        loop.train(tiny_config, str(uninterrupted), console=QUIET)
    assert (uninterrupted / "config.json").read_bytes() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_compiling_ends_the_process(tmp_path, number):
    """The compiler, which would work on for long, is not waited for."""
    process = start(
        tmp_path / "run", "--config.backbone.depths=(6, 6)", JAX_ENABLE_COMPILATION_CACHE="false"
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("compiling the step"):
            break
    sent = time.monotonic()
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert time.monotonic() - sent < 5
    assert process.returncode == RUN_ERROR
    assert output.splitlines()[-1] == (
        "esvit train: stopped by a signal: nothing was trained after step 0; start it again"
    )


def test_what_cannot_work_leaves_nothing_behind(tiny_config, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    tiny_config.data.train_split = "nowhere"
    with pytest.raises(UserError, match=r"config\.data.*'nowhere'"):
        loop.train(tiny_config, workdir, console=QUIET)
    tiny_config.data.train_split = "train"
    tiny_config.init_from = str(tmp_path / "missing")
    with pytest.raises(UserError, match=r"missing is no workdir"):
        loop.train(tiny_config, workdir, console=QUIET)
    tiny_config.init_from = ""
    monkeypatch.setattr(preflight, "step_cost", lambda *_: StepCost(2**60, 1))
    with pytest.raises(UserError, match=r"config\.batch_size = 8: a step needs about"):
        loop.train(tiny_config, workdir, console=QUIET)
    assert list(tmp_path.iterdir()) == []


class SilentLog(RunLog):
    """Of no run."""

    def __init__(self):
        pass

    @contextlib.contextmanager
    def busy(self, what, spent_on=None):
        yield


@pytest.mark.parametrize("mode", ["pmap", "shard_map"])
def test_what_was_compiled_ahead_is_not_compiled_again(mode):
    compilations = []

    def listen(event, duration_secs, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compilations.append(duration_secs)

    def double(state, batch):
        return jax.lax.psum(state + batch["x"].sum(), steps.AXIS)

    jax.monitoring.register_event_duration_secs_listener(listen)
    step = parallel.on_all_devices(double, mode, donate=True)
    state = parallel.replicate(jnp.zeros(3), mode)
    batch = {"x": np.arange(8, dtype=np.float32).reshape(4, 2)}
    loop.compiled(step, state, batch, what="the step", log=SilentLog())
    before = len(compilations)
    assert before > 0
    np.testing.assert_array_equal(step(state, batch), [28, 28, 28])
    assert len(compilations) == before
    jax.monitoring.unregister_event_duration_listener(listen)


def test_knn_command_evaluates_a_workdir(uninterrupted, tmp_path, capsys):
    from esvit_jax.commands import knn

    knn.main([f"--workdir={uninterrupted}", f"--out={tmp_path}/knn.json"])
    report = json.loads((tmp_path / "knn.json").read_text())
    assert report["step"] == 8 and report["test_images"] == 40 and report["train_images"] == 6000
    assert 0 < report["top1/10"] <= 100
    assert "top-1" in capsys.readouterr().out


def test_training_in_a_thread_loads_neither_tensorflow_nor_torch(uninterrupted, tmp_path):
    """As a notebook may do it, with a config that is not locked."""
    code = (
        "import sys, threading, tiny; from esvit_jax import loop; "
        "c = tiny.tiny_config().unlock(); c.total_steps = 8; c.checkpoint_every_steps = 8; "
        f"run = threading.Thread(target=loop.train, args=(c, {str(tmp_path)!r})); "
        "run.start(); run.join(); "
        "bad = {'tensorflow', 'torch', 'transformers'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, env=environment(devices=1), timeout=300
    )
    assert losses(tmp_path) == losses(uninterrupted)


def test_bad_steps_are_skipped_then_stop_the_run(tiny_config, tmp_path, monkeypatch):
    """Views that are not numbers make every loss not finite."""

    def broken(*arguments):
        return jax.tree.map(lambda x: x * jnp.nan, augment(*arguments))

    monkeypatch.setattr(recipe, "augment", broken)
    tiny_config.max_bad_steps = 3
    tiny_config.total_steps = 50
    with pytest.raises(RunError, match=r"diverged: 3 losses in a row .*bad_step.* new workdir"):
        loop.train(tiny_config, str(tmp_path), console=QUIET)
    batch = np.load(tmp_path / "bad_step" / "batch.npz")
    assert batch["canvas"].shape == (8, 28, 28, 3)
    scalars = json.loads((tmp_path / "bad_step" / "scalars.json").read_text())
    assert scalars["bad_steps"] == 3
    kept = checkpoint.load_model(tmp_path / "bad_step")
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(kept.teacher))


def test_unlabelled_folder_trains_and_knn_is_refused(tiny_config, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    r = np.random.default_rng(0)
    for i in range(9):
        cv2.imwrite(str(photos / f"{i}.jpg"), r.integers(0, 256, (20 + i, 30, 3), np.uint8))
    tiny_config.data.name = f"folder:{photos}"
    tiny_config.total_steps = 2
    last = loop.train(tiny_config, str(tmp_path / "run"), console=QUIET)
    assert np.isfinite(last.scalars["loss"])
    tiny_config.knn_every_steps = 1
    tiny_config.data.test_split = "train"
    with pytest.raises(UserError, match=r"config.knn_every_steps = 1: k-NN needs labels"):
        loop.train(tiny_config, str(tmp_path / "other"), console=QUIET)


def run_steps(config, *, devices, mode, count=3):
    """Params, teacher, centers and losses after a few steps on so many devices."""
    config.backbone.drop_path_rate, config.parallel = 0.5, mode
    config.loss.region_weight = 0.25
    numbers = resolve(config, num_images=6000, num_devices=devices)
    built = recipe.build(config, numbers)
    params = init_params(built.model, jax.random.key(0))
    state = parallel.replicate(create_state(built.model, built.optimizer, params), mode)
    lifted = parallel.on_all_devices(built.step, mode, devices=jax.devices()[:devices])
    r = np.random.default_rng(1)
    seen, features = [], None
    for _ in range(count):
        batch = {
            "canvas": r.integers(0, 256, (8, 28, 28, 3), np.uint8),
            "size": np.tile(np.array([[28, 20]], np.int32), (8, 1)),
        }
        batch = {k: x.reshape(devices, -1, *x.shape[1:]) for k, x in batch.items()}
        state, scalars, features = lifted(state, batch)
        seen.append(float(scalars["loss"]))
        if config.loss.region:
            weighed = 0.75 * scalars["view_loss"] + 0.25 * scalars["region_loss"]
            np.testing.assert_allclose(seen[-1], weighed, rtol=1e-6)
    return state, seen, np.asarray(features)


@pytest.fixture(scope="module")
def one_device():
    """Steps on one device, to compare layouts with."""
    import tiny

    return run_steps(tiny.tiny_config(), devices=1, mode="pmap")


@pytest.mark.parametrize(
    ("devices", "mode", "accum_steps"),
    [(4, "pmap", 1), (4, "shard_map", 1), (2, "pmap", 2), (4, "fsdp", 1)],
)
def test_layouts_give_the_same_run(one_device, tiny_config, tmp_path, devices, mode, accum_steps):
    """Views and drop path included: they depend on an image's place in the global batch alone.

    A checkpoint of any is one of all others.
    """
    tiny_config.accum_steps = accum_steps
    state, seen, features = run_steps(tiny_config, devices=devices, mode=mode)
    expected_state, expected, expected_features = one_device
    np.testing.assert_allclose(seen, expected, rtol=1e-6)
    np.testing.assert_allclose(features, expected_features, rtol=1e-4, atol=1e-5)
    for name in ("params", "teacher", "centers"):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=2e-5),
            getattr(state, name), getattr(expected_state, name),
        )  # fmt: skip
    with contextlib.closing(checkpoint.Checkpoints(str(tmp_path))) as checkpoints:
        checkpoints.save(3, state, force=True)
    with contextlib.closing(checkpoint.Checkpoints(str(tmp_path))) as checkpoints:
        restored = checkpoints.restore(expected_state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert restored.params["backbone"]["norm"]["scale"].sharding.is_fully_replicated


def test_no_device_ever_holds_a_whole_spread_state(tiny_config, tmp_path, monkeypatch):
    """Neither where it is made nor where it is read."""
    earlier, looks = jax.live_arrays(), []

    def looking(function):
        def look(*arguments):
            result = function(*arguments)
            known = {id(x) for x in earlier}
            looks.append([
                x.shape
                for x in jax.live_arrays()
                if id(x) not in known
                and not parallel.shard_sharding(x.shape).is_fully_replicated
                and x.sharding.shard_shape(x.shape) == x.shape  # `.data` would make arrays
            ])  # fmt: skip
            return result

        return look

    monkeypatch.setattr(parallel, "replicate", looking(parallel.replicate))
    monkeypatch.setattr(checkpoint.Checkpoints, "restore", looking(checkpoint.Checkpoints.restore))
    tiny_config.parallel = "fsdp"
    tiny_config.total_steps, tiny_config.checkpoint_every_steps = 2, 1
    tiny_config.knn_every_steps = 0
    expected = loop.train(tiny_config, tmp_path, console=QUIET)
    shutil.rmtree(tmp_path / "checkpoints" / "2")
    found = loop.train(tiny_config, tmp_path, console=QUIET)
    assert looks == [[], [], []]  # made; read, and handed on
    assert found.scalars["loss"] == expected.scalars["loss"]


def test_no_local_views_and_no_regions(tiny_config):
    tiny_config.views.num_local = 0
    tiny_config.loss.region = False
    state, seen, _ = run_steps(tiny_config, devices=1, mode="pmap", count=2)
    assert set(state.centers) == {"view"} and "region_head" not in state.params
    # Two views, teacher = student, no centers yet: the loss is near the entropy of the teacher.
    assert 0 < seen[0] < 2 * np.log(32)


def test_gradients_are_those_of_the_mean_over_devices(tiny_config):
    """`steps.AXIS` is the one axis, and every scalar is the same on all devices."""
    state, _, features = run_steps(tiny_config, devices=4, mode="pmap", count=1)
    assert features.shape == (8, 16)
    assert int(state.step) == 1 and state.step.shape == ()
    assert steps.AXIS == "data"
