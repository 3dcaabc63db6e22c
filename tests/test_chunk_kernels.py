"""The TPU kernels of a Vision Longformer's chunks, interpreted, against the code for all devices.

That code is held against loops over cells in test_vil.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from replay_golden import Replay
from test_golden import assert_close
from test_golden_vil import GOLDEN
from test_kernels import gradients_of, normal, relative_error

from esvit_jax.models.kernels import chosen, compiling_for
from esvit_jax.models.kernels.chunk_layout import ChunkLayout
from esvit_jax.models.longformer import SparseAttention

# maps, height, width, heads, features of a head, window, global tokens
CASES = {
    "whole": (2, 6, 6, 2, 8, 3, 1),
    "padded": (2, 7, 4, 1, 16, 3, 1),  # an odd number of chunks, of which one is almost empty
    "no_global": (1, 5, 8, 3, 16, 2, 0),
    "globals": (1, 4, 4, 2, 8, 2, 3),
    "smaller": (1, 2, 3, 1, 8, 4, 1),  # than a chunk
    "seven": (1, 14, 21, 1, 32, 7, 1),
    "wide": (1, 9, 9, 1, 8, 8, 1),  # a chunk takes all lanes
    "wider": (1, 13, 24, 1, 8, 12, 1),  # and two registers
}
QUICK = ("padded", "globals")
EACH = [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES]


def value_and_gradients(case, code, dtype=jnp.float32):
    """Output, and gradients of tokens and of all parameters, by name."""
    maps, height, width, heads, dim, window, num_global = CASES[case]
    module = SparseAttention(heads, num_global, window, dtype, attention=code)
    tokens, shape = normal(0, maps, num_global + height * width, heads * dim), (height, width)
    return gradients_of(module, tokens, shape)


@pytest.mark.parametrize("case", EACH)
def test_equals_the_code_elsewhere(case):
    ours, theirs = (value_and_gradients(case, code) for code in ("pallas", "xla"))
    assert len(ours) == 11 - 2 * (CASES[case][-1] == 0)
    for name, value in theirs.items():
        error = relative_error(ours[name], value)
        # A bias of all cells has a gradient whose terms may cancel.
        rounded = np.max(np.abs(np.asarray(ours[name]) - value)) < 1e-7
        assert error < 1e-6 or rounded, (name, error)


def test_bfloat16():
    """As near to float32 as the code elsewhere is."""
    exact = value_and_gradients("padded", "xla")
    ours, theirs = (value_and_gradients("padded", c, jnp.bfloat16) for c in ("pallas", "xla"))
    for name, value in exact.items():
        assert ours[name].dtype == theirs[name].dtype
        errors = [relative_error(x[name].astype(jnp.float32), value) for x in (ours, theirs)]
        assert errors[0] < 1.3 * errors[1] and errors[0] < 0.03, (name, errors)


def test_slots_are_undone():
    layout = ChunkLayout(7, 4, 3, heads=2, dim=4, num_global=1)
    tokens = normal(0, 2, 29, 8)
    found = layout.out_of_slots(layout.without_border(layout.in_slots(tokens)))
    np.testing.assert_array_equal(found, tokens[:, 1:])


def test_tpus_with_room_take_the_kernel():
    small, large = (ChunkLayout(side, side, 7, 3, 32, 1) for side in (56, 448))
    assert not chosen("auto", small, 64, jnp.bfloat16)  # for a CPU
    for kind, layout, dtype, takes in (
        ("TPU v5 lite", small, jnp.bfloat16, True),
        ("TPU v5 lite", large, jnp.bfloat16, False),
        ("TPU v4", small, jnp.bfloat16, True),
        ("TPU v4", small, jnp.float32, False),
        ("TPU v5 lite", ChunkLayout(56, 56, 7, 8, 12, 1), jnp.bfloat16, False),
    ):
        with compiling_for(kind):
            assert chosen("auto", layout, 64, dtype) == takes, (kind, layout, dtype)


@pytest.mark.slow
def test_golden():
    """The published outputs and one published step, by the kernel in both sparse stages."""
    replay = Replay(str(GOLDEN), prototype_chunk=32)
    backbone = replay.model.backbone.clone(attention="pallas")
    replay.model = replay.model.clone(backbone=backbone)
    replay.optimizer, replay.step = replay.build("pmap", jax.devices()[:1])
    assert_close(replay.outputs())
    assert_close(replay.one_step())
