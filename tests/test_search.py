"""The search for the largest batch, on a made-up chip whose memory is a line in the batch."""

import math

import pytest

from esvit_jax.planning.plan import Plan
from esvit_jax.planning.search import largest_batch, search


def made_up_plan(batch, *, peak, memory, remat="none", accum_steps=1):
    return Plan(
        topology="v5e:1x1", chips=1, per_chip_batch=batch, parallel="pmap", remat=remat,
        accum_steps=accum_steps, quick=False, parameter_bytes=0, optimizer_bytes=0, teacher_bytes=0,
        argument_bytes=0, temp_bytes=0, peak_bytes=peak, hbm_bytes=memory, fits=peak <= memory,
        flops=0, bytes_accessed=0, collective_bytes=None, collective_seconds=None,
        floor_seconds=None, floor_images_per_second=None, floor_hours=None,
        estimated_cycles=None, estimated_seconds=None, estimated_images_per_second=None,
        estimated_hours=None, estimated_mfu=None, breakdown=None, costliest=None,
        compile_seconds=0.0, versions={},
    )  # fmt: skip


@pytest.mark.parametrize("bend", [0, 1.5, -1.5])
@pytest.mark.parametrize("room", [3, 9, 31, 100, 131, 1000])
def test_largest_batch(room, bend):
    tried = []

    def peak(batch):
        return round(100 * (2 + batch + (bend * math.sqrt(batch) if batch > 16 else 0)))

    def attempt(batch):
        tried.append(batch)
        return made_up_plan(batch, peak=peak(batch), memory=100 * room)

    found = largest_batch(attempt, limit=256)
    fitting = [batch for batch in range(8, 257, 8) if peak(batch) <= 100 * room]
    assert (found and found.per_chip_batch) == (max(fitting) if fitting else None)
    assert len(tried) == len(set(tried)) <= 6


def test_search():
    def attempt(batch, remat, accum_steps):
        peak = batch // accum_steps * {"none": 4, "dots": 2, "block": 1}[remat] + (accum_steps > 1)
        return made_up_plan(batch, peak=peak, memory=100, remat=remat, accum_steps=accum_steps)

    none, dots, block = search(48, attempt)
    assert none.largest and none.largest.per_chip_batch == 24
    # Two parts of 24 would do but for the gradients that wait.
    assert none.recipe and none.recipe.accum_steps == 2 and none.recipe.peak_bytes == 97
    assert dots.largest and dots.largest.per_chip_batch == 48
    assert dots.recipe and dots.recipe.accum_steps == 1
    assert block.largest and block.largest.per_chip_batch == 96
    assert block.recipe and block.recipe.accum_steps == 1


def test_search_where_nothing_fits():
    def attempt(batch, remat, accum_steps):
        return made_up_plan(batch, peak=2, memory=1, remat=remat, accum_steps=accum_steps)

    assert [(row.largest, row.recipe) for row in search(8, attempt)] == [(None, None)] * 3
