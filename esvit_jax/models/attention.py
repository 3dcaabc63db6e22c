"""Attention within windows, with its own backward pass.

Attention of a Swin waits for memory: with 49 tokens a window and 32 features a head, one array of
float32 logits is as large as queries, keys and values in bfloat16 together. Autodiff keeps the
logits and computes the softmax from them for each product of the backward pass. Here the only
thing of that size that is kept is exp(logits - max), in the dtype of the values; the rest follows
from sum_k p_k dp_k = out . dout (Dao et al. 2022, FlashAttention).
"""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from esvit_jax.models import kernels
from esvit_jax.models.kernels.layout import Layout
from esvit_jax.models.layers import LINEAR_INIT, Linear, Size


def relative_position_index(window_size: int) -> np.ndarray:
    """Row of the bias table for each (query, key) of a window: int[n, n], d = query - key."""
    y, x = np.divmod(np.arange(window_size**2), window_size)
    dy, dx = y[:, None] - y[None, :], x[:, None] - x[None, :]
    return (dy + window_size - 1) * (2 * window_size - 1) + (dx + window_size - 1)


def shift_mask(height: int, width: int, window_size: int, shift: int) -> np.ndarray:
    """Which pairs of tokens of the shifted map stay apart: f32[windows, n, n], 0 or -100.

    Rolling the (padded) map by `shift` brings tokens of opposite borders into one window; three
    bands an axis tell them apart.
    """

    def bands(length: int) -> np.ndarray:
        position = np.arange(length)
        return (position >= length - window_size).astype(int) + (position >= length - shift)

    band = bands(height)[:, None] * 3 + bands(width)[None, :]
    band = rearrange(band, "(y h) (x w) -> (y x) (h w)", h=window_size, w=window_size)
    return np.where(band[:, :, None] == band[:, None, :], 0.0, -100.0).astype(np.float32)


def partition(
    rows: Float[Array, "bhw d"], shape: tuple[Size, int, int], window_size: int, shift: int
) -> Float[Array, "bmn d"]:
    """Tokens of maps (b, h, w), window by window of the map padded with 0 and rolled by -shift."""
    _, height, width = shape
    padding = ((0, 0), (0, -height % window_size), (0, -width % window_size), (0, 0))
    maps = jnp.pad(rows.reshape(*shape, -1), padding)
    maps = jnp.roll(maps, (-shift, -shift), axis=(1, 2))
    return rearrange(maps, "b (y h) (x w) d -> (b y x h w) d", h=window_size, w=window_size)


def unpartition(
    windows: Float[Array, "b m heads n d"],
    shape: tuple[Size, int, int],
    window_size: int,
    shift: int,
) -> Float[Array, "bhw heads_d"]:
    """Undoes `partition`, and puts heads side by side; what came of padding is dropped."""
    _, height, width = shape
    maps = rearrange(
        windows,
        "b (y x) heads (h w) d -> b (y h) (x w) (heads d)",
        x=-(-width // window_size),
        h=window_size,
    )
    maps = jnp.roll(maps, (shift, shift), axis=(1, 2))[:, :height, :width]
    return rearrange(maps, "b h w d -> (b h w) d")


def window_positions(
    height: int, width: int, window_size: int, shift: int
) -> tuple[np.ndarray, np.ndarray]:
    """Positions in the window of the tokens of a map that fits one, row-major; and of its padding.

    A position counts the window's cells row by row; it is the row and column of the window's bias.
    """
    position = np.arange(window_size**2).reshape(window_size, window_size)
    position = np.roll(position, (shift, shift), axis=(0, 1))
    inside = np.zeros(position.shape, bool)
    inside[:height, :width] = True
    return position[inside], position[~inside]


def split_heads(
    qkv: Float[Array, "bmn d3"], m: int, n: int, heads: int
) -> list[Float[Array, "b m heads n d"]]:
    """Query, key and value; in three before heads get their axis, or TPUs copy all of it."""
    arrange = "(b m n) (heads d) -> b m heads n d"
    return [rearrange(x, arrange, m=m, n=n, heads=heads) for x in jnp.split(qkv, 3, axis=-1)]


def add_padding(
    key: Float[Array, "b 1 heads n d"],
    value: Float[Array, "b 1 heads n d"],
    bias: Float[Array, "1 heads n n"],
    padded: list[Float[Array, "1 1 heads 1 d"]],
    padding_bias: Float[Array, "1 heads n p"],
) -> tuple[
    Float[Array, "b 1 heads k d"], Float[Array, "b 1 heads k d"], Float[Array, "1 heads n k"]
]:
    """Adds one key that counts as much as p padded tokens, whose key and value are `padded`.

    They are the same for all: sum_j exp(q k + bias_j) = exp(q k + log sum_j exp(bias_j)).
    """
    key, value = (
        jnp.concatenate([x, jnp.broadcast_to(y, (len(x), *y.shape[1:]))], axis=-2)
        for x, y in zip((key, value), padded, strict=True)
    )
    total = nn.logsumexp(padding_bias, axis=-1, keepdims=True)
    return key, value, jnp.concatenate([bias, total], axis=-1)


def one_window_bias(
    bias: Float[Array, "heads n2 n2"], tokens: np.ndarray, padding: np.ndarray
) -> Float[Array, "heads n k"]:
    """Of the tokens of a map within one window; `add_padding`'s key, if any, comes last."""
    bias = bias[:, tokens]
    if not len(padding):
        return bias[..., tokens]
    total = nn.logsumexp(bias[..., padding], axis=-1, keepdims=True)
    return jnp.concatenate([bias[..., tokens], total], axis=-1)


def attention_logits(
    query: Float[Array, "b m heads n d"],
    key: Float[Array, "b m heads k d"],
    bias: Float[Array, "m heads n k"],
    logits_dtype: DTypeLike,
) -> Float[Array, "b m heads n k"]:
    """query key' + bias, kept in `logits_dtype`."""
    logits = jnp.einsum("bmhqd,bmhkd->bmhqk", query, key, preferred_element_type=logits_dtype)
    return logits + bias.astype(logits_dtype)


def window_attention(
    query: Float[Array, "b m heads n d"],
    key: Float[Array, "b m heads k d"],
    value: Float[Array, "b m heads k d"],
    bias: Float[Array, "m heads n k"],
    logits_dtype: DTypeLike,
) -> Float[Array, "b m heads n d"]:
    """softmax(query key' + bias) value, in each head of each of the m windows of b maps.

    The batch axes come first and stay apart: elsewhere they cost CPUs a slow product, and merged
    into one they cost TPUs bytes (docs/notes/bytes.md).

    Args:
      query: scaled already.
      key, value: of the same dtype.
      bias: of relative positions, and what keeps tokens of different parts of the map apart.
      logits_dtype: in which the logits are kept; the softmax is float32.
    """
    return _window_attention(query, key, value, bias, logits_dtype)


def _value(query: Array, key: Array, value: Array, bias: Array, logits_dtype: DTypeLike) -> Array:
    return _forward(query, key, value, bias, logits_dtype)[0]


def _forward(
    query: Array, key: Array, value: Array, bias: Array, logits_dtype: DTypeLike
) -> tuple[Array, tuple[Array, ...]]:
    logits = attention_logits(query, key, bias, logits_dtype).astype(jnp.float32)
    exp = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True)).astype(value.dtype)
    # Without the barriers the compiler would rather read the logits again for every use.
    exp = jax.lax.optimization_barrier(exp)
    inverse_sum = 1.0 / jnp.sum(exp.astype(jnp.float32), axis=-1, keepdims=True)
    out = jnp.einsum("bmhqk,bmhkd->bmhqd", exp, value, preferred_element_type=jnp.float32)
    out = (out * inverse_sum).astype(value.dtype)
    return out, (query, key, value, exp, inverse_sum, out)


def _backward(
    logits_dtype: DTypeLike, kept: tuple[Array, ...], d_out: Array
) -> tuple[Array, Array, Array, Array]:
    query, key, value, exp, inverse_sum, out = kept
    # The mean of d_weights under the weights.
    d_out32 = d_out.astype(jnp.float32)
    mean = jnp.sum(d_out32 * out.astype(jnp.float32), axis=-1, keepdims=True)
    d_value = jnp.einsum("bmhqk,bmhqd->bmhkd", exp, (d_out32 * inverse_sum).astype(value.dtype))
    d_weights = jnp.einsum("bmhqd,bmhkd->bmhqk", d_out, value, preferred_element_type=jnp.float32)
    d_logits = exp.astype(jnp.float32) * ((d_weights - mean) * inverse_sum)
    d_logits = jax.lax.optimization_barrier(d_logits.astype(value.dtype))
    d_query = jnp.einsum("bmhqk,bmhkd->bmhqd", d_logits, key)
    d_key = jnp.einsum("bmhqk,bmhqd->bmhkd", d_logits, query)
    return d_query, d_key, d_value, jnp.sum(d_logits.astype(jnp.float32), axis=0)


_window_attention = jax.custom_vjp(_value, nondiff_argnums=(4,))
_window_attention.defvjp(_forward, _backward)


class WindowAttention(nn.Module):
    """Multi-head self-attention within windows, with a relative-position bias."""

    num_heads: int
    window_size: int
    shift: int
    dtype: DTypeLike = jnp.float32
    logits_dtype: DTypeLike = jnp.float32
    return_weights: bool = False
    attention: str = "xla"  # by which code; see `Swin`

    @nn.compact
    def __call__(
        self, rows: Float[Array, "bhw d"], shape: tuple[Size, int, int]
    ) -> tuple[Float[Array, "bhw d"], Float[Array, "b m heads n n"] | None]:
        """Attends within each window of the maps of shape (b, h, w), padded and shifted.

        Padding is not masked: a padded token takes part, with the query, key and value of zeros.

        Returns the tokens and, if `return_weights`, the weights (softmax over the last axis).
        """
        _, height, width = shape
        size, shift, heads, dim = self.window_size, self.shift, self.num_heads, rows.shape[-1]
        lines, columns = height + -height % size, width + -width % size
        m = lines * columns // size**2
        table = self.param(
            "relative_position_bias_table", LINEAR_INIT, ((2 * size - 1) ** 2, heads)
        )
        bias = jnp.take(table, relative_position_index(size).reshape(-1), axis=0)
        relative = rearrange(bias, "(q k) heads -> heads q k", q=size**2)
        bias = jnp.broadcast_to(relative, (m, heads, size**2, size**2))
        if shift:
            bias += shift_mask(lines, columns, size, shift)[:, None]
        project = Linear(3 * dim, dtype=self.dtype, name="qkv")
        layout = self.layout(shape, dim)
        if not self.return_weights and kernels.chosen(self.attention, layout, shape[0], self.dtype):
            if m == 1:
                relative = one_window_bias(bias[0], *window_positions(height, width, size, shift))
            padding = jnp.zeros_like(rows[:1])
            padding = project(padding) if layout.padded else jnp.tile(padding, (1, 3))
            out = kernels.attend(project(rows), padding, relative, layout)
            return Linear(dim, dtype=self.dtype, name="proj")(out), None

        # A map within one window stays as it is, and its padding becomes one key.
        one_window = m == 1 and not self.return_weights
        if one_window:
            tokens, padding = window_positions(height, width, size, shift)
            query, key, value = split_heads(project(rows), 1, len(tokens), heads)
            bias = bias[..., tokens, :]
            bias, padding_bias = bias[..., tokens], bias[..., padding]
            if len(padding):
                _, *padded = split_heads(project(jnp.zeros_like(rows[:1])), 1, 1, heads)
                key, value, bias = add_padding(key, value, bias, padded, padding_bias)
        else:
            windows = partition(rows, shape, size, shift)
            query, key, value = split_heads(project(windows), m, size**2, heads)
        query *= (dim // heads) ** -0.5
        out = window_attention(query, key, value, bias, self.logits_dtype)
        if one_window:
            out = rearrange(out, "b m heads n d -> (b m n) (heads d)")
        else:
            out = unpartition(out, shape, size, shift)
        out = Linear(dim, dtype=self.dtype, name="proj")(out)
        if not self.return_weights:
            return out, None
        logits = attention_logits(query, key, bias, self.logits_dtype)
        return out, nn.softmax(logits.astype(jnp.float32), axis=-1)

    def layout(self, shape: tuple[Size, int, int], dim: int) -> Layout:
        """What the kernel has to know: a map that fits one window is one, of its own shape."""
        (_, height, width), size, heads = shape, self.window_size, self.num_heads
        if max(height, width) <= size:
            padded = (height, width) != (size, size)
            return Layout(height, width, None, 0, heads, dim // heads, padded)
        return Layout(height, width, size, self.shift, heads, dim // heads)
