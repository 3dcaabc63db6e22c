"""The pace of a loop and the account of its time, on a clock that the test moves."""

import io
import time

import jax.numpy as jnp
import pytest
from rich.console import Console

from esvit_jax.config import resolve
from esvit_jax.evaluate.result import results_of_lines
from esvit_jax.runlog.clock import SPENT_ON, StepClock, TimeAccount, carried_over
from esvit_jax.runlog.log import RunLog
from esvit_jax.runlog.writer import read_metrics


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


def test_every_second_counts_once(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    account = TimeAccount({"lost": 10.0, "step": 1.0})
    now += 3
    with account.spent_on("compile"):
        now += 5
        with account.spent_on("data"):
            now += 0.5
        now += 5
    now += 1
    account.switch("step")
    with pytest.raises(KeyError), account.spent_on("evaluation"):
        now += 2
        raise KeyError
    now += 60
    seconds = {"start": 4.0, "compile": 10.0, "step": 61.0, "data": 0.5, "checkpoint": 0.0,
               "evaluation": 2.0, "lost": 10.0}  # fmt: skip
    report = account.report()
    assert report == {f"spent_{what}": x for what, x in seconds.items()} | {"goodput": 61 / 87.5}
    now += 12.5
    assert account.report()["goodput"] == 73.5 / 100


def line(done, **seconds):
    return {"step": done} | {f"spent_{what}": x for what, x in seconds.items()}


def test_what_came_after_the_checkpoint_is_lost():
    lines = [
        {"step": 0, "knn/top1/10": 60.0},
        line(50, compile=30.0, step=100.0),
        line(100, compile=30.0, step=200.0, lost=7.0),
        line(150, compile=30.0, step=290.0, lost=7.0, data=10.0),
        {"step": 170, "knn/top1/10": 60.0},
    ]
    zeros = dict.fromkeys(SPENT_ON, 0.0)
    kept = zeros | {"compile": 30.0, "step": 200.0}
    assert carried_over(lines, 100) == kept | {"lost": 7.0 + 100.0}
    assert carried_over(lines, 149) == kept | {"lost": 7.0 + 100.0}
    assert carried_over(lines, 150) == zeros | {"compile": 30, "step": 290, "lost": 7, "data": 10}
    assert carried_over(lines, None) == {"lost": 337.0}  # all of it was in vain
    assert carried_over([], 100) == {"lost": 0.0}


def run_log(workdir, config, resume_step):
    numbers = resolve(config, num_images=6000, num_devices=1)
    console = Console(file=io.StringIO(), width=200)
    log = RunLog(
        workdir, config, numbers, {}, resume_step=resume_step, console=console, seconds_at_peak=0.4
    )
    return log, console


def test_a_run_accounts_for_all_its_starts(tiny_config, tmp_path, monkeypatch):
    """Two starts of 10 s: killed after step 4, gone on from step 3, which was logged at 6 s."""
    now = 1000.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    loss = {"loss": jnp.float32(1)}
    tiny_config.optimizer.warmup_epochs = 1.0  # no warnings yet
    log, _ = run_log(tmp_path, tiny_config, None)
    log.__enter__()
    with log.busy("compiling", "compile"):
        now += 4
    log.first_step(1, loss)
    for step in range(2, 5):
        now += 1
        log.log(step, loss)
    log.__exit__(KeyError, KeyError(), None)
    now += 1000  # nobody knows of this
    log, console = run_log(tmp_path, tiny_config, 3)
    with log:
        with log.busy("compiling", "compile"):
            now += 0.5
        log.first_step(4, loss)
        for step in range(5, 7):
            with log.clock.waiting_for_data():
                now += 1
            log.advance(step)
            log.log(step, loss)
    *lines, last = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in (*lines, last)] == [2, 3, 5, 6, 6]
    spent = {name: x for name, x in last.items() if name.startswith("spent_") and x}
    assert spent == {"spent_compile": 4.5, "spent_step": 4, "spent_lost": 1}
    assert last["goodput"] == 4 / 9.5
    assert lines[-1]["mfu"] == pytest.approx(0.4)
    assert results_of_lines(lines) == []  # these are no evaluations
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.splitlines()[0] == "compiling took 4 s before; what is kept of it takes less now"
    assert text.splitlines()[-1] == (
        "6 steps in 0:00:10: compile 47.4 %, step 42.1 %, lost 10.5 %; 5.1 img/s over all; "
        "MFU 40.0 %"
    )
