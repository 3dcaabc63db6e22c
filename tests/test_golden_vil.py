"""A ViL of the published implementation, replayed: see `replay_golden`."""

from pathlib import Path

import pytest
from replay_golden import Replay
from test_golden import assert_close

GOLDEN = Path(__file__).parent / "data" / "vil_nano.npz"


@pytest.fixture(scope="module")
def replay():
    return Replay(GOLDEN)


def test_outputs(replay):
    assert_close(replay.outputs())


def test_block_means(replay):
    error = replay.features()["last4_features"]
    assert error is not None and error < 1e-5


def test_one_step(replay):
    assert_close(replay.one_step())


def test_trajectory(replay):
    """By the same compiled step."""
    assert replay.count == 20
    assert_close(replay.trajectory())
