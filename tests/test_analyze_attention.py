"""Attention of windows put back on the map, against attention over all pairs of tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esvit_jax.analyze.attention import (
    attended_from,
    entropy,
    head_entropy,
    mass_mask,
    window_tokens,
)
from esvit_jax.models import Swin
from esvit_jax.models.backbone import BlockInfo

HEADS = 2


def same_window(shape, block, a, b):
    """Whether tokens a and b of a map meet: in one window of the rolled map, and on one side of it.

    Token by token, without rolling: a coordinate x moves to (x - shift) mod the padded length.
    """
    for length, x, y in zip(shape, divmod(a, shape[1]), divmod(b, shape[1]), strict=True):
        padded = length + -length % block.window_size
        moved = [(z - block.shift) % padded for z in (x, y)]
        if moved[0] // block.window_size != moved[1] // block.window_size:
            return False
        wrapped = [z < block.shift for z in (x, y)]
        if wrapped[0] != wrapped[1]:
            return False
    return True


def full_attention(query, key, shape, block):
    """Softmax over all tokens that meet, without windows: [heads, tokens, tokens]."""
    count = shape[0] * shape[1]
    meets = np.array(
        [[same_window(shape, block, a, b) for b in range(count)] for a in range(count)]
    )
    logits = np.where(meets, np.einsum("hqd,hkd->hqk", query, key), -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def in_windows(full, tokens):
    """What a block would return: [windows, heads, n, n] of the whole, padding with 0."""
    padded = np.pad(full, ((0, 0), (0, 1), (0, 1)))
    return np.stack([padded[:, there][:, :, there] for there in tokens])


@pytest.mark.parametrize(
    "shape, block",
    [
        ((4, 6), BlockInfo(0, 2, 0)),
        ((4, 6), BlockInfo(0, 2, 1)),
        ((6, 6), BlockInfo(0, 3, 1)),
        ((5, 7), BlockInfo(0, 3, 1)),
        ((3, 3), BlockInfo(0, 4, 0)),
    ],
)
def test_stitching(shape, block):
    """The rows of all tokens are those of attention over the whole map, and so is the entropy."""
    r = np.random.default_rng(0)
    query, key = r.normal(size=(2, HEADS, shape[0] * shape[1], 4))
    full = full_attention(query, key, shape, block).astype(np.float32)
    tokens = window_tokens(shape[0], shape[1], block)
    attention = in_windows(full, tokens)
    for number in range(shape[0] * shape[1]):
        found = attended_from(attention, tokens, shape, divmod(number, shape[1]))
        np.testing.assert_allclose(found.reshape(HEADS, -1), full[:, number], atol=1e-7)

    logs = np.log2(full, where=full > 0, out=np.zeros_like(full))
    bits = -np.sum(full * logs, axis=-1).mean(1)
    np.testing.assert_allclose(head_entropy(attention, tokens), bits, rtol=1e-5)


def test_the_tokens_of_a_shifted_padded_map():
    """3 x 3 tokens in windows of 2, moved by 1: padded to 4 x 4, then rolled."""
    assert window_tokens(3, 3, BlockInfo(0, 2, 1)).tolist() == [
        [4, 5, 7, 8], [-1, 3, -1, 6], [-1, -1, 1, 2], [-1, -1, -1, 0],
    ]  # fmt: skip


def test_blocks_say_what_attention_returns():
    """As many windows, heads and tokens as a Swin's attention has, on a map that is padded."""
    backbone = Swin(
        embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=3, patch_size=4, image_size=48
    )
    images = jax.random.normal(jax.random.key(0), (1, 40, 28, 3))
    params = backbone.init(jax.random.key(1), images)["params"]
    out = backbone.forward(params, images, outputs=("attention",))
    assert [(block.stage, block.shift) for block in backbone.blocks] == [
        (0, 0), (0, 1), (1, 0), (1, 1)
    ]  # fmt: skip
    for block, attention in zip(backbone.blocks, out.attention, strict=True):
        height, width = out.stage_maps[block.stage].shape[1:3]
        tokens = window_tokens(height, width, block)
        assert attention[0].shape == (len(tokens), block.stage + 1, *tokens.shape[1:] * 2)
        # Masked pairs get nothing, so that what a token attends to lies on its side of the map.
        if block.shift:
            found = attended_from(np.asarray(attention[0]), tokens, (height, width), (0, 0))
            assert found[:, 0, 0].min() > 0 and found[:, -1].max() < 1e-6


def test_entropy_in_bits():
    rows = jnp.array([[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]])
    assert entropy(rows).tolist() == [2.0, 0.0, 1.0]


def test_mass_mask():
    row = np.array([[0.1, 0.4, 0.2, 0.3], [0.0, 0.0, 5.0, 0.0]])
    # Ascending 0.1, 0.2, 0.3, 0.4, together 0.1, 0.3, 0.6, 1: what is above 0.4 stays.
    assert mass_mask(row, 0.6).tolist() == [[False, True, False, True], [False, False, True, False]]
    assert mass_mask(row, 1.0)[0].all()
