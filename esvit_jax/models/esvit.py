"""EsViT: a backbone with a view head and a region head, over views of several sizes."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from esvit_jax.models.heads import ProjectionHead


@struct.dataclass
class EsViTOutput:
    """Of one network over stacks of views; the tuples have one entry a stack (a view size).

    Attributes:
      view: f32[v, b, bottleneck], view-head vectors of length 1.
      region: f32[v, b, n, bottleneck], region-head vectors of length 1; () without region head.
      features: f32[v, b, n, d], the backbone's region features.
      pooled: f32[v, b, d], the backbone's view features.
      view_prototypes, region_prototypes: f32[k, bottleneck]; the latter None without region head.
    """

    view: tuple[Any, ...]
    region: tuple[Any, ...]
    features: tuple[Any, ...]
    pooled: tuple[Any, ...]
    view_prototypes: Any
    region_prototypes: Any


class EsViT(nn.Module):
    """The student's and the teacher's network.

    Attributes:
      backbone: a module as in `esvit_jax.models.create_backbone`.
      region: whether there is a region head.
      The others: see `ProjectionHead`.
    """

    backbone: nn.Module
    num_prototypes: int
    hidden_dim: int = 2048
    bottleneck_dim: int = 256
    norm_last_layer: bool = False
    region: bool = True
    dtype: DTypeLike = jnp.float32

    def setup(self):
        head = (
            self.num_prototypes,
            self.hidden_dim,
            self.bottleneck_dim,
            self.norm_last_layer,
            self.dtype,
        )
        self.view_head = ProjectionHead(*head)
        if self.region:
            self.region_head = ProjectionHead(*head)

    def __call__(
        self, stacks: Sequence[Float[Array, "_ b _ _ 3"]], train: bool = False
    ) -> EsViTOutput:
        """One forward of the backbone for each stack of views f32[v, b, h, w, 3]."""
        view, region, features, pooled = [], [], [], []
        for images in stacks:
            v = images.shape[0]
            out = self.backbone(rearrange(images, "v b h w c -> (v b) h w c"), train)
            pooled.append(rearrange(out.view, "(v b) d -> v b d", v=v))
            features.append(rearrange(out.regions, "(v b) h w d -> v b (h w) d", v=v))
            view.append(self.view_head(pooled[-1]))
            if self.region:
                region.append(self.region_head(features[-1]))
        return EsViTOutput(
            view=tuple(view),
            region=tuple(region),
            features=tuple(features),
            pooled=tuple(pooled),
            view_prototypes=self.view_head.prototypes(),
            region_prototypes=self.region_head.prototypes() if self.region else None,
        )
