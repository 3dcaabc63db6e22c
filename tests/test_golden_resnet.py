"""A ResNet's arrays of the published implementation, replayed: see `replay_golden`.

Batch norms make both devices part of one batch: each has one of its two images.
"""

from pathlib import Path

import numpy as np
import pytest
from replay_golden import Replay

from esvit_jax.interop.files import sort_contents
from esvit_jax.interop.names.resnet import SPELLING

GOLDEN = Path(__file__).parent / "data" / "resnet_nano.npz"
# What float32 allows against the file, which was computed in float64.
BOUNDS = {
    "max_grad": 3e-4, "max_student_after": 3e-4, "max_teacher_after": 3e-4,
    "traj_loss": 5e-3, "traj_center": 1e-3, "max_traj_norm": 1e-3,
}  # fmt: skip


@pytest.fixture(scope="module")
def replay():
    return Replay(GOLDEN, devices=2)


def assert_close(errors):
    for name, error in errors.items():
        assert error is not None and error < BOUNDS.get(name, 2e-5), errors


def test_outputs(replay):
    assert_close(replay.outputs())


def test_one_step(replay):
    """Running statistics of both networks are among the arrays."""
    names = replay.tensors("teacher_after/")
    assert "layer4.0.downsample.1.running_var" in names
    assert_close(replay.one_step())


def test_trajectory(replay):
    assert replay.count == 20 and len(replay.golden["traj/buffer_names"]) == 34
    assert_close(replay.trajectory())


def test_features(replay):
    """By the teacher's running statistics."""
    errors = replay.features()
    assert errors.pop("last4_features") is None and errors.pop("max_attention") is None
    assert_close(errors)


def test_its_names_are_told_and_come_back(replay):
    """Every tensor of the file once; what is written has the file's names."""
    golden = replay.golden
    file = {k.removeprefix("student/"): golden[k] for k in golden.files if k[:8] == "student/"}
    contents = sort_contents({"student": file})
    assert not contents.unknown and not contents.left_behind
    inferred = contents.family.infer(contents.networks["student"], None)
    assert inferred.fields == {"depths": (1, 1, 1, 1), "base_width": 8, "image_size": 224}
    again = contents.family.file_names(contents.networks["student"])
    assert set(again) == set(file)
    for name, tensor in again.items():
        np.testing.assert_array_equal(tensor, file[name])


@pytest.mark.parametrize("whose", ["torchvision", "DINO", "transformers"])
def test_other_spellings(replay, whose):
    """Of whole checkpoints: with a classifier, or with what DINO puts before all names."""
    tensors = {n: x for n, x in replay.tensors("student/").items() if not n.startswith("head")}
    file, classifier = tensors, "fc"
    if whose == "DINO":
        file = {f"backbone.{name}": tensor for name, tensor in tensors.items()}
    if whose == "transformers":
        file = {f"resnet.{name}": tensor for name, tensor in SPELLING.to_names(tensors).items()}
        classifier = "classifier.1"
    contents = sort_contents(file | {f"{classifier}.bias": np.ones(3)})
    assert contents.left_behind == [f"model {classifier}.bias"] and not contents.unknown
    assert contents.networks["model"].keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(contents.networks["model"][name], tensor)
