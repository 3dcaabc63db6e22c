"""A ViT of the published implementation, replayed: see `replay_golden`."""

from pathlib import Path

import jax
import numpy as np
import pytest
from replay_golden import Replay, tensors

from esvit_jax.interop.names import recognise
from esvit_jax.interop.names.published import params_from_state_dict, state_dict_from_params
from esvit_jax.models import ViT
from esvit_jax.state import init_params

GOLDEN = Path(__file__).parent / "data" / "vit_nano.npz"


@pytest.fixture(scope="module")
def replay():
    return Replay(GOLDEN)


def assert_close(errors, bound):
    assert errors
    for name, error in errors.items():
        assert error is not None and error < bound(name), errors


def loose(name):
    """Of gradients, and of params after an update."""
    return 1e-4 if name.startswith("max_") else 1e-5


def test_names_and_values_come_and_go(replay):
    """Every tensor by its name is one of ours, and comes back as it was."""
    wanted = jax.eval_shape(lambda: init_params(replay.model, jax.random.key(0)))
    for network in ("student", "teacher"):
        theirs = tensors(replay.golden, f"{network}/")
        backbone_class, family, published = recognise(theirs)
        assert backbone_class is ViT
        params = params_from_state_dict(family.weights(published))
        assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, wanted)
        ours = family.file_names(state_dict_from_params(params))
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            np.testing.assert_array_equal(ours[name], tensor)


def test_outputs(replay):
    assert_close(replay.outputs(), loose)


def test_tokens_and_features_of_the_linear_evaluation(replay):
    errors = replay.features()
    assert errors.pop("max_attention") is None  # the file has none
    assert_close(errors, lambda name: 1e-5)


def test_tokens_of_a_single_image(replay, tmp_path):
    """Of a batch of one, whose file has no second image's."""
    golden = dict(replay.golden)
    golden["crops/0"] = golden["crops/0"][:1]
    del golden["regions"], golden["last4_features"]
    np.savez(tmp_path / "one.npz", **golden)
    errors = Replay(tmp_path / "one.npz").features()
    pooled = errors.pop("pooled")
    assert pooled is not None and pooled < 1e-5
    assert set(errors.values()) == {None}


def test_one_step(replay):
    assert_close(replay.one_step(), loose)


def test_trajectory(replay):
    """By the same compiled step."""
    assert replay.count == 20
    assert_close(replay.trajectory(), lambda name: 1e-4)
