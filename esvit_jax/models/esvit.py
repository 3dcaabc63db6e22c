"""EsViT: a backbone with a view head and a region head, over views of several sizes."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from einops import pack, rearrange, unpack
from flax import linen as nn
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key, PyTree

from esvit_jax.models.backbone import Backbone
from esvit_jax.models.batch_norm import STATISTICS
from esvit_jax.models.heads import ProjectionHead
from esvit_jax.models.layers import Leaf


@struct.dataclass
class HeadOutput:
    """Of one projection head over stacks of views.

    Attributes:
      vectors: one f32[v, b, bottleneck] a stack (view head) or f32[v, b, n, bottleneck] (region
        head), of length 1.
      prototypes: f32[k, bottleneck], what the vectors are compared with.
    """

    vectors: tuple[Leaf, ...]
    prototypes: Leaf


@struct.dataclass
class EsViTOutput:
    """Of one network over stacks of views; the tuples have one entry a stack (a view size).

    Attributes:
      heads: "view" and, if there is one, "region".
      view_features: f32[v, b, d], the backbone's.
      region_features: f32[v, b, n, d], the backbone's, row by row of the map.
    """

    heads: dict[str, HeadOutput]
    view_features: tuple[Leaf, ...]
    region_features: tuple[Leaf, ...]


class EsViT(nn.Module):
    """The student's and the teacher's network.

    Attributes:
      backbone: a module as in `esvit_jax.models.create_backbone`.
      region: whether there is a region head.
      The others: see `ProjectionHead`.
    """

    backbone: Backbone
    num_prototypes: int
    hidden_dim: int = 2048
    bottleneck_dim: int = 256
    norm_last_layer: bool = False
    batch_norm: bool = False
    region: bool = True
    dtype: DTypeLike = jnp.float32

    def setup(self):
        head = (
            self.num_prototypes,
            self.hidden_dim,
            self.bottleneck_dim,
            self.norm_last_layer,
            self.batch_norm,
            self.dtype,
        )
        self.view_head = ProjectionHead(*head)
        if self.region:
            self.region_head = ProjectionHead(*head)

    def __call__(
        self,
        stacks: Sequence[Float[Array, "_ b _ _ 3"]],
        drop_keys: Key[Array, " b"] | None = None,
    ) -> EsViTOutput:
        """One forward of the backbone for each stack of views f32[v, b, h, w, 3].

        In training there is a key for the drop path of each image. What its views draw depends on
        it alone, not on the image's place in the batch.
        """
        view_features, region_features = [], []
        drawn = None if drop_keys is None else self._draw(drop_keys, sum(map(len, stacks)))
        first = 0
        for images in stacks:
            v = images.shape[0]
            own = None if drawn is None else rearrange(drawn[first : first + v], "v b l -> (v b) l")
            first += v
            out = self.backbone(rearrange(images, "v b h w c -> (v b) h w c"), own)
            view_features.append(rearrange(out.view_features, "(v b) d -> v b d", v=v))
            region_features.append(
                rearrange(out.region_features, "(v b) h w d -> v b (h w) d", v=v)
            )
        heads = {"view": self._head_output(self.view_head, view_features)}
        if self.region:
            heads["region"] = self._head_output(self.region_head, region_features)
        return EsViTOutput(heads, tuple(view_features), tuple(region_features))

    def forward_training(
        self, params: PyTree, stacks: Sequence[Array], *, drop_keys: Array | None = None
    ) -> tuple[EsViTOutput, PyTree]:
        """`apply` in training: batch norms, if any, normalise by the batch.

        Args:
          params: of the network.
          stacks: see `__call__`.
          drop_keys: of a student, one an image, for drop path.

        Returns:
          The outputs, and what batch norms have seen, for `batch_norm.with_statistics`.
        """
        out, seen = self.apply({"params": params}, stacks, drop_keys, mutable=[STATISTICS])
        assert isinstance(out, EsViTOutput)
        return out, seen.get(STATISTICS, {})

    def _draw(self, keys: Key[Array, " b"], views: int) -> Float[Array, "v b draws"]:
        """All numbers of all views by one call of the generator, which is large when compiled."""
        shape = views, self.backbone.num_draws
        return jax.vmap(lambda key: jax.random.uniform(key, shape), out_axes=1)(keys)

    def _head_output(self, head: ProjectionHead, features: Sequence[Array]) -> HeadOutput:
        if not self.batch_norm:
            return HeadOutput(tuple(head(x) for x in features), head.prototypes())
        # One call, so that a batch norm sees the views of all sizes together.
        rows, shapes = pack([x.reshape(-1, x.shape[-1]) for x in features], "* d")
        vectors = unpack(head(rows), shapes, "* bottleneck")
        vectors = [v.reshape(*x.shape[:-1], -1) for v, x in zip(vectors, features, strict=True)]
        return HeadOutput(tuple(vectors), head.prototypes())
