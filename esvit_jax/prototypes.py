"""The heavy primitive of the losses: softmaxes over prototypes that are never held whole.

The cross-entropy from a teacher's distribution q to a student's p over K prototypes is

    -sum_k q_k log p_k = logsumexp_k(s_k) - sum_k q_k s_k,    s_k = z . w_k / student_temp,

and the second sum is linear in the student's vector z: it is z . e / student_temp with the
teacher's *expected prototype* e = sum_k q_k w_k, one vector a teacher row. So a pair of rows costs
one product of short vectors, and the K axis appears in two functions only: `log_normalizer` of
student rows, and `expected_prototypes` of teacher rows, which is attention with the prototypes as
keys and values. Both run over chunks of prototypes and compute their logits again in the
backward pass; no array is larger than [rows, chunk_size] or [k, d].
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def _chunks(
    prototypes: Float[Array, "k d"], chunk_size: int
) -> tuple[Float[Array, "c size d"], Float[Array, "c size"]]:
    """Prototypes in equal chunks, and 0 (or -inf where padded) to add to their logits."""
    k, d = prototypes.shape
    count = 1 if chunk_size == 0 else -(-k // chunk_size)
    size = -(-k // count)
    padding = count * size - k
    padded = jnp.pad(prototypes, ((0, padding), (0, 0)))
    offset = jnp.pad(jnp.zeros(k, jnp.float32), (0, padding), constant_values=-jnp.inf)
    return padded.reshape(count, size, d), offset.reshape(count, size)


def _unchunk(chunks: Float[Array, "c size d"], k: int) -> Float[Array, "k d"]:
    return chunks.reshape(-1, chunks.shape[-1])[:k]


def _logits(rows, chunk, temp, dtype) -> Float[Array, "rows size"]:
    prototypes, offset = chunk
    products = jnp.einsum(
        "rd,kd->rk",
        rows.astype(dtype),
        prototypes.astype(dtype),
        preferred_element_type=jnp.float32,
    )
    return products / temp + offset


def _softmax_start(rows: int) -> tuple[Array, Array, Array]:
    zeros = jnp.zeros(rows, jnp.float32)
    return zeros - jnp.inf, zeros, zeros


def _softmax_step(carry, logits, dtype):
    """Adds a chunk of logits to (max, sum of exp, sum of exp * logit), all relative to the max.

    Returns:
      The new carry, the chunk's exponentials, and what earlier sums were scaled by.
    """
    top, total, total_logit = carry
    new_top = jnp.maximum(top, logits.max(axis=-1))
    exps = jnp.exp(logits - new_top[:, None])
    scale = jnp.exp(top - new_top)
    # Padding has logit -inf and weight 0; their product must be 0.
    weighted = _row_sums(jnp.where(exps > 0, exps * logits, 0.0), dtype)
    carry = (new_top, total * scale + _row_sums(exps, dtype), total_logit * scale + weighted)
    return carry, exps, scale


def _row_sums(x, dtype):
    """Sums over the last axis; those of a coarser dtype by a product with ones.

    A TPU adds up the lanes of a register in more time than its matrix units take for a product.
    """
    if jnp.dtype(dtype) == jnp.float32:
        return x.sum(axis=-1)
    return _matmul("rk,kl->rl", x, jnp.ones((x.shape[-1], 8)), dtype)[:, 0]


def _matmul(subscripts, a, b, dtype):
    return jnp.einsum(
        subscripts, a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32
    )


def log_normalizer(
    rows: Float[Array, "rows d"],
    prototypes: Float[Array, "k d"],
    temp: float,
    chunk_size: int,
    dtype: DTypeLike = jnp.float32,
) -> tuple[Float[Array, " rows"], Float[Array, " rows"]]:
    """log sum_k exp(z . w_k / temp) of every row z, and the entropy of its softmax.

    Args:
      rows: f32[rows, d] student vectors z.
      prototypes: f32[k, d], w.
      temp: the student's temperature.
      chunk_size: prototypes held at a time; 0 means all.
      dtype: of the factors of matrix products; sums and softmax are float32.

    Returns:
      The log-normalisers, and the entropies in nats (to watch; they have no gradient).
    """
    return _log_normalizer(rows, prototypes, temp, chunk_size, dtype)


def _log_normalizer_value(rows, prototypes, temp, chunk_size, dtype) -> tuple[Array, Array]:
    return _log_normalizer_forward(rows, prototypes, temp, chunk_size, dtype)[0]


def _log_normalizer_forward(rows, prototypes, temp, chunk_size, dtype):
    def body(carry, xs):
        return _softmax_step(carry, _logits(rows, xs, temp, dtype), dtype)[0], None

    start = _softmax_start(rows.shape[0])
    (top, total, total_logit), _ = jax.lax.scan(body, start, _chunks(prototypes, chunk_size))
    result = top + jnp.log(total)
    return (result, result - total_logit / total), (rows, prototypes, result)


def _log_normalizer_backward(temp, chunk_size, dtype, residuals, gradients):
    rows, prototypes, log_total = residuals
    gradient, _ = gradients

    def body(rows_gradient, xs):
        probs = jnp.exp(_logits(rows, xs, temp, dtype) - log_total[:, None])
        weighted = probs * (gradient / temp)[:, None]
        rows_gradient += _matmul("rk,kd->rd", weighted, xs[0], dtype)
        return rows_gradient, _matmul("rk,rd->kd", weighted, rows, dtype)

    rows_gradient, chunk_gradients = jax.lax.scan(
        body, jnp.zeros(rows.shape, jnp.float32), _chunks(prototypes, chunk_size)
    )
    return rows_gradient, _unchunk(chunk_gradients, prototypes.shape[0])


_log_normalizer = jax.custom_vjp(_log_normalizer_value, nondiff_argnums=(2, 3, 4))
_log_normalizer.defvjp(_log_normalizer_forward, _log_normalizer_backward)


def expected_prototypes(
    rows: Float[Array, "rows d"],
    teacher_prototypes: Float[Array, "k d"],
    student_prototypes: Float[Array, "k d"],
    center: Float[Array, " k"],
    temp: Float[Array, ""] | float,
    chunk_size: int,
    dtype: DTypeLike = jnp.float32,
) -> tuple[Float[Array, "rows d"], Float[Array, " rows"]]:
    """e = sum_k q_k w_k with q = softmax((t . w'_k - c_k) / temp) of every teacher row t.

    Only `student_prototypes` get a gradient: the teacher is a constant.

    Args:
      rows: f32[rows, d] teacher vectors t.
      teacher_prototypes: f32[k, d], w'.
      student_prototypes: f32[k, d], w.
      center: f32[k], c.
      temp: the teacher's temperature.
      chunk_size, dtype: see `log_normalizer`.

    Returns:
      f32[rows, d] e, and the entropies of q in nats (to watch; they have no gradient).
    """
    return _expected(rows, teacher_prototypes, student_prototypes, center, temp, chunk_size, dtype)


def _expected_value(*arguments) -> tuple[Array, Array]:
    return _expected_forward(*arguments)[0]


def _teacher_chunks(teacher_prototypes, center, temp, chunk_size):
    """Chunks of the teacher's prototypes, with the centering in the offsets."""
    chunks, offset = _chunks(teacher_prototypes, chunk_size)
    center = jnp.pad(center, (0, offset.size - center.size)).reshape(offset.shape)
    return chunks, offset - center / temp


def _expected_forward(
    rows, teacher_prototypes, student_prototypes, center, temp, chunk_size, dtype
):
    def body(carry, xs):
        softmax, expected = carry
        teacher_chunk, offset, student_chunk = xs
        softmax, exps, scale = _softmax_step(
            softmax, _logits(rows, (teacher_chunk, offset), temp, dtype), dtype
        )
        expected *= scale[:, None]
        return (softmax, expected + _matmul("rk,kd->rd", exps, student_chunk, dtype)), None

    start = (_softmax_start(rows.shape[0]), jnp.zeros(rows.shape, jnp.float32))
    xs = (
        *_teacher_chunks(teacher_prototypes, center, temp, chunk_size),
        _chunks(student_prototypes, chunk_size)[0],
    )
    ((top, total, total_logit), expected), _ = jax.lax.scan(body, start, xs)
    log_total = top + jnp.log(total)
    outputs = (expected / total[:, None], log_total - total_logit / total)
    return outputs, (rows, teacher_prototypes, student_prototypes, center, temp, log_total)


def _expected_backward(chunk_size, dtype, residuals, gradients):
    rows, teacher_prototypes, student_prototypes, center, temp, log_total = residuals
    gradient, _ = gradients

    def body(_, xs):
        probs = jnp.exp(_logits(rows, xs, temp, dtype) - log_total[:, None])
        return None, _matmul("rk,rd->kd", probs, gradient, dtype)

    _, chunk_gradients = jax.lax.scan(
        body, None, _teacher_chunks(teacher_prototypes, center, temp, chunk_size)
    )
    student_gradient = _unchunk(chunk_gradients, student_prototypes.shape[0])
    return (
        jnp.zeros_like(rows),
        jnp.zeros_like(teacher_prototypes),
        student_gradient,
        jnp.zeros_like(center),
        jnp.zeros_like(temp),
    )


_expected = jax.custom_vjp(_expected_value, nondiff_argnums=(5, 6))
_expected.defvjp(_expected_forward, _expected_backward)


def mean_logits(
    rows: Float[Array, "rows d"], prototypes: Float[Array, "k d"]
) -> Float[Array, " k"]:
    """Mean over rows of their logits: the mean row's logits, since logits are linear."""
    return jnp.einsum("d,kd->k", rows.mean(axis=0), prototypes, precision=jax.lax.Precision.HIGHEST)
