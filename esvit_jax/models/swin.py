"""Swin transformer (Liu et al. 2021), as the published EsViT trains it.

Maps are [b, h, w, d] throughout, so that inputs need not be square. Windows and shifts are fixed
by `image_size`, also when a smaller view passes: a 96-px view uses the windows of a 224-px one.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from esvit_jax.errors import UserError
from esvit_jax.models.attention import WindowAttention
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
from esvit_jax.models.layers import (
    REMAT_POLICIES,
    DropPath,
    Kernel,
    LayerNorm,
    Mlp,
    NormParameters,
    Size,
    add_bias,
    drop_path_of_blocks,
    patch_convolution,
    product,
)


class SwinBlock(nn.Module):
    """x + drop_path(attn(norm1(x))), then x + drop_path(mlp(norm2(x)))."""

    num_heads: int
    window_size: int
    shift: int
    mlp_ratio: float
    drop_path_rate: float
    dtype: DTypeLike = jnp.float32
    logits_dtype: DTypeLike = jnp.float32
    return_weights: bool = False
    attention: str = "xla"

    @nn.compact
    def __call__(
        self,
        rows: Float[Array, "bhw d"],
        shape: tuple[Size, int, int],
        drawn: Float[Array, "2 b"] | None = None,
    ) -> tuple[Float[Array, "bhw d"], Float[Array, "b m heads n n"] | None]:
        """`rows` are all tokens of the maps, whose `shape` is (b, h, w), in row-major order.

        `drawn` is for the drop path of the two branches.

        A TPU keeps rows without gaps; of maps it would pad each line to a multiple of 8 or 16
        tokens, and move that too (docs/notes/bytes.md).
        """
        y = LayerNorm(dtype=self.dtype, name="norm1")(rows)
        y, weights = WindowAttention(
            num_heads=self.num_heads,
            window_size=self.window_size,
            shift=self.shift,
            dtype=self.dtype,
            logits_dtype=self.logits_dtype,
            return_weights=self.return_weights,
            attention=self.attention,
            name="attn",
        )(y, shape)
        of_attention, of_mlp = (None, None) if drawn is None else drawn
        rows = rows + DropPath(self.drop_path_rate, name="drop_path1")(y, of_attention)
        y = LayerNorm(dtype=self.dtype, name="norm2")(rows)
        y = Mlp(int(rows.shape[-1] * self.mlp_ratio), self.dtype, name="mlp")(y)
        rows = rows + DropPath(self.drop_path_rate, name="drop_path2")(y, of_mlp)
        return rows, weights


class PatchMerging(nn.Module):
    """Halves the map and doubles the features: norm and product over the four tokens of a square.

    Putting the four side by side costs a TPU several copies of the map. So each token is
    normalised where it is, and meets its own quarter of the kernel, which has the norm's scale in
    it.
    """

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h2 w2 d2"]:
        x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
        images, height, width, dim = x.shape
        scale, bias = NormParameters(4 * dim, name="norm")()
        kernel = Kernel((4 * dim, 2 * dim), name="reduction")()

        x = x.astype(jnp.float32)
        x -= square_means(jnp.mean(x, axis=-1))[..., None]
        x *= jax.lax.rsqrt(square_means(jnp.mean(x * x, axis=-1)) + 1e-6)[..., None]
        # The published order of the four neighbours: down before right.
        quarters = jnp.multiply(jnp.expand_dims(scale, 1), kernel).reshape(4, dim, 2 * dim)
        x, quarters = x.astype(self.dtype), quarters.astype(self.dtype)
        rows = jnp.zeros((), jnp.float32)
        for i in range(4):
            rows += product(x[:, i % 2 :: 2, i // 2 :: 2].reshape(-1, dim), quarters[i])
        rows = add_bias(rows, jnp.matmul(bias, kernel, precision="highest"), self.dtype)
        return rows.reshape(images, height // 2, width // 2, 2 * dim)


def square_means(x: Float[Array, "b h w"]) -> Float[Array, "b h w"]:
    """The mean of its square of 2 x 2 tokens for every token of maps with even sides.

    As products: sums over parts of an axis are slow on a TPU.
    """
    rows, columns = (np.kron(np.eye(n // 2), np.full((2, 2), 0.5)) for n in x.shape[1:])
    return jnp.einsum(
        "bhw,hy,wx->byx", x, rows.astype(x.dtype), columns.astype(x.dtype), precision="highest"
    )


class PatchEmbed(nn.Module):
    """Patches to features: a convolution without overlap, then a norm."""

    embed_dim: int
    patch_size: int
    dtype: DTypeLike = jnp.float32
    as_product: bool = False

    @nn.compact
    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        size = self.patch_size
        height, width, channels = images.shape[1:]
        images = jnp.pad(images, ((0, 0), (0, -height % size), (0, -width % size), (0, 0)))
        x = patch_convolution(self.embed_dim, size, channels, self.dtype, self.as_product)(images)
        return LayerNorm(dtype=self.dtype, name="norm")(x)


class Stage(nn.Module):
    """Blocks at one resolution, then (but for the last stage) patch merging."""

    depth: int
    num_heads: int
    window_size: int
    shift: int
    mlp_ratio: float
    drop_path_rates: Sequence[float]
    downsample: bool
    remat: str = "none"
    dtype: DTypeLike = jnp.float32
    logits_dtype: DTypeLike = jnp.float32
    return_weights: bool = False
    attention: str = "xla"

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w d"], drawn: Sequence[Float[Array, "2 b"] | None]
    ) -> tuple[Float[Array, "b h2 w2 d2"], list, list]:
        """Returns the map for the next stage, and each block's map and attention weights."""
        block_class = SwinBlock
        if self.remat != "none":
            block_class = nn.remat(
                SwinBlock, static_argnums=(2,), policy=REMAT_POLICIES[self.remat]
            )
        images, height, width, dim = x.shape
        rows, maps, weights = x.reshape(-1, dim), [], []
        for j in range(self.depth):
            rows, block_weights = block_class(
                num_heads=self.num_heads,
                window_size=self.window_size,
                shift=self.shift if j % 2 else 0,
                mlp_ratio=self.mlp_ratio,
                drop_path_rate=self.drop_path_rates[j],
                dtype=self.dtype,
                logits_dtype=self.logits_dtype,
                return_weights=self.return_weights,
                attention=self.attention,
                name=f"blocks_{j}",
            )(rows, (images, height, width), drawn[j])
            maps.append(rows.reshape(x.shape))
            weights.append(block_weights)
        x = maps[-1]
        if self.downsample:
            x = PatchMerging(self.dtype, name="downsample")(x)
        return x, maps, weights


class Swin(Backbone):
    """A Swin backbone: images f32[b, h, w, 3] (any h, w) -> BackboneOutput.

    Attributes:
      embed_dim: features of the first stage; doubled by every later one.
      depths, num_heads: blocks and attention heads of each stage.
      window_size: tokens along a window's side.
      patch_size: pixels along a patch's side.
      image_size: pixels; the resolution that windows and shifts are fixed from.
      mlp_ratio: hidden features of an MLP over its input's.
      drop_path_rate: of the last block; grows linearly from 0 at the first.
      dtype: of matrix products and of the maps between blocks.
      attention_dtype: in which attention logits are kept ("float32" or "bfloat16").
      attention: by which code windows are attended: "xla"; "pallas", the TPU kernel (interpreted
        elsewhere, which is slow); or "auto", the kernel on TPUs that have room for it.
      patches: by which code they are embedded, "convolution" or "product"; see
        `layers.patch_convolution`.
      remat: what the backward pass computes again: "none", "dots" (all but products with
        weights) or "block" (whole blocks).
    """

    when_spread: ClassVar[Mapping[str, str] | None] = {"attention": "xla", "patches": "product"}

    embed_dim: int
    depths: Sequence[int]
    num_heads: Sequence[int]
    window_size: int = 7
    patch_size: int = 4
    image_size: int = 224
    mlp_ratio: float = 4.0
    drop_path_rate: float = 0.0
    dtype: DTypeLike = jnp.float32
    attention_dtype: str = "float32"
    remat: str = "none"
    attention: str = "auto"
    patches: str = "convolution"

    def stage_window(self, stage: int) -> tuple[int, int]:
        """(window size, shift) of a stage: one window over the map where that covers it."""
        resolution = self.image_size // self.patch_size // 2**stage
        if resolution <= self.window_size:
            return resolution, 0
        return self.window_size, self.window_size // 2

    @property
    def stages(self) -> tuple[StageInfo, ...]:
        return tuple(
            StageInfo(self.patch_size * 2**i, self.embed_dim * 2**i)
            for i in range(len(self.depths))
        )

    @property
    def blocks(self) -> tuple[BlockInfo, ...]:
        windows = [self.stage_window(stage) for stage in range(len(self.depths))]
        return tuple(
            BlockInfo(stage, windows[stage][0], windows[stage][1] if j % 2 else 0)
            for stage, depth in enumerate(self.depths)
            for j in range(depth)
        )

    def validate(self) -> None:
        check_stages(self.depths, num_heads=self.num_heads)
        check_heads(self.num_heads, self.stages)
        smallest = self.stages[-1].stride
        if self.image_size < smallest:
            raise UserError(
                f"{len(self.depths)} stages of patches of {self.patch_size} need at least "
                f"{smallest}",
                argument="image_size", value=self.image_size,
            )  # fmt: skip

    def layer_of(self, names: Sequence[str]) -> int:
        if names[0] in ("patch_embed", "norm"):
            return 0 if names[0] == "patch_embed" else self.num_blocks + 1
        stage = int(names[0].removeprefix("layers_"))
        above = sum(self.depths[:stage])
        if names[1] == "downsample":
            return above + self.depths[stage]
        return above + int(names[1].removeprefix("blocks_")) + 1

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
        x = PatchEmbed(
            self.embed_dim,
            self.patch_size,
            self.dtype,
            as_product=self.patches == "product",
            name="patch_embed",
        )(images)
        block_maps, weights = [], []
        for i, stage_depth in enumerate(self.depths):
            window_size, shift = self.stage_window(i)
            blocks = slice(len(block_maps), len(block_maps) + stage_depth)
            x, maps, stage_weights = Stage(
                depth=stage_depth,
                num_heads=self.num_heads[i],
                window_size=window_size,
                shift=shift,
                mlp_ratio=self.mlp_ratio,
                drop_path_rates=rates[blocks],
                downsample=i < len(self.depths) - 1,
                remat=self.remat,
                dtype=self.dtype,
                logits_dtype=jnp.dtype(self.attention_dtype),
                return_weights="attention" in outputs,
                attention=self.attention,
                name=f"layers_{i}",
            )(x, of_blocks[blocks])
            block_maps += maps
            weights += stage_weights

        norm = LayerNorm(name="norm")  # float32: the losses compare what it returns
        return output_of_maps(
            block_maps, self.depths, norm, weights if "attention" in outputs else ()
        )
