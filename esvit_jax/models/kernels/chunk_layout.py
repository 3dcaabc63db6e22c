"""How the chunks of a Vision Longformer's maps lie in the arrays of their kernels."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from esvit_jax.models.kernels.layout import LANES

# Weights below exp(-1e4) are 0. The feature is also a number of bfloat16.
AWAY = -1e30
OUTSIDE = -(2.0**15)


def cells_of_chunks(
    height: int, width: int, window_size: int, columns: int
) -> Bool[np.ndarray, "rows2 columns2 n"]:
    """Which cells of chunks are of a map, in so many columns and with a chunk on all sides.

    The others are padding of the map to whole chunks, or lie beyond its border.
    """
    size, rows = window_size, -(-height // window_size)
    inside = np.zeros(((rows + 2) * size, (columns + 2) * size), bool)
    inside[size : size + height, size : size + width] = True
    return rearrange(inside, "(y h) (x w) -> y x (h w)", h=size, w=size)


@dataclasses.dataclass(frozen=True)
class ChunkLayout:
    """How the chunks of maps lie in the kernels' arrays.

    Attributes:
      height, width: cells of a map.
      window_size: cells along a chunk's side.
      heads: of attention.
      dim: features of a head.
      num_global: global tokens.
    """

    height: int
    width: int
    window_size: int
    heads: int
    dim: int
    num_global: int

    @property
    def supported(self) -> bool:
        """Whether a head's features are whole sublanes, of which a TPU's blocks are made."""
        return self.dim % 8 == 0

    @property
    def cells(self) -> int:
        """Of a chunk."""
        return self.window_size**2

    @property
    def rows(self) -> int:
        """Of chunks in a map."""
        return -(-self.height // self.window_size)

    @property
    def slot(self) -> int:
        """Lanes of a chunk."""
        used = self.cells + self.num_global
        return LANES // 2 if used <= LANES // 2 else -(-used // LANES) * LANES

    @property
    def together(self) -> int:
        """Chunks that are queries at a time."""
        return max(1, LANES // self.slot)

    @property
    def groups(self) -> int:
        """Of such chunks in a row."""
        return -(-self.width // (self.window_size * self.together))

    @property
    def query_lanes(self) -> int:
        """Of a group."""
        return self.together * self.slot

    @property
    def key_lanes(self) -> int:
        """Of what a group attends to in one of the three rows."""
        return (self.together + 2) * self.slot

    def in_slots(self, tokens: Float[Array, "b t d"]) -> Float[Array, "b rows lanes d"]:
        """Tokens, global ones first, of a map's chunks with a slot of 0 on all sides of them."""
        size, g = self.window_size, self.num_global
        maps = rearrange(tokens[:, g:], "b (h w) d -> b h w d", h=self.height)
        bottom = self.rows * size - self.height
        right = self.groups * self.together * size - self.width
        maps = jnp.pad(maps, ((0, 0), (0, bottom), (0, right), (0, 0)))
        slots = rearrange(maps, "b (y h) (x w) d -> b y x (h w) d", h=size, w=size)
        copies = jnp.broadcast_to(tokens[:, None, None, :g], (*slots.shape[:3], g, slots.shape[4]))
        slots = jnp.concatenate([slots, copies], axis=3)
        spare = self.slot - slots.shape[3]
        slots = jnp.pad(slots, ((0, 0), (1, 1), (1, 1), (0, spare), (0, 0)))
        return rearrange(slots, "b y x n d -> b y (x n) d")

    def without_border(self, slots: Float[Array, "b rows lanes d"]) -> Float[Array, "b _ _ d"]:
        """The slots that are queries."""
        return slots[:, 1:-1, self.slot : -self.slot]

    def out_of_slots(self, slots: Float[Array, "b rows lanes d"]) -> Float[Array, "b hw d"]:
        """The cells, of slots without a border."""
        slots = rearrange(slots, "b y (x n) d -> b y x n d", n=self.slot)[:, :, :, : self.cells]
        size = self.window_size
        maps = rearrange(slots, "b y x (h w) d -> b (y h) (x w) d", h=size)
        return rearrange(maps[:, : self.height, : self.width], "b h w d -> b (h w) d")

    def lanes_of_cells(self) -> Bool[np.ndarray, "rows2 lanes2"]:
        """Of slots with their border."""
        columns = self.groups * self.together
        inside = cells_of_chunks(self.height, self.width, self.window_size, columns)
        inside = np.pad(inside, ((0, 0), (0, 0), (0, self.slot - self.cells)))
        return inside.reshape(len(inside), -1)

    def outside(self) -> Float[np.ndarray, "rows2 16 lanes2"]:
        """More features of keys, a tile of 16: the first is 0 of cells, the others always.

        It is 0 beside a chunk's cells, too: of what lies there, its own copies of global tokens
        are let in by the bias.
        """
        inside = self.lanes_of_cells()
        beside = np.arange(inside.shape[1]) % self.slot >= self.cells
        features = np.zeros((len(inside), 16, inside.shape[1]), np.float32)
        features[:, 0] = np.where(inside | beside, 0, OUTSIDE)
        return features

    def global_bias(
        self, to_cells: Float[Array, "heads g"], to_global: Float[Array, "heads g g"]
    ) -> Float[Array, "heads g rows2 lanes2"]:
        """Of global tokens' queries: to cells, and to the copies in the first chunk's slot."""
        inside = self.lanes_of_cells()
        bias = jnp.where(inside, to_cells[:, :, None, None], AWAY)
        first = self.slot + self.cells
        return bias.at[:, :, 1, first : first + self.num_global].set(to_global)

    def bias(
        self, local: Float[Array, "heads n n9"], to_global: Float[Array, "heads g"]
    ) -> Float[Array, "heads keys queries"]:
        """Of a group's queries: `AWAY` where a key is of no neighbour or of no chunk."""
        n, g, spare = self.cells, self.num_global, self.slot - self.cells - self.num_global
        local = rearrange(local, "heads q (i j k) -> heads i j k q", i=3, j=3)
        of_global = jnp.full((self.heads, 3, 3, g, n), AWAY)
        of_global = of_global.at[:, 1, 1].set(to_global[:, :, None])
        slots = jnp.concatenate([local, of_global], axis=3)
        slots = jnp.pad(slots, ((0, 0),) * 3 + ((0, spare), (0, 0)), constant_values=AWAY)
        queries = []
        for own in range(self.together):
            columns = (own, self.together - 1 - own)
            padding = ((0, 0), (0, 0), columns, (0, 0), (0, 0))
            own_slots = jnp.pad(slots, padding, constant_values=AWAY)
            queries.append(jnp.pad(own_slots, ((0, 0),) * 4 + ((0, self.slot - n),)))
        return rearrange(jnp.stack(queries, axis=4), "heads i x k own q -> heads (i x k) (own q)")

    def memory(self, dtype: DTypeLike) -> int:
        """Bytes of a core's vector memory that the backward kernel takes, nearly."""
        size, lanes = jnp.dtype(dtype).itemsize, self.groups * self.query_lanes
        queries = self.rows * lanes
        keys = (self.rows + 2) * (lanes + 2 * self.slot)
        blocks = 3 * queries * self.dim + keys * (4 * self.dim + 16)
        logits = 3 * self.key_lanes * self.query_lanes * 4
        return 2 * blocks * size + 2 * keys * self.dim * 4 + 8 * logits
