"""Signals that are remembered, that interrupt, and that are left alone."""

import signal
import threading
import time

import pytest

from esvit_jax.runlog.signals import Interrupted, StopSignals, in_thread


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_remembered_and_a_second_interrupts(number):
    before = signal.getsignal(number)
    with StopSignals() as signals:
        assert not signals.received
        signal.raise_signal(number)
        assert signals.received
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(number) == before


def test_nohup_keeps_its_promise():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            signal.raise_signal(signal.SIGHUP)
            assert not signals.received
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_wait_for_a_compiler(number):
    released, ended = threading.Event(), threading.Event()

    def compile_for_long():
        released.wait(30)
        ended.set()

    threading.Timer(0.2, signal.pthread_kill, (threading.main_thread().ident, number)).start()
    start = time.monotonic()
    with (
        pytest.raises(Interrupted, match="stopped by a signal: nothing was trained"),
        StopSignals() as signals,
        signals.raising("nothing was trained"),
    ):
        in_thread(compile_for_long)
    assert time.monotonic() - start < 10 and not ended.is_set()
    released.set()
    assert ended.wait(10)  # it ran on


def test_a_signal_breaks_off_what_may_be_broken_off():
    with StopSignals() as signals:
        with signals.breaking_off(True):
            signal.raise_signal(signal.SIGTERM)
            pytest.fail("it went on")
        assert signals.received
        with pytest.raises(KeyboardInterrupt):  # a second one
            signal.raise_signal(signal.SIGINT)
    with StopSignals() as signals:
        went_on = False
        with signals.breaking_off(False):
            signal.raise_signal(signal.SIGTERM)
            went_on = True
        assert signals.received and went_on
        with pytest.raises(KeyboardInterrupt), signals.breaking_off(False):
            signal.raise_signal(signal.SIGINT)


def test_in_thread_returns_and_raises():
    assert in_thread(lambda: threading.current_thread()) is not threading.current_thread()
    with pytest.raises(ZeroDivisionError):
        in_thread(lambda: 1 / 0)


def test_another_thread_leaves_signals_alone():
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def work():
        with StopSignals() as signals, signals.raising("never"):
            seen.append((signals.received, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]
