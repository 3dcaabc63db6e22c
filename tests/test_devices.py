"""One step of each other family is the same on one device and on two, as Swin's is."""

import jax
import numpy as np
import pytest
import tiny
from test_batch_norm import one_step, resnet_config
from test_cvt import cvt_config
from test_vil_run import vil_config
from test_vit_run import vit_config

from esvit_jax.config import resolve
from esvit_jax.recipe import build


def config_of(family: str):
    if family == "resnet50":
        return resnet_config()
    change = {"vit": vit_config, "vil": vil_config, "cvt": cvt_config}
    config = tiny.tiny_config()
    change[family](config)
    # Adam makes steps of what rounding leaves of a gradient that is 0.
    config.optimizer.name, config.optimizer.learning_rate = "sgd", 10.0
    return config


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "mode"),
    [
        *((family, "pmap") for family in ("vit", "vil", "cvt", "resnet50")),
        *((family, "fsdp") for family in ("vit", "vil")),  # the others are refused
    ],
)
def test_two_devices_step_like_one(family, mode):
    config = config_of(family)
    recipe = build(config, resolve(config, num_images=64, num_devices=2))
    one, scalars, _ = one_step(recipe, "pmap", 1)
    two, shared, _ = one_step(recipe, mode, 2)
    np.testing.assert_allclose(shared["loss"], scalars["loss"], rtol=1e-5)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), one.params, one.teacher)
    assert max(jax.tree.leaves(moved)) > 0.1
    for ours, theirs in ((two.params, one.params), (two.teacher, one.teacher)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5), ours, theirs)
