"""The pace of a loop, on a clock that the test moves."""

import time

from esvit_jax.runlog.clock import StepClock


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
