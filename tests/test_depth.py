"""A deep network's plan from two shallow ones; what a TPU's compiler says of it is measured."""

import dataclasses
import types

import pytest
from test_search import made_up_plan

from esvit_jax.errors import UserError
from esvit_jax.planning import depth, measure
from esvit_jax.planning.breakdown import Part
from esvit_jax.planning.depth import extrapolated, plan_by_depth


@pytest.fixture
def no_compiler(monkeypatch):
    """Plans in this process, of the traced step alone; nor is it traced again for a compiler."""
    compiled = measure.Program(peak_bytes=1000, fits=True)
    monkeypatch.setattr(measure, "compile_program", lambda lowered: compiled)
    untraced = types.SimpleNamespace(lower=lambda *shapes: None)
    monkeypatch.setattr(measure.parallel, "on_all_devices", lambda *_, **__: untraced)
    monkeypatch.setattr(depth, "plan", measure.measure)


def test_operations_and_state_are_those_of_the_whole(tiny_config, no_compiler):
    tiny_config.backbone.depths = (1, 6)
    whole = measure.measure(tiny_config, "cpu", num_images=6000, batch_per_chip=2)
    reckoned = plan_by_depth(tiny_config, "cpu", num_images=6000, batch_per_chip=2)
    assert reckoned.compiled_depths == [[1, 2], [1, 4]]
    for name in ("flops", "parameter_bytes", "optimizer_bytes", "teacher_bytes"):
        assert getattr(reckoned, name) == getattr(whole, name)
    assert (reckoned.per_chip_batch, reckoned.chips) == (2, 4)


def test_an_odd_stage_is_reckoned_from_odd_ones(tiny_config, monkeypatch):
    plans = {(1, 3): made_up_plan(8, peak=100, memory=400)}
    plans[1, 5] = dataclasses.replace(plans[1, 3], peak_bytes=150)
    monkeypatch.setattr(depth, "plan", lambda config, *_, **__: plans[config.backbone.depths])
    tiny_config.backbone.depths = (1, 9)
    assert plan_by_depth(tiny_config, "cpu", num_images=6000).peak_bytes == 250


def test_what_the_program_says_grows_likewise():
    first = dataclasses.replace(
        made_up_plan(8, peak=100, memory=400), bytes_accessed=50, estimated_cycles=7,
        estimated_seconds=1.0, breakdown=[Part("MLPs", 4, 30), Part("other", 3, 20)],
    )  # fmt: skip
    second = dataclasses.replace(
        first, peak_bytes=140, bytes_accessed=60, estimated_cycles=10,
        breakdown=[Part("MLPs", 6, 38), Part("other", 4, 22)],
    )  # fmt: skip
    result = extrapolated(first, second, 7)
    assert (result.peak_bytes, result.fits) == (380, True)
    assert (result.bytes_accessed, result.estimated_cycles) == (120, 28)
    assert result.breakdown == [Part("MLPs", 18, 86), Part("other", 10, 34)]
    assert result.estimated_seconds is None  # it follows from the cycles
    assert not extrapolated(first, second, 8).fits


def test_a_network_that_is_shallow_is_refused(tiny_config):
    tiny_config.backbone.depths = (1, 4)
    with pytest.raises(UserError, match=r"^config\.backbone\.depths = \(1, 4\): no stage has more"):
        plan_by_depth(tiny_config, "cpu", num_images=6000)
