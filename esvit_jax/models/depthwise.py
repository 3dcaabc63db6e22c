"""A 3 x 3 depthwise convolution, by the code that a device runs well.

There are two ways to say it to XLA, and none is good for all devices (`python -m
esvit_jax.bench.depthwise`, forward and backward; docs/measurements.md has all of it):

- As a convolution with as many groups as features. TPUs have code for that: the largest maps of a
  step of CvT-T, with the norms around them, are estimated at 6.5 Mcycles of a v5e, in nine shifts
  at 16.5. CPUs take the groups one after the other: 145 ms for 8 maps of 56 x 56 x 64, 72 ms for 8
  of 14 x 14 x 384.
- As nine shifted maps, multiplied and added in one pass. On CPUs 10.6 ms and 3.8 ms. Most of that
  is the kernel's gradient, nine sums over the map, here in one reduction of nine values.

GPUs get the second, which nobody has measured there.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from esvit_jax.models import kernels
from esvit_jax.models.layers import LINEAR_INIT


class DepthwiseConvolution(nn.Module):
    """Each feature of a map by its own 3 x 3 kernel, of the map with a border of zeros; no bias."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
        kernel = self.param("kernel", LINEAR_INIT, (3, 3, 1, x.shape[-1]))
        x, kernel = x.astype(self.dtype), jnp.asarray(kernel, self.dtype)
        return by_groups(x, kernel) if kernels.for_tpu() else by_shifts(x, kernel)


def by_groups(
    x: Float[Array, "b h w d"], kernel: Float[Array, "3 3 1 d"]
) -> Float[Array, "b h w d"]:
    """sum_ij x[y + i - 1, x + j - 1] kernel[i, j], as a convolution of d groups."""
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )  # fmt: skip


@jax.custom_vjp
def by_shifts(
    x: Float[Array, "b h w d"], kernel: Float[Array, "3 3 1 d"]
) -> Float[Array, "b h w d"]:
    """The same as `by_groups`, as nine products."""
    return _weighted(x, kernel)


def _weighted(x: Array, kernel: Array) -> Array:
    weights = kernel.astype(jnp.float32).reshape(9, -1)
    total = jnp.zeros(x.shape, jnp.float32)
    for shifted, weight in zip(_shifted(x), weights, strict=True):
        total += shifted * weight
    return total.astype(x.dtype)


def _shifted(x: Array) -> list[Array]:
    """What each cell's neighbours hold, f32[b, h, w, d], row by row of the kernel."""
    _, height, width, _ = x.shape
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))).astype(jnp.float32)
    return [x[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]


def _forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _weighted(x, kernel), (x, kernel)


def _backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = kept
    (of_x,) = jax.linear_transpose(lambda x: _weighted(x, kernel), x)(gradient)
    gradient = gradient.astype(jnp.float32)
    products = tuple(shifted * gradient for shifted in _shifted(x))
    zeros = (jnp.zeros((), jnp.float32),) * 9
    # Over maps and lines, then over columns: a float32 sum of fewer terms.
    sums = jax.lax.reduce(products, zeros, _add, (0, 1))
    of_kernel = jnp.sum(jnp.stack(sums), axis=1).reshape(kernel.shape)
    return of_x, of_kernel.astype(kernel.dtype)


def _add(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(x + y for x, y in zip(a, b, strict=True))


by_shifts.defvjp(_forward, _backward)
