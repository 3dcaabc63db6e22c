"""Batch norms over all devices, and their running statistics, which lie among the params."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from esvit_jax.models.layers import Leaf, Param

AXIS = "data"  # of the devices, in what is written for one of them
STATISTICS = "batch_stats"  # the collection that holds what batch norms have seen in training


class BatchStatistics(NamedTuple):
    """Of the rows that one call of a batch norm has seen, on all devices.

    Attributes:
      mean, variance: f32[d]; the variance is the mean square, as it normalises.
      rows: f32, how many.
    """

    mean: Leaf
    variance: Leaf
    rows: Leaf


class BatchNorm(nn.Module):
    """(x - mean) / sqrt(variance + 1e-5) * scale + bias over all axes but the last, in float32.

    In training, which is where the collection `STATISTICS` is mutable, mean and variance are the
    batch's, over the devices of `AXIS`, and each call adds them to that collection. Otherwise they
    are the running ones, which lie among the params, as in every state dict, but get no gradient;
    `with_statistics` moves them.
    """

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        mean = self.param("running_mean", nn.initializers.zeros, (x.shape[-1],))
        variance = self.param("running_var", nn.initializers.ones, (x.shape[-1],))
        if self.is_initializing() or not self.is_mutable_collection(STATISTICS):
            factor = jax.lax.rsqrt(jax.lax.stop_gradient(jnp.asarray(variance)) + 1e-5)
            x = (x.astype(jnp.float32) - jax.lax.stop_gradient(jnp.asarray(mean))) * factor
            return (x * scale + bias).astype(self.dtype)
        seen = batch_statistics(x)
        self.sow(STATISTICS, "calls", seen)
        return _normalize(x, scale, bias, seen.mean, seen.variance, self.dtype)


def batch_statistics(x: Float[Array, "*rows d"]) -> BatchStatistics:
    """Of all rows on all devices of `AXIS`; without gradient."""
    x = jax.lax.stop_gradient(x).reshape(-1, x.shape[-1]).astype(jnp.float32)
    mean = jax.lax.pmean(jnp.mean(x, axis=0), AXIS)
    variance = jax.lax.pmean(jnp.mean(jnp.square(x - mean), axis=0), AXIS)
    return BatchStatistics(mean, variance, jax.lax.psum(jnp.float32(len(x)), AXIS))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _normalize(
    x: Array, scale: Param, bias: Param, mean: Array, variance: Array, dtype: DTypeLike
) -> Array:
    """By statistics of x itself, of which the gradient knows; what it keeps is x as it came."""
    x = (x.astype(jnp.float32) - mean) * jax.lax.rsqrt(variance + 1e-5)
    return (x * scale + bias).astype(dtype)


def _normalize_forward(x, scale, bias, mean, variance, dtype):
    return _normalize(x, scale, bias, mean, variance, dtype), (x, scale, mean, variance)


def _normalize_backward(dtype, kept, gradient):
    x, scale, mean, variance = kept
    rows = tuple(range(x.ndim - 1))
    factor = jax.lax.rsqrt(variance + 1e-5)
    normal = (x.astype(jnp.float32) - mean) * factor
    gradient = gradient.astype(jnp.float32)
    of_bias, of_scale = jnp.sum(gradient, rows), jnp.sum(gradient * normal, rows)
    count = math.prod(x.shape[:-1])
    mean_bias, mean_scale = jax.lax.pmean((of_bias / count, of_scale / count), AXIS)
    of_x = (gradient - mean_bias - normal * mean_scale) * (scale * factor)
    zeros = jnp.zeros_like(mean)
    return of_x.astype(x.dtype), of_scale, of_bias, zeros, zeros


_normalize.defvjp(_normalize_forward, _normalize_backward)


def is_running(path: Sequence[Any]) -> bool:
    """Whether the param at a path of a tree is a running statistic, which is not learned."""
    return str(getattr(path[-1], "key", path[-1])).startswith("running_")


def with_statistics(params: PyTree, statistics: PyTree) -> PyTree:
    """The params with running averages moved by what a step's calls have seen, in their order.

    running <- 0.9 running + 0.1 seen, the variance with rows / (rows - 1), as in PyTorch.

    Args:
      params: of a network.
      statistics: its collection `STATISTICS`, of parts of the batch along the leading axis.
    """
    flat: dict[Any, Any] = traverse_util.flatten_dict(params)
    seen_by: dict[Any, Any] = traverse_util.flatten_dict(statistics)
    for (*path, _), calls in seen_by.items():
        for seen in calls:
            rows, mean = jnp.sum(seen.rows), jnp.mean(seen.mean, axis=0)
            variance = jnp.mean(seen.variance + jnp.square(seen.mean - mean), axis=0)
            variance *= rows / jnp.maximum(rows - 1, 1)
            for name, new in (("running_mean", mean), ("running_var", variance)):
                flat[*path, name] = 0.9 * flat[*path, name] + 0.1 * new
    return traverse_util.unflatten_dict(flat)
