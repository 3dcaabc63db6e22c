"""Projection head: features to bottleneck vectors, and the prototypes they are compared with."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from esvit_jax.models.batch_norm import BatchNorm
from esvit_jax.models.layers import Linear, gelu, l2_normalize, uniform_fan_in


class Prototypes(nn.Module):
    """Weight-normalised prototypes: w = g * v / |v|, one row each."""

    num_prototypes: int
    dim: int
    fixed_norm: bool  # g stays 1

    @nn.compact
    def __call__(self) -> Float[Array, "k d"]:
        g = self.param("weight_g", nn.initializers.ones, (self.num_prototypes, 1))
        v = self.param("weight_v", uniform_fan_in(self.dim), (self.num_prototypes, self.dim))
        if self.fixed_norm:
            g = jax.lax.stop_gradient(g)
        return v * (g / jnp.linalg.norm(v, axis=-1, keepdims=True))


class ProjectionHead(nn.Module):
    """Three linears with exact GELU between them, then L2 normalisation.

    With `batch_norm` there is one after each of the first two linears, over all rows of a call.
    The last linear of the published head, to `num_prototypes` logits, is not applied here: the
    losses get `prototypes()` and never hold all logits.
    """

    num_prototypes: int
    hidden_dim: int = 2048
    bottleneck_dim: int = 256
    norm_last_layer: bool = False
    batch_norm: bool = False
    dtype: DTypeLike = jnp.float32

    def setup(self):
        # Numbered as in the published state dict, where GELUs have numbers too.
        if self.batch_norm:
            self.mlp_0 = Linear(self.hidden_dim, dtype=self.dtype)
            self.mlp_1 = BatchNorm(dtype=self.dtype)
            self.mlp_3 = Linear(self.hidden_dim, dtype=self.dtype)
            self.mlp_4 = BatchNorm(dtype=self.dtype)
            self.mlp_6 = Linear(self.bottleneck_dim, dtype=self.dtype)
        else:
            self.mlp_0 = Linear(self.hidden_dim, dtype=self.dtype)
            self.mlp_2 = Linear(self.hidden_dim, dtype=self.dtype)
            self.mlp_4 = Linear(self.bottleneck_dim, dtype=self.dtype)
        self.last_layer = Prototypes(self.num_prototypes, self.bottleneck_dim, self.norm_last_layer)

    def __call__(self, features: Float[Array, "*rows d"]) -> Float[Array, "*rows bottleneck"]:
        """Returns f32 bottleneck vectors of length 1."""
        if self.batch_norm:
            x = gelu(self.mlp_1(self.mlp_0(features)))
            x = self.mlp_6(gelu(self.mlp_4(self.mlp_3(x))))
        else:
            x = self.mlp_4(gelu(self.mlp_2(gelu(self.mlp_0(features)))))
        return l2_normalize(x.astype(jnp.float32))

    def prototypes(self) -> Float[Array, "k bottleneck"]:
        """Returns the f32 prototypes; logits are bottleneck vectors times these."""
        return self.last_layer()
