"""What is said and refused before anything is compiled."""

import jax
import pytest

from esvit_jax import preflight
from esvit_jax.config import resolve
from esvit_jax.errors import UserError
from esvit_jax.planning.estimate import StepCost
from esvit_jax.preflight import (
    GIB,
    Disk,
    Size,
    check_disk,
    check_memory,
    count,
    describe,
    measure_disk,
    measure_size,
)
from esvit_jax.recipe import build
from esvit_jax.state import init_params

SIZE = Size(
    backbone_parameters=27_500_000, parameters=49_000_000, step_bytes=3 * GIB,
    step_operations=10**12, state_bytes=GIB // 2, memory=24 * GIB,
)  # fmt: skip
DISK = Disk(checkpoint_bytes=GIB // 2, soon=2, in_all=2, free=100 * GIB)


def test_description(tiny_config):
    numbers = resolve(tiny_config, num_images=6000, num_devices=4)
    lines = describe(tiny_config, numbers, SIZE, DISK)
    assert lines == [
        "swin_tiny, 27.5 M parameters (49 M with heads), on bundled/fashion_mnist_mini train, "
        "6,000 images",
        "6 steps of 8 images, 0.008 epochs, 48 images seen; learning rate 1.56e-05 (0.0005 for "
        "256 images) after 0 steps",
        "4 cpu devices of 2 images, float32; a step needs about 3.0 GiB a device of 24.0",
        "checkpoints of 0.50 GiB, at most 2 to come, of 100.0 GiB free",
    ]
    lines = describe(tiny_config, numbers, SIZE, DISK._replace(free=None))
    assert lines[3] == "checkpoints of 0.50 GiB, at most 2 to come"


def test_notes(tiny_config):
    tiny_config.accum_steps = 2
    tiny_config.optimizer.warmup_epochs = 1.0
    numbers = resolve(tiny_config, num_images=6000, num_devices=4)
    lines = describe(
        tiny_config, numbers, SIZE._replace(step_bytes=23 * GIB), DISK._replace(free=GIB)
    )
    assert "6 steps of 8 images in 2 parts" in lines[1]
    assert "still rises at the end: config.optimizer.warmup_epochs is 750 steps" in lines[4]
    assert "it may not fit" in lines[5]
    assert lines[6] == "note: the disk may fill up: lower config.checkpoint_keep, or make room"
    tiny_config.checkpoint_keep_every_steps = 3
    lines = describe(tiny_config, numbers, SIZE, DISK._replace(in_all=200))
    assert "raise config.checkpoint_keep_every_steps" in lines[-1]


def test_a_step_far_above_the_memory_is_refused(tiny_config):
    check_memory(tiny_config, SIZE)
    check_memory(tiny_config, SIZE._replace(step_bytes=25 * GIB))  # an estimate may be that wrong
    check_memory(tiny_config, SIZE._replace(step_bytes=35 * GIB, memory=None))
    with pytest.raises(UserError) as error:
        check_memory(tiny_config, SIZE._replace(step_bytes=35 * GIB))
    assert str(error.value) == (
        "config.batch_size = 8: a step needs about 35.0 GiB a device, which has 24.0; raise "
        "config.accum_steps (the same update in smaller parts), or lower config.batch_size"
    )


def test_checkpoints_that_are_to_come(tiny_config, tmp_path):
    def counts(total_steps, *, there=(), keep=2, keep_every=None):
        for step in there:
            (tmp_path / "run" / "checkpoints" / str(step)).mkdir(parents=True)
        tiny_config.total_steps, tiny_config.checkpoint_keep = total_steps, keep
        tiny_config.checkpoint_keep_every_steps = keep_every
        numbers = resolve(tiny_config, num_images=6000, num_devices=4)
        disk = measure_disk(tiny_config, numbers, SIZE, tmp_path / "run")
        assert disk.checkpoint_bytes == SIZE.state_bytes
        assert disk.free is not None and disk.free > 0
        return disk.soon, disk.in_all

    # One is written every 3 steps; the newest ones are kept, and one more while it is written.
    assert counts(300) == (3, 3)
    assert counts(5) == (2, 2)  # there are no more
    assert counts(300, keep_every=30) == (3, 3 + 10)
    assert counts(300, there=(3, 6)) == (1, 1)
    assert counts(300, keep_every=30, keep=4) == (3, 3 + 10)
    assert measure_disk(tiny_config, resolve(tiny_config, num_images=6000, num_devices=4), SIZE,
                        "gs://bucket/run").free is None  # fmt: skip


def test_checkpoints_that_do_not_fit_are_refused(tiny_config):
    check_disk(tiny_config, DISK._replace(free=GIB))
    check_disk(tiny_config, DISK._replace(free=None))
    check_disk(tiny_config, DISK._replace(free=GIB, in_all=100))  # of which a note tells
    with pytest.raises(UserError) as error:
        check_disk(tiny_config, DISK._replace(free=GIB - 1))
    assert str(error.value) == (
        "config.checkpoint_keep = 2: the next checkpoints, 2 of 0.50 GiB (an old one goes when a "
        "new one is there), do not fit the 1.00 GiB that the workdir has left; lower it, or make "
        "room"
    )


def test_sizes_are_those_of_the_network(tiny_config, monkeypatch):
    shapes = {}

    def step_cost(recipe, state, batch):
        shapes.update({name: x.shape for name, x in batch.items()})
        return StepCost(12345, 678)

    monkeypatch.setattr(preflight, "step_cost", step_cost)
    numbers = resolve(tiny_config, num_images=6000, num_devices=4)
    recipe = build(tiny_config, numbers)
    size = measure_size(tiny_config, numbers, recipe)
    params = jax.eval_shape(lambda: init_params(recipe.model, jax.random.key(0)))
    assert size.parameters == sum(x.size for x in jax.tree.leaves(params)) == count(params)
    assert size.backbone_parameters == count(params["backbone"]) < size.parameters
    assert (size.step_bytes, size.step_operations) == (12345, 678)
    # Student, teacher and two moments, all float32, beside a few counters and centers.
    assert 4 * 4 * size.parameters < size.state_bytes < 4 * 4 * size.parameters + 2000
    assert shapes == {"canvas": (2, 28, 28, 3), "size": (2, 2)}  # of one of four devices
    assert size.memory is not None and size.memory > 2**26
