"""Building blocks shared by the backbones."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

Param = Array | np.ndarray
# A field of a pytree: an array; but jax rebuilds pytrees with shapes, shardings or None in its
# place, so that only type checkers may hold it to that.
if TYPE_CHECKING:
    Leaf = Array
else:
    Leaf = Any
Size = Any  # of an axis: an int, or the symbol of an exported program

LINEAR_INIT = nn.initializers.normal(stddev=0.02)


def uniform_fan_in(fan_in: int) -> nn.initializers.Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), PyTorch's default for convolutions and linears."""
    bound = fan_in**-0.5

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


# What a backward pass finds computed, by the name of what it computes again.
REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "block": jax.checkpoint_policies.nothing_saveable,
}


class NormParameters(nn.Module):
    """Scale and bias of a norm over d features, for who normalises himself."""

    dim: int

    @nn.compact
    def __call__(self) -> tuple[Float[Param, " d"], Float[Param, " d"]]:
        scale = self.param("scale", nn.initializers.ones, (self.dim,))
        return scale, self.param("bias", nn.initializers.zeros, (self.dim,))


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * scale + bias over the last axis, computed in float32.

    `nn.LayerNorm` multiplies the scale by 1 / sqrt(...) first; for the gradient of that product a
    CPU keeps the scale once for every row.
    """

    dtype: DTypeLike = jnp.float32
    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        x = x.astype(jnp.float32)
        x -= jnp.mean(x, axis=-1, keepdims=True)
        x *= jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return (x * scale + bias).astype(self.dtype)


class Kernel(nn.Module):
    """The kernel of a product, for who multiplies himself."""

    shape: tuple[int, int]

    @nn.compact
    def __call__(self) -> Float[Param, "d features"]:
        return self.param("kernel", LINEAR_INIT, self.shape)


def patch_convolution(
    features: int, size: int, channels: int, dtype: DTypeLike, as_product: bool
) -> nn.Conv:
    """The convolution "proj" of patches of size x size pixels, with PyTorch's initialisation.

    It has no overlap, so that it is a product of rows, too. XLA (jax 0.10) spreads the gradient of
    a convolution's kernel over several devices wrong where it comes from `jax.vmap`, as in
    `config.parallel="fsdp"`; that of a product it spreads right.
    """
    init = uniform_fan_in(size * size * channels)
    return nn.Conv(
        features,
        (size, size),
        strides=size,
        padding="VALID",
        kernel_init=init,
        bias_init=init,
        dtype=dtype,
        conv_general_dilated=_patch_product if as_product else None,
        name="proj",
    )


def at_least(maps: Float[Array, "b h w c"], size: int) -> Float[Array, "b h2 w2 c"]:
    """The maps, padded with 0 at the bottom and the right where a side is shorter than `size`."""
    short = [max(0, size - side) for side in maps.shape[1:3]]
    return jnp.pad(maps, ((0, 0), (0, short[0]), (0, short[1]), (0, 0)))


def _patch_product(images: Array, kernel: Array, strides: Sequence[int], *_: Any, **__: Any):
    """`jax.lax.conv_general_dilated` where strides are the kernel's sides; the rest is cut off."""
    p, q = strides
    images = images[:, : images.shape[1] // p * p, : images.shape[2] // q * q]
    rows = rearrange(images, "b (h p) (w q) c -> b h w (p q c)", p=p, q=q)
    return jnp.matmul(rows, rearrange(kernel, "p q c d -> (p q c) d"))


class Linear(nn.Module):
    """x @ kernel + bias over the last axis, as one product of two matrices.

    `nn.Dense` contracts the axes of x where they are; the gradient of its kernel then contracts
    several axes at once, for which XLA transposes whole maps first (on CPU half of its time).
    With `convolution` the kernel is [1, 1, d, features], that of a 1 x 1 convolution.
    """

    features: int
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32
    convolution: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "*rows d"], part: slice = slice(None), *, turned: bool = False
    ) -> Float[Array, "*rows_features"]:
        """All features or those of `part`, along the last axis; `turned`, along the one before.

        What is turned stays in its axes: a TPU's product then writes it so, and copies nothing.
        """
        shape = x.shape[-1], self.features
        kernel = self.param("kernel", LINEAR_INIT, (1, 1, *shape) if self.convolution else shape)
        rows = x.astype(self.dtype)
        rows = rows if turned else rows.reshape(-1, x.shape[-1])
        rows = product(rows, jnp.asarray(kernel, self.dtype).reshape(shape)[:, part])
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))[part]
            rows = rows + bias if turned else add_bias(rows, bias, self.dtype)
        rows = rows.astype(self.dtype)
        return rows.swapaxes(-1, -2) if turned else rows.reshape(*x.shape[:-1], rows.shape[-1])


def product(
    a: Float[Array, "*rows d"], b: Float[Array, "d features"]
) -> Float[Array, "*rows features"]:
    """a @ b, summed and returned in float32 whatever the factors' dtype."""
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def add_bias(
    rows: Float[Array, "rows d"], bias: Float[Param, " d"], dtype: DTypeLike
) -> Float[Array, "rows d"]:
    """rows + bias in `dtype`.

    The bias's gradient, a sum over rows, is a product with rows of ones, which takes a TPU less
    time (docs/notes/step.md).
    """
    return _add_bias(rows, bias, dtype)


def _add_bias_value(rows: Array, bias: Array, dtype: DTypeLike) -> Array:
    return (rows + bias).astype(dtype)


def _add_bias_forward(rows: Array, bias: Array, dtype: DTypeLike) -> tuple[Array, None]:
    return _add_bias_value(rows, bias, dtype), None


def _add_bias_backward(dtype: DTypeLike, _: None, gradient: Array) -> tuple[Array, Array]:
    ones = jnp.ones((8, gradient.shape[0]), gradient.dtype)  # of one row it makes a sum again
    total = jnp.matmul(ones, gradient, precision="highest", preferred_element_type=jnp.float32)
    return gradient.astype(jnp.float32), total[0]


_add_bias = jax.custom_vjp(_add_bias_value, nondiff_argnums=(2,))
_add_bias.defvjp(_add_bias_forward, _add_bias_backward)


@jax.custom_vjp
def gelu(x: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
    """x Phi(x), with the error function: the exact one, as PyTorch computes it.

    `nn.gelu` goes through erfc, which costs twice as much on CPU. The forward pass keeps the
    derivative in place of x, so that the backward pass is one multiplication.
    """
    return _gelu_forward(x)[0]


def _gelu_forward(x: Array) -> tuple[Array, Array]:
    x32 = x.astype(jnp.float32)
    cdf = 0.5 * (1.0 + jax.lax.erf(x32 * 0.5**0.5))
    density = jnp.exp(-0.5 * x32 * x32) * (2.0 * math.pi) ** -0.5
    return (x32 * cdf).astype(x.dtype), (cdf + x32 * density).astype(x.dtype)


def _gelu_backward(derivative: Array, gradient: Array) -> tuple[Array]:
    return (derivative * gradient,)


gelu.defvjp(_gelu_forward, _gelu_backward)


@jax.custom_vjp
def quick_gelu(x: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
    """x sigmoid(1.702 x), which keeps its derivative as `gelu` does."""
    return _quick_gelu_forward(x)[0]


def _quick_gelu_forward(x: Array) -> tuple[Array, Array]:
    x32 = x.astype(jnp.float32)
    gate = nn.sigmoid(1.702 * x32)
    derivative = gate * (1.0 + 1.702 * x32 * (1.0 - gate))
    return (x32 * gate).astype(x.dtype), derivative.astype(x.dtype)


quick_gelu.defvjp(_quick_gelu_forward, _gelu_backward)


class DropPath(nn.Module):
    """Drops a residual branch for some images and scales the others (Huang et al. 2016)."""

    rate: float

    @nn.compact
    def __call__(
        self, branch: Float[Array, "rows d"], drawn: Float[Array, " images"] | None
    ) -> Float[Array, "rows d"]:
        """Each of the images has as many rows, one after the other.

        Args:
          branch: of all images.
          drawn: a number in [0, 1) for each, which is kept where that is below 1 - rate; None
            where nobody trains.
        """
        if drawn is None or self.rate == 0.0:
            return branch
        keep = 1.0 - self.rate
        kept = jnp.repeat(drawn < keep, branch.shape[0] // len(drawn))[:, None]
        return jnp.where(kept, branch / keep, 0).astype(branch.dtype)


def drop_path_of_blocks(
    rate: float, count: int, drawn: Float[Array, "b draws"] | None
) -> tuple[list[float], list[Float[Array, "2 b"] | None]]:
    """Each block's drop path: its rate, and the numbers of its two branches.

    Args:
      rate: of the last block; grows linearly from 0 at the first.
      count: of blocks.
      drawn: 2 * count numbers in [0, 1) an image; None where nobody trains.
    """
    rates = np.linspace(0.0, rate, count).tolist()
    if drawn is None:
        return rates, [None] * count
    return rates, list(rearrange(drawn, "b (l k) -> l k b", k=2))


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
