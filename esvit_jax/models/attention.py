"""Attention within windows, with its own backward pass.

Attention of a Swin waits for memory: with 49 tokens a window and 32 features a head, one array of
float32 logits is as large as queries, keys and values in bfloat16 together. Autodiff keeps the
logits and computes the softmax from them for each product of the backward pass. Here the only
thing of that size that is kept is exp(logits - max), in the dtype of the values; the rest follows
from sum_k p_k dp_k = out . dout (Dao et al. 2022, FlashAttention).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def attention_logits(
    query: Float[Array, "b m heads n d"],
    key: Float[Array, "b m heads k d"],
    bias: Float[Array, "m heads n k"],
    logits_dtype: DTypeLike,
) -> Float[Array, "b m heads n k"]:
    """query key' + bias, kept in `logits_dtype`."""
    logits = jnp.einsum("bmhqd,bmhkd->bmhqk", query, key, preferred_element_type=logits_dtype)
    return logits + bias.astype(logits_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def window_attention(
    query: Float[Array, "b m heads n d"],
    key: Float[Array, "b m heads k d"],
    value: Float[Array, "b m heads k d"],
    bias: Float[Array, "m heads n k"],
    logits_dtype: DTypeLike,
) -> Float[Array, "b m heads n d"]:
    """softmax(query key' + bias) value, in each head of each of the m windows of b maps.

    The batch axes come first and stay apart: elsewhere they cost CPUs a slow product, and merged
    into one they cost TPUs bytes (CHANGELOG, "Bytes").

    Args:
      query: scaled already.
      key, value: of the same dtype.
      bias: of relative positions, and what keeps tokens of different parts of the map apart.
      logits_dtype: in which the logits are kept; the softmax is float32.
    """
    return _forward(query, key, value, bias, logits_dtype)[0]


def _forward(query: Any, key: Any, value: Any, bias: Any, logits_dtype: DTypeLike) -> Any:
    logits = attention_logits(query, key, bias, logits_dtype).astype(jnp.float32)
    exp = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True)).astype(value.dtype)
    # Without the barriers the compiler would rather read the logits again for every use.
    exp = jax.lax.optimization_barrier(exp)
    inverse_sum = 1.0 / jnp.sum(exp.astype(jnp.float32), axis=-1, keepdims=True)
    out = jnp.einsum("bmhqk,bmhkd->bmhqd", exp, value, preferred_element_type=jnp.float32)
    out = (out * inverse_sum).astype(value.dtype)
    return out, (query, key, value, exp, inverse_sum, out)


def _backward(logits_dtype: DTypeLike, kept: Any, d_out: Any) -> Any:
    query, key, value, exp, inverse_sum, out = kept
    # The mean of d_weights under the weights.
    mean = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    d_value = jnp.einsum("bmhqk,bmhqd->bmhkd", exp, (d_out * inverse_sum).astype(value.dtype))
    d_weights = jnp.einsum("bmhqd,bmhkd->bmhqk", d_out, value, preferred_element_type=jnp.float32)
    d_logits = exp.astype(jnp.float32) * ((d_weights - mean) * inverse_sum)
    d_logits = jax.lax.optimization_barrier(d_logits.astype(value.dtype))
    d_query = jnp.einsum("bmhqk,bmhkd->bmhqd", d_logits, key)
    d_key = jnp.einsum("bmhqk,bmhqd->bmhkd", d_logits, query)
    return d_query, d_key, d_value, jnp.sum(d_logits.astype(jnp.float32), axis=0)


window_attention.defvjp(_forward, _backward)
