"""Vision Longformer (ViL; Zhang et al. 2021) with relative positions, as EsViT trains it.

Stages of falling resolution. The first ones are sparse: a cell attends to the chunks around its own
(`longformer.SparseAttention`); the others attend to their whole map. A stage has global tokens of
its own, which are dropped at its end.

The published training may pick one of the eight neighbours of a chunk at random; here all take
part, as in its evaluation.
"""

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from esvit_jax.errors import UserError
from esvit_jax.models.backbone import (
    Backbone,
    BackboneOutput,
    BlockInfo,
    StageInfo,
    check_heads,
    check_outputs,
    check_stages,
)
from esvit_jax.models.layers import (
    LINEAR_INIT,
    REMAT_POLICIES,
    DropPath,
    LayerNorm,
    Mlp,
    at_least,
    drop_path_of_blocks,
    patch_convolution,
)
from esvit_jax.models.longformer import FullAttention, SparseAttention


class PatchEmbed(nn.Module):
    """Patches of a map to cells of the next: a convolution without overlap, a norm; global tokens.

    What does not fill a patch at the bottom and the right is left out, as in the published
    implementation; only a side shorter than a patch is padded to one, with 0.
    """

    embed_dim: int
    patch_size: int
    num_global: int
    dtype: DTypeLike = jnp.float32
    as_product: bool = False

    @nn.compact
    def __call__(
        self, maps: Float[Array, "b h w c"]
    ) -> tuple[Float[Array, "b t d"], tuple[int, int]]:
        """Returns the tokens, global ones first, and the shape of the new map."""
        size = self.patch_size
        images, channels = maps.shape[0], maps.shape[-1]
        convolution = patch_convolution(self.embed_dim, size, channels, self.dtype, self.as_product)
        cells = convolution(at_least(maps, size))
        cells = LayerNorm(dtype=self.dtype, name="norm_embed")(cells)
        tokens = rearrange(cells, "b h w d -> b (h w) d")
        if self.num_global:
            shape = (1, self.num_global, self.embed_dim)
            token = jnp.asarray(self.param("cls_token", LINEAR_INIT, shape), self.dtype)
            token = jnp.broadcast_to(token, (images, *shape[1:]))
            tokens = jnp.concatenate([token, tokens], axis=1)
        return tokens, (cells.shape[1], cells.shape[2])


class AttentionBlock(nn.Module):
    """x + drop_path(attn(norm(x)))."""

    num_heads: int
    num_global: int
    window_size: int | None
    side: int
    drop_path_rate: float
    dtype: DTypeLike = jnp.float32
    return_weights: bool = False
    attention: str = "xla"

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "b t d"],
        shape: tuple[int, int],
        drawn: Float[Array, " b"] | None = None,
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b 1 heads t t"] | None]:
        """`shape` is that of the map, `drawn` for the drop path."""
        if self.window_size is None:
            attention = functools.partial(FullAttention, side=self.side)
        else:
            attention = functools.partial(
                SparseAttention, window_size=self.window_size, attention=self.attention
            )
        y = LayerNorm(dtype=self.dtype, name="norm")(tokens)
        y, weights = attention(
            num_heads=self.num_heads,
            num_global=self.num_global,
            dtype=self.dtype,
            return_weights=self.return_weights,
            name="attn",
        )(y, shape)
        y = DropPath(self.drop_path_rate, name="drop_path")(y.reshape(-1, y.shape[-1]), drawn)
        return tokens + y.reshape(tokens.shape), weights


class MlpBlock(nn.Module):
    """x + drop_path(mlp(norm(x)))."""

    mlp_ratio: float
    drop_path_rate: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, tokens: Float[Array, "b t d"], drawn: Float[Array, " b"] | None = None
    ) -> Float[Array, "b t d"]:
        y = LayerNorm(dtype=self.dtype, name="norm")(tokens)
        y = Mlp(int(tokens.shape[-1] * self.mlp_ratio), self.dtype, name="mlp")(y)
        y = DropPath(self.drop_path_rate, name="drop_path")(y.reshape(-1, y.shape[-1]), drawn)
        return tokens + y.reshape(tokens.shape)


class ViL(Backbone):
    """A Vision Longformer: images f32[b, h, w, 3] (any h, w) -> BackboneOutput.

    With global tokens in the last stage the first of them is the view feature, otherwise it is the
    mean of the regions; `block_means` likewise. Attention is given over whole maps: of a sparse
    block, too, with 0 outside of a cell's nine chunks. At 224 pixels that is 118 MB an image for
    each block of stage 1 of a `vil_1281`, and 7 MB of stage 2.

    Attributes:
      embed_dims, depths, num_heads: features, blocks and attention heads of each stage.
      window_sizes: cells along a chunk's side in each of the sparse stages, which are the first.
      num_global: global tokens of each stage; at most one in the last.
      patch_sizes: cells of the map before (pixels, at first) along the side of a cell, in each
        stage.
      image_size: pixels; the resolution that the bias tables of the full stages are of.
      mlp_ratio: hidden features of an MLP over its input's.
      drop_path_rate: of the last block; grows linearly from 0 at the first.
      dtype: of matrix products and of the maps between blocks.
      attention: by which code chunks are attended; see `Swin`.
      patches: by which code they are embedded; see `Swin`.
      remat: what the backward pass computes again: "none", "dots" (all but products with
        weights) or "block" (whole blocks); logits of sparse stages always.
    """

    when_spread: ClassVar[Mapping[str, str] | None] = {"attention": "xla", "patches": "product"}

    embed_dims: Sequence[int]
    depths: Sequence[int]
    num_heads: Sequence[int]
    window_sizes: Sequence[int] = (7, 7)
    num_global: Sequence[int] = (1, 1, 1, 0)
    patch_sizes: Sequence[int] = (4, 2, 2, 2)
    image_size: int = 224
    mlp_ratio: float = 4.0
    drop_path_rate: float = 0.0
    dtype: DTypeLike = jnp.float32
    attention: str = "auto"
    patches: str = "convolution"
    remat: str = "none"

    def stage_window(self, stage: int) -> int | None:
        """Cells along a chunk's side in a stage; None where it is full."""
        return self.window_sizes[stage] if stage < len(self.window_sizes) else None

    def stage_side(self, stage: int) -> int:
        """Cells along a side of the map of a stage, for images of `image_size`."""
        return self.image_size // self.stages[stage].stride

    def reach(self, stage: int) -> int:
        """Cells along an axis that attend to each other; a bias table has (2 reach - 1)^2 rows."""
        window = self.stage_window(stage)
        return self.stage_side(stage) if window is None else 2 * window

    @property
    def stages(self) -> tuple[StageInfo, ...]:
        strides = np.cumprod(self.patch_sizes).tolist()
        return tuple(map(StageInfo, strides, self.embed_dims))

    @property
    def blocks(self) -> tuple[BlockInfo, ...]:
        return tuple(
            BlockInfo(stage, None, num_global=self.num_global[stage])
            for stage, depth in enumerate(self.depths)
            for _ in range(depth)
        )

    def layer_of(self, names: Sequence[str]) -> int:
        if names[0] == "norm":
            return self.num_blocks + 1
        # A stage's patch embedding is its number 0, then attention and MLP of each block follow.
        stage, half = map(int, names[0].removeprefix("layer").split("_"))
        return sum(self.depths[: stage - 1]) + (half + 1) // 2

    @property
    def num_draws(self) -> int:
        return 2 * sum(self.depths)

    def validate(self) -> None:
        check_stages(
            self.depths, embed_dims=self.embed_dims, num_heads=self.num_heads,
            num_global=self.num_global, patch_sizes=self.patch_sizes,
        )  # fmt: skip
        if len(self.window_sizes) > len(self.depths):
            raise UserError(
                f"there are more than the {len(self.depths)} stages of depths = "
                f"{tuple(self.depths)}",
                argument="window_sizes", value=tuple(self.window_sizes),
            )  # fmt: skip
        check_heads(self.num_heads, self.stages)
        if self.num_global[-1] > 1:
            raise UserError(
                "the last stage has one global token, the view feature, or none",
                argument="num_global", value=tuple(self.num_global),
            )  # fmt: skip
        smallest = self.stages[-1].stride
        if self.image_size < smallest:
            raise UserError(
                f"patches of {tuple(self.patch_sizes)} need at least {smallest}",
                argument="image_size", value=self.image_size,
            )  # fmt: skip

    def _block(
        self, stage: int, block: int, drop_path_rate: float, return_weights: bool
    ) -> tuple[AttentionBlock, MlpBlock]:
        """The two halves of a block, numbered as in the published state dict."""
        classes = AttentionBlock, MlpBlock
        if self.remat != "none":
            policy = REMAT_POLICIES[self.remat]
            classes = (
                nn.remat(AttentionBlock, static_argnums=(2,), policy=policy),
                nn.remat(MlpBlock, policy=policy),
            )
        attention = classes[0](
            num_heads=self.num_heads[stage],
            num_global=self.num_global[stage],
            window_size=self.stage_window(stage),
            side=self.stage_side(stage),
            drop_path_rate=drop_path_rate,
            dtype=self.dtype,
            return_weights=return_weights,
            attention=self.attention,
            name=f"layer{stage + 1}_{2 * block + 1}",
        )
        mlp = classes[1](
            mlp_ratio=self.mlp_ratio,
            drop_path_rate=drop_path_rate,
            dtype=self.dtype,
            name=f"layer{stage + 1}_{2 * block + 2}",
        )
        return attention, mlp

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "b h w 3"],
        drawn: Float[Array, "b draws"] | None = None,
        *,
        outputs: Collection[str] = (),
    ) -> BackboneOutput:
        check_outputs(outputs)
        rates, of_blocks = drop_path_of_blocks(self.drop_path_rate, self.num_blocks, drawn)
        maps, shape = images, (images.shape[1], images.shape[2])
        stage_maps, block_tokens, weights = [], [], []
        for stage, depth in enumerate(self.depths):
            tokens, shape = PatchEmbed(
                self.embed_dims[stage],
                self.patch_sizes[stage],
                self.num_global[stage],
                self.dtype,
                self.patches == "product",
                name=f"layer{stage + 1}_0",
            )(maps)
            for block in range(depth):
                index = len(block_tokens)
                attention, mlp = self._block(stage, block, rates[index], "attention" in outputs)
                own = of_blocks[index]
                of_attention, of_mlp = (None, None) if own is None else own
                tokens, block_weights = attention(tokens, shape, of_attention)
                tokens = mlp(tokens, of_mlp)
                block_tokens.append(tokens)
                weights.append(block_weights)
            maps = cells_of(tokens, shape)
            stage_maps.append(maps)

        norm = LayerNorm(name="norm")  # float32: the losses compare what it returns
        last = sum(self.depths[:-1])
        block_tokens = block_tokens[:last] + [norm(x) for x in block_tokens[last:]]
        regions = cells_of(block_tokens[-1], shape)
        block_means = tuple(
            x[:, 0] if info.num_global else jnp.mean(x, axis=1)
            for x, info in zip(map(_float32, block_tokens), self.blocks, strict=True)
        )
        return BackboneOutput(
            view_features=block_means[-1],
            region_features=regions,
            stage_maps=(*map(_float32, stage_maps[:-1]), regions),
            block_means=block_means,
            attention=tuple(weights) if "attention" in outputs else (),
        )


def cells_of(tokens: Float[Array, "b t d"], shape: tuple[int, int]) -> Float[Array, "b h w d"]:
    """The map: what follows the global tokens."""
    height, width = shape
    return rearrange(tokens[:, -height * width :], "b (h w) d -> b h w d", h=height)


def _float32(x: Array) -> Array:
    return x.astype(jnp.float32)
