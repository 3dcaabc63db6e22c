"""CvT (Wu et al. 2021) in the variant that EsViT trains: convolutions before windowed attention.

Every stage begins with a convolution that overlaps its neighbours. Queries, keys and values are a
3 x 3 depthwise convolution, a batch norm and a 1 x 1 convolution of the map, which is padded with
zeros to whole windows *before* all three, so that batch norms see the padding and padded keys take
part. No block has a position embedding or a shift; the convolutions tell tokens where they are.

A window's side is `window_size`, or the map's shorter side where that is less: unlike a Swin's, the
windows of a small view are smaller.
"""

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from esvit_jax.models import kernels
from esvit_jax.models.attention import (
    attention_logits,
    partition,
    split_heads,
    unpartition,
    window_attention,
)
from esvit_jax.models.backbone import (
    Backbone,
    BackboneOutput,
    BlockInfo,
    StageInfo,
    check_heads,
    check_outputs,
    check_stages,
    output_of_maps,
)
from esvit_jax.models.batch_norm import BatchNorm
from esvit_jax.models.depthwise import DepthwiseConvolution
from esvit_jax.models.kernels.layout import Layout
from esvit_jax.models.layers import (
    LINEAR_INIT,
    REMAT_POLICIES,
    DropPath,
    LayerNorm,
    Linear,
    Size,
    drop_path_of_blocks,
    quick_gelu,
)

# Of the convolution before the first stage, and before the others: size, stride, padding.
FIRST, LATER = (7, 4, 2), (3, 2, 1)

Norm = functools.partial(LayerNorm, eps=1e-5)
Pointwise = functools.partial(Linear, convolution=True)


class ConvEmbed(nn.Module):
    """A map (or an image) to a smaller one: a convolution whose squares overlap, then a norm.

    Of h lines it makes h / stride, rounded up, as every backbone does. The published code loses the
    last line where h is 1 or 2 more than a multiple of 4; padding is added for it here.
    """

    features: int
    size: int
    stride: int
    padding: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        sides = []
        for length in x.shape[1:3]:
            last = self.stride * (-(-length // self.stride) - 1)  # where the last square begins
            missing = last + self.size - self.padding - length
            sides.append((self.padding, max(self.padding, missing)))
        x = nn.Conv(
            self.features,
            (self.size, self.size),
            strides=self.stride,
            padding=sides,
            kernel_init=LINEAR_INIT,
            dtype=self.dtype,
            name="proj",
        )(x)
        return Norm(dtype=self.dtype, name="norm")(x)


class ConvProjection(nn.Module):
    """Queries, keys and values of all tokens of a map, each with its heads side by side."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w d"], window_size: int | None
    ) -> Float[Array, "bhw d3"]:
        """In the order of the map's windows, which cover it; None keeps that of the map."""
        images, height, width, dim = x.shape
        x = DepthwiseConvolution(dtype=self.dtype, name="dw")(x)
        rows = BatchNorm(dtype=self.dtype, name="bn")(x).reshape(-1, dim)
        if window_size is not None:  # cheaper before the features are three times as many
            rows = partition(rows, (images, height, width), window_size, shift=0)
        return Pointwise(3 * dim, dtype=self.dtype, name="pw")(rows)


class ConvAttention(nn.Module):
    """Multi-head self-attention within windows; logits are scaled by d^-0.5, d of all heads."""

    num_heads: int
    window_size: int
    dtype: DTypeLike = jnp.float32
    logits_dtype: DTypeLike = jnp.float32
    return_weights: bool = False
    attention: str = "xla"  # by which code; see `Swin`

    @nn.compact
    def __call__(
        self, rows: Float[Array, "bhw d"], shape: tuple[Size, int, int]
    ) -> tuple[Float[Array, "bhw d"], Float[Array, "b m heads n n"] | None]:
        """Attends within each window of the maps of shape (b, h, w), padded.

        Returns the tokens and, if `return_weights`, the weights (softmax over the last axis).
        """
        _, height, width = shape
        heads, dim = self.num_heads, rows.shape[-1]
        size = min(self.window_size, height, width)
        sides = ((0, -height % size), (0, -width % size))
        maps = jnp.pad(rows.reshape(*shape, dim), ((0, 0), *sides, (0, 0)))
        _, lines, columns, _ = maps.shape
        m, n = lines * columns // size**2, size**2
        project = ConvProjection(self.dtype, name="qkv")
        window = None if m == 1 else size
        layout = Layout(lines, columns, window, 0, heads, dim // heads)
        if not self.return_weights and kernels.chosen(self.attention, layout, shape[0], self.dtype):
            # The kernel scales by (d / heads)^-0.5.
            scale = np.ones(3 * dim)
            scale[:dim] = heads**-0.5
            qkv = project(maps, None) * jnp.asarray(scale, self.dtype)
            bias = jnp.zeros((heads, n, n))
            out = kernels.attend(qkv, jnp.zeros_like(qkv[:1]), bias, layout)
            out = out.reshape(-1, lines, columns, dim)[:, :height, :width].reshape(-1, dim)
            return Pointwise(dim, dtype=self.dtype, name="proj_out")(out), None

        query, key, value = split_heads(project(maps, size), m, n, heads)
        query *= dim**-0.5
        bias = jnp.zeros((m, heads, n, n))  # which the compiler leaves out
        out = window_attention(query, key, value, bias, self.logits_dtype)
        out = unpartition(out, shape, size, shift=0)
        out = Pointwise(dim, dtype=self.dtype, name="proj_out")(out)
        if not self.return_weights:
            return out, None
        logits = attention_logits(query, key, bias, self.logits_dtype)
        return out, nn.softmax(logits.astype(jnp.float32), axis=-1)


class ConvMlp(nn.Module):
    """1 x 1 convolution - QuickGELU - 1 x 1 convolution, numbered as in the published files."""

    hidden_dim: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, rows: Float[Array, "bhw d"]) -> Float[Array, "bhw d"]:
        hidden = quick_gelu(Pointwise(self.hidden_dim, dtype=self.dtype, name="net_0")(rows))
        return Pointwise(rows.shape[-1], dtype=self.dtype, name="net_2")(hidden)


class PreNorm(nn.Module):
    """function(norm(rows), …)."""

    fn: Callable[..., Any]  # a module, whose params lie below this name
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, rows: Float[Array, "bhw d"], *arguments: Any) -> Any:
        return self.fn(Norm(dtype=self.dtype, name="norm")(rows), *arguments)


class Stage(nn.Module):
    """Blocks at one resolution.

    A block is x + drop_path(attention(norm(x))), then x + drop_path(mlp(norm(x))).
    """

    depth: int
    num_heads: int
    window_size: int
    mlp_ratio: float
    drop_path_rates: Sequence[float]
    remat: str = "none"
    dtype: DTypeLike = jnp.float32
    logits_dtype: DTypeLike = jnp.float32
    return_weights: bool = False
    attention: str = "xla"

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w d"], drawn: Sequence[Float[Array, "2 b"] | None]
    ) -> tuple[list, list]:
        """Returns each block's map and attention weights; `drawn` is for drop path."""
        images, height, width, dim = x.shape
        rows, maps, weights = x.reshape(-1, dim), [], []
        for j in range(self.depth):
            block = functools.partial(Stage.block, number=j, shape=(images, height, width))
            if self.remat != "none":
                block = nn.remat(block, policy=REMAT_POLICIES[self.remat])
            rows, block_weights = block(self, rows, drawn[j])
            maps.append(rows.reshape(x.shape))
            weights.append(block_weights)
        return maps, weights

    def block(
        self,
        rows: Float[Array, "bhw d"],
        drawn: Float[Array, "2 b"] | None,
        number: int,
        shape: tuple[Size, int, int],
    ) -> tuple[Float[Array, "bhw d"], Float[Array, "b m heads n n"] | None]:
        """One block, on all tokens of the maps of shape (b, h, w), in row-major order."""
        attention = ConvAttention(
            num_heads=self.num_heads,
            window_size=self.window_size,
            dtype=self.dtype,
            logits_dtype=self.logits_dtype,
            return_weights=self.return_weights,
            attention=self.attention,
            parent=None,
        )
        mlp = ConvMlp(int(rows.shape[-1] * self.mlp_ratio), self.dtype, parent=None)
        # Numbered as in the published files.
        attend = PreNorm(attention, self.dtype, name=f"layers_{number}_0")
        transform = PreNorm(mlp, self.dtype, name=f"layers_{number}_1")
        drop_path = DropPath(self.drop_path_rates[number], name=f"layers_{number}_2")
        of_attention, of_mlp = (None, None) if drawn is None else drawn
        y, weights = attend(rows, shape)
        rows = rows + drop_path(y, of_attention)
        return rows + drop_path(transform(rows), of_mlp), weights


class CvT(Backbone):
    """A CvT backbone: images f32[b, h, w, 3] (any h, w) -> BackboneOutput.

    The region features are the cells of the last map, normalised; the view feature is their mean.

    Attributes:
      embed_dims: features of each stage.
      depths, num_heads: blocks and attention heads of each stage.
      window_size: tokens along a window's side, where the map has as many.
      image_size: pixels along the images that it is trained on; changes nothing here.
      mlp_ratio: hidden features of an MLP over its input's.
      drop_path_rate: of the last block; grows linearly from 0 at the first.
      dtype: of matrix products, of convolutions, and of the maps between blocks.
      attention_dtype, attention, remat: see `Swin`.
    """

    embed_dims: Sequence[int]
    depths: Sequence[int]
    num_heads: Sequence[int]
    window_size: int = 7
    image_size: int = 224
    mlp_ratio: float = 4.0
    drop_path_rate: float = 0.0
    dtype: DTypeLike = jnp.float32
    attention_dtype: str = "float32"
    remat: str = "none"
    attention: str = "auto"

    @property
    def stages(self) -> tuple[StageInfo, ...]:
        return tuple(StageInfo(4 * 2**i, dim) for i, dim in enumerate(self.embed_dims))

    @property
    def blocks(self) -> tuple[BlockInfo, ...]:
        return tuple(
            BlockInfo(stage, self.window_size, clipped=True)
            for stage, depth in enumerate(self.depths)
            for _ in range(depth)
        )

    def validate(self) -> None:
        check_stages(self.depths, embed_dims=self.embed_dims, num_heads=self.num_heads)
        check_heads(self.num_heads, self.stages)

    def layer_of(self, names: Sequence[str]) -> int:
        if names[0] == "norm":
            return self.num_blocks + 1
        stage, blocks = map(int, names[0].removeprefix("stage").split("_"))
        above = sum(self.depths[:stage])  # to whose last block the convolution belongs
        return above + int(names[1].split("_")[1]) + 1 if blocks else above

    @property
    def num_draws(self) -> int:
        return 2 * sum(self.depths)

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
        x, block_maps, weights = images, [], []
        for i, stage_depth in enumerate(self.depths):
            blocks = slice(len(block_maps), len(block_maps) + stage_depth)
            convolution = LATER if i else FIRST
            x = ConvEmbed(self.embed_dims[i], *convolution, self.dtype, name=f"stage{i}_0")(x)
            maps, stage_weights = Stage(
                depth=stage_depth,
                num_heads=self.num_heads[i],
                window_size=self.window_size,
                mlp_ratio=self.mlp_ratio,
                drop_path_rates=rates[blocks],
                remat=self.remat,
                dtype=self.dtype,
                logits_dtype=jnp.dtype(self.attention_dtype),
                return_weights="attention" in outputs,
                attention=self.attention,
                name=f"stage{i}_1",
            )(x, of_blocks[blocks])
            x = maps[-1]
            block_maps += maps
            weights += stage_weights

        norm = Norm(name="norm")  # float32: the losses compare what it returns
        return output_of_maps(
            block_maps, self.depths, norm, weights if "attention" in outputs else ()
        )
