"""Building blocks shared by the backbones."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

Size = Any  # of an axis: an int, or the symbol of an exported program

LINEAR_INIT = nn.initializers.normal(stddev=0.02)


def uniform_fan_in(fan_in: int) -> nn.initializers.Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), PyTorch's default for convolutions and linears."""
    bound = fan_in**-0.5

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + 1e-6) * scale + bias over the last axis, computed in float32.

    `nn.LayerNorm` multiplies the scale by 1 / sqrt(...) first; for the gradient of that product a
    CPU keeps the scale once for every row.
    """

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        x = x.astype(jnp.float32)
        x -= jnp.mean(x, axis=-1, keepdims=True)
        x *= jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
        return (x * scale + bias).astype(self.dtype)


class Linear(nn.Module):
    """x @ kernel + bias over the last axis, as one product of two matrices.

    `nn.Dense` contracts the axes of x where they are; the gradient of its kernel then contracts
    several axes at once, for which XLA transposes whole maps first (on CPU half of its time).
    """

    features: int
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows features"]:
        kernel = self.param("kernel", LINEAR_INIT, (x.shape[-1], self.features))
        rows = rearrange(x.astype(self.dtype), "... d -> (...) d")
        rows = rows @ kernel.astype(self.dtype)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            rows += bias.astype(self.dtype)
        return rows.reshape(*x.shape[:-1], self.features)


@jax.custom_vjp
def gelu(x: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
    """x Phi(x), with the error function: the exact one, as PyTorch computes it.

    `nn.gelu` goes through erfc, which costs twice as much on CPU. The backward pass computes the
    error function again: kept, it would be one more array as large as x.
    """
    return 0.5 * x * (1.0 + jax.lax.erf(x * 0.5**0.5))


def _gelu_forward(x: Array) -> tuple[Array, Array]:
    return gelu(x), x


def _gelu_backward(x: Array, gradient: Array) -> tuple[Array]:
    # Without the barrier the compiler finds both error functions to be one, and keeps it.
    x32 = jax.lax.optimization_barrier(x).astype(jnp.float32)
    cdf = 0.5 * (1.0 + jax.lax.erf(x32 * 0.5**0.5))
    density = jnp.exp(-0.5 * x32 * x32) * (2.0 * math.pi) ** -0.5
    return (((cdf + x32 * density) * gradient.astype(jnp.float32)).astype(x.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)


class DropPath(nn.Module):
    """Drops a residual branch for some images and scales the others (Huang et al. 2016)."""

    rate: float

    @nn.compact
    def __call__(
        self, branch: Float[Array, "rows d"], images: Size, train: bool
    ) -> Float[Array, "rows d"]:
        """Each of the images has as many rows, one after the other."""
        if not train or self.rate == 0.0:
            return branch
        keep = 1.0 - self.rate
        kept = jax.random.bernoulli(self.make_rng("drop_path"), keep, (images,))
        kept = jnp.repeat(kept, branch.shape[0] // images)[:, None]
        return jnp.where(kept, branch / keep, 0).astype(branch.dtype)


class Mlp(nn.Module):
    """linear - exact GELU - linear."""

    hidden_dim: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
        hidden = Linear(self.hidden_dim, dtype=self.dtype, name="fc1")(x)
        hidden = gelu(hidden)
        return Linear(x.shape[-1], dtype=self.dtype, name="fc2")(hidden)


def l2_normalize(x: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
    """x / max(|x|, 1e-12) along the last axis, with a finite gradient at 0."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))
