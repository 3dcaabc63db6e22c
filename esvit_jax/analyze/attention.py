"""Where a backbone looks: attention of windows, put back on the map; its entropy and its mass.

Attention is what `BackboneOutput.attention` holds of one block, [..., windows, heads, n, n]: a
window's n queries by its n keys. The windows tile a map that was padded and shifted;
`window_tokens` says which token of the map stands where.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int, PyTree

from esvit_jax.analyze.cells import cell_at
from esvit_jax.errors import RunError
from esvit_jax.models.backbone import Backbone, BackboneOutput, BlockInfo


def window_tokens(height: int, width: int, block: BlockInfo) -> Int[np.ndarray, "m n"]:
    """Which token of a map, counted row by row, stands where in its windows; -1 is none of it.

    Args:
      height, width: of the map, tokens.
      block: its windows.
    """
    h, w = block.window(height, width)
    tokens = np.full((height + -height % h, width + -width % w), -1)
    tokens[:height, :width] = np.arange(height * width).reshape(height, width)
    tokens = np.roll(tokens, (-block.shift, -block.shift), axis=(0, 1))
    windows = rearrange(tokens, "(y h) (x w) -> (y x) (h w)", h=h, w=w)
    return np.pad(windows, ((0, 0), (block.num_global, 0)), constant_values=-1)


def entropy(attention: Float[Array | np.ndarray, "*b n"]) -> Float[Array, "*b"]:
    """-sum p log2 p over the last axis, bits; 0 log 0 is 0."""
    logs = jnp.log2(jnp.where(attention > 0, attention, 1.0))
    return -jnp.sum(attention * logs, axis=-1)


def head_entropy(
    attention: Float[Array | np.ndarray, "*b m heads n n"], tokens: Int[np.ndarray, "m n"]
) -> Float[Array, "*b heads"]:
    """Each head's entropy, bits: the mean over the queries of all windows, but for padding."""
    real = jnp.asarray(tokens >= 0, jnp.float32)[:, None]
    return jnp.sum(entropy(attention) * real, axis=(-3, -1)) / jnp.sum(real)


def place_in_windows(
    tokens: Int[np.ndarray, "m n"], shape: tuple[int, int], query: tuple[int, int] | None
) -> tuple[int, int]:
    """Window, and position in it, of the token at a row and column; None is the class token."""
    if query is None:
        return 0, 0
    ((window, position),) = np.argwhere(tokens == query[0] * shape[1] + query[1])
    return int(window), int(position)


def attended_from(
    attention: Float[Array | np.ndarray, "m heads n n"],
    tokens: Int[np.ndarray, "m n"],
    shape: tuple[int, int],
    query: tuple[int, int] | None,
) -> Float[np.ndarray, "heads h w"]:
    """How much one token attends to each of a map: 0 outside of its window.

    What padding and a class token get is left out, so that a map may sum to less than 1.

    Args:
      attention: of one image.
      tokens: see `window_tokens`.
      shape: of the map, tokens.
      query: row and column of the token; None is the class token.
    """
    window, position = place_in_windows(tokens, shape, query)
    return _on_map(np.asarray(attention)[window, :, position], tokens[window], shape)


def _on_map(
    values: Float[np.ndarray, "heads n"], there: Int[np.ndarray, " n"], shape: tuple[int, int]
) -> Float[np.ndarray, "heads h w"]:
    flat = np.zeros((len(values), shape[0] * shape[1]), np.float32)
    flat[:, there[there >= 0]] = values[:, there >= 0]
    return flat.reshape(len(values), *shape)


def mass_mask(attention: Float[np.ndarray, "*b n"], mass: float) -> Bool[np.ndarray, "*b n"]:
    """The keys that hold a share of the mass: the smallest go while their sum is ≤ 1 - mass.

    Args:
      attention: not negative; need not sum to 1.
      mass: the share that stays, in (0, 1].
    """
    order = np.argsort(attention, axis=-1, kind="stable")
    rising = np.take_along_axis(attention, order, axis=-1).astype(np.float64)
    share = np.cumsum(rising, axis=-1) / np.sum(rising, axis=-1, keepdims=True)
    kept = np.zeros(attention.shape, bool)
    np.put_along_axis(kept, order, share > 1 - mass, axis=-1)
    return kept


class HeadsOfBlock(NamedTuple):
    """How widely the heads of one block look.

    Attributes:
      stage: of the block, from 0.
      window_size: tokens along a side of its windows; None where one is over the whole map.
      shift: of its windows, tokens.
      keys: tokens in a window, of which none is preferred at an entropy of log2(keys).
      entropy: f32[heads], bits, means over images.
    """

    stage: int
    window_size: int | None
    shift: int
    keys: int
    entropy: Float[np.ndarray, " heads"]


class Attention:
    """The attention of a backbone on some images.

    Args:
      backbone, params: the network.
      images: f32[b, h, w, 3], normalised.

    Raises:
      RunError: features are not finite.
    """

    def __init__(self, backbone: Backbone, params: PyTree, images: Float[Array, "b h w 3"]):
        def forward(params: PyTree, images: Array) -> BackboneOutput:
            return backbone.forward(params, images, outputs=("attention",))

        self.output = jax.jit(forward)(params, images)
        if not np.isfinite(self.output.region_features).all():
            raise RunError(
                "features are not finite; the network diverged, take an earlier checkpoint"
            )
        self.blocks = backbone.blocks
        self._strides = [stage.stride for stage in backbone.stages]
        self._size = images.shape[1:3]

    def shape(self, block: int) -> tuple[int, int]:
        """Rows and columns of the map of a block, tokens."""
        return self.output.stage_maps[self.blocks[block].stage].shape[1:3]

    def stride(self, block: int) -> int:
        """Pixels of an image along a side of a token of a block."""
        return self._strides[self.blocks[block].stage]

    def token_at(self, block: int, y: float, x: float) -> tuple[int, int]:
        """Row and column of the token at, or nearest to, a place in shares of height and width."""
        row, column = (
            cell_at(share * side, self.stride(block), count)
            for share, side, count in zip((y, x), self._size, self.shape(block), strict=True)
        )
        return row, column

    def tokens(self, block: int) -> Int[np.ndarray, "m n"]:
        """See `window_tokens`."""
        return window_tokens(*self.shape(block), self.blocks[block])

    def entropy(self, block: int) -> Float[np.ndarray, "b heads"]:
        """Of each image, bits."""
        return np.asarray(head_entropy(self.output.attention[block], self.tokens(block)))

    def heads(self) -> list[HeadsOfBlock]:
        """A line of a table for every block."""
        return [
            HeadsOfBlock(
                info.stage, info.window_size and info.window(*self.shape(block))[0], info.shift,
                self.tokens(block).shape[1], self.entropy(block).mean(0),
            )
            for block, info in enumerate(self.blocks)
        ]  # fmt: skip

    def seen_from(
        self, block: int, image: int, query: tuple[int, int] | None, mass: float
    ) -> tuple[Float[np.ndarray, "heads h w"], Bool[np.ndarray, "heads h w"], np.ndarray]:
        """Where the heads of a block look from one token.

        Args:
          block, image: which.
          query: row and column of the token; None is the class token.
          mass: see `mass_mask`.

        Returns:
          What each token of the map gets, which of them hold that share of it, and the entropy of
          each head, f32[heads], bits, with what padding gets.
        """
        attention = np.asarray(self.output.attention[block][image])
        tokens, shape = self.tokens(block), self.shape(block)
        found = attended_from(attention, tokens, shape, query)
        flat = found.reshape(len(found), -1)
        kept = mass_mask(flat, mass).reshape(found.shape)
        window, position = place_in_windows(tokens, shape, query)
        return found, kept, np.asarray(entropy(attention[window, :, position]))
