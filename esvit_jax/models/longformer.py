"""Attention of a Vision Longformer (Zhang et al. 2021): within chunks of a map, or over all of it.

A block's tokens are its global tokens, then the cells of its map row by row. Global tokens attend
to all tokens, and all attend to them. A cell attends to all cells ("full"), or to those of its
chunk of w x w cells and of the eight chunks around it ("sparse").
"""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from esvit_jax.models import kernels
from esvit_jax.models.attention import attention_logits, relative_position_index, window_attention
from esvit_jax.models.kernels.chunk_layout import ChunkLayout, cells_of_chunks
from esvit_jax.models.layers import LINEAR_INIT, Linear
from esvit_jax.models.resize import bicubic_matrix

TABLE = "local_relative_position_bias_table"
Biases = tuple[Float[Array, "2 heads g"], Float[Array, "heads g g"]]


def neighbour_index(window_size: int) -> np.ndarray:
    """Row of the bias table for each cell of a chunk (query) and of its nine neighbours (key).

    int[n, 9 n], the neighbours row by row; d = query - key is from -(2 w - 1) to 2 w - 1.
    """
    size = window_size
    y, x = np.divmod(np.arange(9 * size**2), 3 * size)
    y, x = (
        rearrange(a, "(i y j x) -> (i j) (y x)", i=3, j=3, y=size, x=size).reshape(-1)
        for a in (y, x)
    )
    own = slice(4 * size**2, 5 * size**2)
    dy, dx = y[own, None] - y[None, :], x[own, None] - x[None, :]
    return (dy + 2 * size - 1) * (4 * size - 1) + (dx + 2 * size - 1)


def neighbours_inside(height: int, width: int, window_size: int) -> Bool[np.ndarray, "y x n9"]:
    """Which keys of the nine neighbours of every chunk are cells of the map."""
    inside = cells_of_chunks(height, width, window_size, -(-width // window_size))
    rows, columns = inside.shape[0] - 2, inside.shape[1] - 2
    parts = [inside[i : i + rows, j : j + columns] for i in range(3) for j in range(3)]
    return np.concatenate(parts, axis=-1)


def sparse_bias(
    table: Float[Array, "rows heads"], height: int, width: int, window_size: int
) -> Float[Array, "heads hw hw"]:
    """The bias of all pairs of a map's cells, -inf where their chunks are no neighbours."""
    size = window_size
    y, x = jnp.divmod(jnp.arange(height * width), width)

    def apart(a: Array) -> Array:
        return a[:, None] - a[None, :]

    near = (jnp.abs(apart(y // size)) <= 1) & (jnp.abs(apart(x // size)) <= 1)
    index = (apart(y) + 2 * size - 1) * (4 * size - 1) + (apart(x) + 2 * size - 1)
    bias = jnp.take(table, jnp.where(near, index, 0), axis=0)
    return jnp.where(near, rearrange(bias, "q k heads -> heads q k"), -jnp.inf)


def whole_bias(local: Float[Array, "heads hw hw"], of_global: Biases) -> Float[Array, "heads t t"]:
    """The bias of all pairs of tokens, of that of the cells and of `global_biases`."""
    cells = repeat(of_global[0][1], "heads g -> heads q g", q=local.shape[1])
    cells = jnp.concatenate([cells, local], axis=-1)
    return jnp.concatenate([global_rows(of_global, local.shape[1]), cells], axis=-2)


def global_rows(of_global: Biases, cells: int) -> Float[Array, "heads g t"]:
    """The bias of global queries."""
    g2l, g2g = of_global
    return jnp.concatenate([g2g, repeat(g2l[0], "heads g -> heads g k", k=cells)], axis=-1)


def global_biases(module: nn.Module, num_heads: int, num_global: int) -> Biases:
    """Params of a module: between global tokens and cells, and among global tokens.

    The first has [0] for the queries of global tokens, and [1] for those of cells.
    """
    if not num_global:
        return jnp.zeros((2, num_heads, 0)), jnp.zeros((num_heads, 0, 0))
    shapes = {"g2l": (2, num_heads, num_global), "g2g": (num_heads, num_global, num_global)}
    g2l, g2g = (
        jnp.asarray(module.param(f"{name}_relative_position_bias", LINEAR_INIT, shape))
        for name, shape in shapes.items()
    )
    return g2l, g2g


def in_heads(x: Float[Array, "b t heads_d"], heads: int) -> Float[Array, "b 1 heads t d"]:
    """Heads get their axis; the whole map is one window."""
    return rearrange(x, "b t (heads d) -> b 1 heads t d", heads=heads)


def in_chunks(
    cells: Float[Array, "b hw heads_d"], shape: tuple[int, int], window_size: int, heads: int
) -> Float[Array, "y b x heads n d"]:
    """The chunks of a map that is padded with 0 at the bottom and the right."""
    maps = rearrange(cells, "b (h w) d -> b h w d", h=shape[0])
    (bottom, right), size = (-side % window_size for side in shape), window_size
    maps = jnp.pad(maps, ((0, 0), (0, bottom), (0, right), (0, 0)))
    return rearrange(
        maps, "b (y h) (x w) (heads d) -> y b x heads (h w) d", h=size, w=size, heads=heads
    )


def out_of_chunks(
    chunks: Float[Array, "y b x heads n d"], shape: tuple[int, int], window_size: int
) -> Float[Array, "b hw heads_d"]:
    """The inverse of `in_chunks`."""
    maps = rearrange(
        chunks, "y b x heads (h w) d -> b (y h) (x w) (heads d)", h=window_size, w=window_size
    )
    return rearrange(maps[:, : shape[0], : shape[1]], "b h w d -> b (h w) d")


def chunk_attention(
    query: Float[Array, "y b x heads n d"],
    key: Float[Array, "y b x heads n d"],
    value: Float[Array, "y b x heads n d"],
    global_key: Float[Array, "b 1 heads g d"],
    global_value: Float[Array, "b 1 heads g d"],
    bias: Float[Array, "heads n k"],
    inside: Bool[np.ndarray, "y x n9"],
) -> Float[Array, "y b x heads n d"]:
    """One softmax over the global tokens and the cells of nine chunks, for each cell.

    One row of chunks after the other, and again in the backward pass, for which only the arguments
    are kept: the logits of all rows, 9 w^2 for each cell and head, would be many times as large
    (docs/notes/longformer.md).

    Args:
      query: scaled already.
      key, value: of the same dtype.
      global_key, global_value: of the global tokens.
      bias: global tokens first.
      inside: see `neighbours_inside`.
    """
    inside = np.pad(inside, ((0, 0), (0, 0), (global_key.shape[-2], 0)), constant_values=True)

    def attend(row: tuple[Array, Array, Array, Array]) -> Array:
        query, key, value, inside = row
        key, value = with_neighbours(global_key, key), with_neighbours(global_value, value)
        masked = jnp.where(inside[:, None, None], bias, -jnp.inf)
        return window_attention(query, key, value, masked, jnp.float32)

    def attend_all(query: Array, key: Array, value: Array) -> Array:
        rows = (query, in_bands(key), in_bands(value), jnp.asarray(inside))
        return jax.lax.map(jax.checkpoint(attend), rows)

    return jax.checkpoint(attend_all)(query, key, value)


def in_bands(x: Float[Array, "y b x heads n d"]) -> Float[Array, "y 3 b x2 heads n d"]:
    """Each row of chunks with the rows above and below it; 0 is all around."""
    rows = x.shape[0]
    x = jnp.pad(x, ((1, 1), (0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
    return jnp.stack([x[i : i + rows] for i in range(3)], axis=1)


def with_neighbours(
    of_global: Float[Array, "b 1 heads g d"], band: Float[Array, "3 b x2 heads n d"]
) -> Float[Array, "b x heads k d"]:
    """What each chunk of a row attends to: the global tokens, then nine chunks row by row."""
    columns = band.shape[2] - 2
    parts = [band[i, :, j : j + columns] for i in range(3) for j in range(3)]
    of_global = jnp.broadcast_to(of_global, (*parts[0].shape[:3], *of_global.shape[3:]))
    return jnp.concatenate([of_global, *parts], axis=-2)


def attention_over_slots(
    query: Float[Array, "b g heads_d"],
    key: Float[Array, "b rows heads_d lanes"],
    value: Float[Array, "b rows heads_d lanes"],
    bias: Float[Array, "heads g rows lanes"],
) -> Float[Array, "b g heads_d"]:
    """What global tokens make of all tokens, as they lie in the slots of `ChunkLayout`."""
    heads = len(bias)
    query = rearrange(query, "b g (heads d) -> b heads g d", heads=heads)
    key, value = (
        rearrange(x, "b y (heads d) l -> b y heads d l", heads=heads) for x in (key, value)
    )
    logits = jnp.einsum("bhgd,byhdl->bhgyl", query, key, preferred_element_type=jnp.float32)
    weights = nn.softmax(logits + bias, axis=(-2, -1)).astype(value.dtype)
    out = jnp.einsum("bhgyl,byhdl->bghd", weights, value)
    return rearrange(out, "b g heads d -> b g (heads d)")


class SparseAttention(nn.Module):
    """Cells attend to the nine chunks around them, and to global tokens."""

    num_heads: int
    num_global: int
    window_size: int
    dtype: DTypeLike = jnp.float32
    return_weights: bool = False
    attention: str = "xla"  # by which code; see `ViL`

    @nn.compact
    def __call__(
        self, tokens: Float[Array, "b t d"], shape: tuple[int, int]
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b 1 heads t t"] | None]:
        """`shape` is that of the map. Weights are returned if `return_weights`, of all pairs."""
        dim, heads, size, g = tokens.shape[-1], self.num_heads, self.window_size, self.num_global
        table = jnp.asarray(self.param(TABLE, LINEAR_INIT, ((4 * size - 1) ** 2, heads)))
        of_global = global_biases(self, heads, g)
        local = jnp.take(table, neighbour_index(size).reshape(-1), axis=0)
        local = rearrange(local, "(q k) heads -> heads q k", q=size**2)
        project = Linear(dim, dtype=self.dtype, name="query")
        project_keys = Linear(2 * dim, dtype=self.dtype, name="kv")
        project_out = Linear(dim, dtype=self.dtype, name="proj")
        scale = (dim // heads) ** -0.5

        layout = ChunkLayout(*shape, size, heads, dim // heads, g)
        takes_kernel = kernels.chosen(self.attention, layout, tokens.shape[0], self.dtype)
        if takes_kernel and not self.return_weights:
            slots = layout.in_slots(tokens)
            query = project(layout.without_border(slots), turned=True) * scale
            key, value = (project_keys(slots, part, turned=True) for part in np.s_[:dim, dim:])
            out = kernels.attend_chunks(query, key, value, local, of_global[0][1], layout)
            out = layout.out_of_slots(project_out(rearrange(out, "b y d lanes -> b y lanes d")))
            if g:
                bias = layout.global_bias(of_global[0][0], of_global[1])
                first = attention_over_slots(project(tokens[:, :g]) * scale, key, value, bias)
                out = jnp.concatenate([project_out(first), out], axis=1)
            return out, None

        query = project(tokens) * scale
        key, value = jnp.split(project_keys(tokens), 2, axis=-1)
        to_global = repeat(of_global[0][1], "heads g -> heads q g", q=size**2)
        chunks = chunk_attention(
            *(in_chunks(x[:, g:], shape, size, heads) for x in (query, key, value)),
            *(in_heads(x[:, :g], heads) for x in (key, value)),
            bias=jnp.concatenate([to_global, local], axis=-1),
            inside=neighbours_inside(*shape, size),
        )
        out = out_of_chunks(chunks, shape, size)
        query, key, value = (in_heads(x, heads) for x in (query, key, value))
        if g:
            bias = global_rows(of_global, out.shape[1])[None]
            first = window_attention(query[..., :g, :], key, value, bias, jnp.float32)
            first = rearrange(first, "b 1 heads g d -> b g (heads d)")
            out = jnp.concatenate([first, out], axis=1)
        out = project_out(out)
        if not self.return_weights:
            return out, None
        bias = whole_bias(sparse_bias(table, *shape, size), of_global)
        return out, nn.softmax(attention_logits(query, key, bias[None], jnp.float32), axis=-1)


class FullAttention(nn.Module):
    """All tokens attend to all.

    The bias table is of maps of `side` x `side` cells. For others the matrix of the bias of all
    pairs of cells, in which these are counted row by row, is resized like an image, as the
    published implementation does it.
    """

    num_heads: int
    num_global: int
    side: int
    dtype: DTypeLike = jnp.float32
    return_weights: bool = False

    @nn.compact
    def __call__(
        self, tokens: Float[Array, "b t d"], shape: tuple[int, int]
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b 1 heads t t"] | None]:
        """`shape` is that of the map. Weights are returned if `return_weights`."""
        dim, heads, cells = tokens.shape[-1], self.num_heads, self.side**2
        table = self.param(TABLE, LINEAR_INIT, ((2 * self.side - 1) ** 2, heads))
        of_global = global_biases(self, heads, self.num_global)
        local = jnp.take(table, relative_position_index(self.side).reshape(-1), axis=0)
        local = rearrange(local, "(q k) heads -> heads q k", q=cells)
        if shape[0] * shape[1] != cells:
            resize = bicubic_matrix(cells, shape[0] * shape[1]).astype(np.float32)
            local = jnp.einsum("qi,kj,hij->hqk", resize, resize, local, precision="highest")
        bias = whole_bias(local, of_global)[None]
        qkv = Linear(3 * dim, dtype=self.dtype, name="qkv")(tokens)
        query, key, value = (in_heads(x, heads) for x in jnp.split(qkv, 3, axis=-1))
        query *= (dim // heads) ** -0.5
        out = window_attention(query, key, value, bias, jnp.float32)
        out = rearrange(out, "b 1 heads t d -> b t (heads d)")
        out = Linear(dim, dtype=self.dtype, name="proj")(out)
        if not self.return_weights:
            return out, None
        return out, nn.softmax(attention_logits(query, key, bias, jnp.float32), axis=-1)
