"""Traces of the steps that were asked for."""

import jax
import pytest

from esvit_jax.runlog.profile import StepProfiler


def traced(monkeypatch, steps, taken):
    """What is done to the profiler while so many steps are taken."""
    done = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: done.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: done.append("stop"))
    with StepProfiler("run", steps) as profiler:
        for step in taken:
            profiler.before(step)
            done.append(step)
            profiler.after(step, jax.numpy.zeros(()))
    return done


def test_the_steps_that_were_asked_for(monkeypatch):
    assert traced(monkeypatch, (2, 3), range(1, 5)) == [1, "run/profile", 2, 3, "stop", 4]
    assert traced(monkeypatch, (1, 1), range(1, 3)) == ["run/profile", 1, "stop", 2]
    assert traced(monkeypatch, (3, 9), range(1, 5)) == [1, 2, "run/profile", 3, 4, "stop"]
    assert traced(monkeypatch, (2, 3), range(3, 5)) == [3, 4]  # a resumed run
    assert traced(monkeypatch, None, range(1, 3)) == [1, 2]


def test_a_trace_is_written(tmp_path):
    with StepProfiler(tmp_path, (1, 1)) as profiler:
        profiler.before(1)
        profiler.after(1, jax.numpy.ones(8) * 2)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_trace_is_brought_to_a_bucket(server, remote):
    import bucket

    with StepProfiler(remote, (1, 1)) as profiler:
        profiler.before(1)
        profiler.after(1, jax.numpy.ones(8) * 2)
    folder = "/".join(remote.parts[3:])
    (trace,) = [x for x in bucket.listing(server, folder) if x.endswith(".xplane.pb")]
    assert trace.startswith(f"{folder}/profile/plugins/profile/")
    assert server.content(trace)


def test_a_failure_ends_the_trace(tmp_path):
    with pytest.raises(KeyError), StepProfiler(tmp_path, (1, 5)) as profiler:
        profiler.before(1)
        raise KeyError
    jax.profiler.start_trace(str(tmp_path / "another"))  # of which there is one at a time
    jax.profiler.stop_trace()
