"""What is said and refused before anything is compiled."""

import jax
import pytest

from esvit_jax import preflight
from esvit_jax.config import resolve
from esvit_jax.errors import UserError
from esvit_jax.preflight import GIB, Size, check_memory, count, describe, measure_size
from esvit_jax.recipe import build
from esvit_jax.state import init_params

SIZE = Size(
    backbone_parameters=27_500_000, parameters=49_000_000, step_bytes=3 * GIB, memory=24 * GIB
)


def test_description(tiny_config):
    numbers = resolve(tiny_config, num_images=6000, num_devices=4)
    lines = describe(tiny_config, numbers, SIZE)
    assert lines == [
        "swin_tiny, 27.5 M parameters (49 M with heads), on bundled/fashion_mnist_mini train, "
        "6,000 images",
        "6 steps of 8 images, 0.008 epochs; learning rate 1.56e-05 after 0 steps",
        "4 cpu devices, float32; a step needs about 3.0 GiB a device of 24.0",
    ]


def test_notes(tiny_config):
    tiny_config.accum_steps = 2
    tiny_config.optimizer.warmup_epochs = 1.0
    numbers = resolve(tiny_config, num_images=6000, num_devices=4)
    lines = describe(tiny_config, numbers, SIZE._replace(step_bytes=23 * GIB))
    assert "6 steps of 8 images in 2 parts" in lines[1]
    assert "still rises at the end: config.optimizer.warmup_epochs is 750 steps" in lines[3]
    assert "it may not fit" in lines[4]


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


def test_sizes_are_those_of_the_network(tiny_config, monkeypatch):
    shapes = {}

    def step_bytes(recipe, state, batch):
        shapes.update({name: x.shape for name, x in batch.items()})
        return 12345

    monkeypatch.setattr(preflight, "step_bytes", step_bytes)
    numbers = resolve(tiny_config, num_images=6000, num_devices=4)
    recipe = build(tiny_config, numbers)
    size = measure_size(tiny_config, numbers, recipe)
    params = jax.eval_shape(lambda: init_params(recipe.model, jax.random.key(0)))
    assert size.parameters == sum(x.size for x in jax.tree.leaves(params)) == count(params)
    assert size.backbone_parameters == count(params["backbone"]) < size.parameters
    assert size.step_bytes == 12345
    assert shapes == {"canvas": (2, 28, 28, 3), "size": (2, 2)}  # of one of four devices
    assert size.memory is not None and size.memory > 2**26
