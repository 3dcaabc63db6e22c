"""Vision transformer (Dosovitskiy et al. 2021) in DeiT's sizes, as DINO and EsViT train it.

A class token stands before the tokens of an image's patches: it becomes the view feature, they
become the regions. All tokens attend to all.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from esvit_jax.errors import UserError
from esvit_jax.models.attention import split_heads, window_attention
from esvit_jax.models.backbone import (
    Backbone,
    BackboneOutput,
    BlockInfo,
    StageInfo,
    check_outputs,
)
from esvit_jax.models.layers import (
    LINEAR_INIT,
    REMAT_POLICIES,
    DropPath,
    LayerNorm,
    Linear,
    Mlp,
    at_least,
    drop_path_of_blocks,
    patch_convolution,
)
from esvit_jax.models.resize import bicubic_matrix


def attend(
    query: Float[Array, "b 1 heads n d"],
    key: Float[Array, "b 1 heads n d"],
    value: Float[Array, "b 1 heads n d"],
    attention: str,
) -> Float[Array, "b 1 heads n d"]:
    """softmax(query key') value over all tokens of an image, by the best code for the platform.

    On GPUs that have it, in half precision, that is cuDNN's flash attention, which never holds
    [n, n] logits; `jax.nn` takes it only where it is told to. Elsewhere it is `window_attention`
    of one window, whose backward pass keeps one array of that size, in the values' dtype, where
    autodiff of `jax.nn`'s keeps float32. The flash kernel that jax has for TPUs takes tokens in
    blocks of 128 only: the 197 and 37 of a view would be padded to 256 and 128.

    Args:
      query: scaled already.
      key, value: of the same dtype.
      attention: "auto", or "xla" for any platform.
    """
    n, heads, dim = query.shape[-2], query.shape[2], query.shape[-1]
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    if attention == "auto" and half and dim % 8 == 0 and dim <= 128 and _gpu_has_flash():
        query, key, value = (
            rearrange(x, "b 1 heads n d -> b n heads d") for x in (query, key, value)
        )
        out = jax.nn.dot_product_attention(query, key, value, scale=1.0, implementation="cudnn")
        return rearrange(out, "b n heads d -> b 1 heads n d")
    bias = jnp.zeros((1, heads, n, n), jnp.float32)
    return window_attention(query, key, value, bias, jnp.float32)


def _gpu_has_flash() -> bool:
    """Whether this is an NVIDIA GPU from Ampere on, which cuDNN's flash attention needs."""
    device = jax.devices()[0]
    is_nvidia = device.platform == "gpu" and device.device_kind.startswith("NVIDIA")
    return is_nvidia and float(device.compute_capability) >= 8.0


class SelfAttention(nn.Module):
    """Multi-head self-attention over all tokens of an image."""

    num_heads: int
    dtype: DTypeLike = jnp.float32
    attention: str = "xla"
    return_weights: bool = False

    @nn.compact
    def __call__(
        self, rows: Float[Array, "bn d"], tokens: int
    ) -> tuple[Float[Array, "bn d"], Float[Array, "b 1 heads n n"] | None]:
        """`rows` are all tokens of all images, which have `tokens` each."""
        dim = rows.shape[-1]
        qkv = Linear(3 * dim, dtype=self.dtype, name="qkv")(rows)
        query, key, value = split_heads(qkv, 1, tokens, self.num_heads)
        query *= (dim // self.num_heads) ** -0.5
        out = attend(query, key, value, self.attention)
        out = rearrange(out, "b 1 heads n d -> (b n) (heads d)")
        out = Linear(dim, dtype=self.dtype, name="proj")(out)
        if not self.return_weights:
            return out, None
        logits = jnp.einsum("bmhqd,bmhkd->bmhqk", query, key, preferred_element_type=jnp.float32)
        return out, nn.softmax(logits, axis=-1)


class Block(nn.Module):
    """x + drop_path(attn(norm1(x))), then x + drop_path(mlp(norm2(x)))."""

    num_heads: int
    mlp_ratio: float
    drop_path_rate: float
    dtype: DTypeLike = jnp.float32
    attention: str = "xla"
    return_weights: bool = False

    @nn.compact
    def __call__(
        self, rows: Float[Array, "bn d"], tokens: int, drawn: Float[Array, "2 b"] | None = None
    ) -> tuple[Float[Array, "bn d"], Float[Array, "b 1 heads n n"] | None]:
        """`drawn` is for the drop path of the two branches; for the others see `SelfAttention`."""
        y = LayerNorm(dtype=self.dtype, name="norm1")(rows)
        y, weights = SelfAttention(
            num_heads=self.num_heads,
            dtype=self.dtype,
            attention=self.attention,
            return_weights=self.return_weights,
            name="attn",
        )(y, tokens)
        of_attention, of_mlp = (None, None) if drawn is None else drawn
        rows = rows + DropPath(self.drop_path_rate, name="drop_path1")(y, of_attention)
        y = LayerNorm(dtype=self.dtype, name="norm2")(rows)
        y = Mlp(int(rows.shape[-1] * self.mlp_ratio), self.dtype, name="mlp")(y)
        return rows + DropPath(self.drop_path_rate, name="drop_path2")(y, of_mlp), weights


class PatchEmbed(nn.Module):
    """Patches to features: a convolution without overlap.

    What does not fill a patch at the bottom and the right is left out, as in the published
    implementation; only a side shorter than a patch is padded to one, with 0.
    """

    embed_dim: int
    patch_size: int
    dtype: DTypeLike = jnp.float32
    as_product: bool = False

    @nn.compact
    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        size, channels = self.patch_size, images.shape[-1]
        convolution = patch_convolution(self.embed_dim, size, channels, self.dtype, self.as_product)
        return convolution(at_least(images, size))


def resize_positions(
    positions: Float[Array | np.ndarray, "1 n d"], side: int, height: int, width: int
) -> Float[Array, "1 m d"]:
    """A position embedding for side x side patches, for height x width of them.

    Bicubic (see `bicubic_matrix`), rows by the factor height / side, columns by width / side; the
    public code knows square images only, and there takes sqrt(height width) / side for both. The
    class token's position, the first one, stays as it is.
    """
    if (height, width) == (side, side):
        return jnp.asarray(positions)
    rows, columns = (bicubic_matrix(side, n).astype(np.float32) for n in (height, width))
    maps = rearrange(jnp.asarray(positions)[0, 1:], "(y x) d -> y x d", y=side)
    maps = jnp.einsum("hy,wx,yxd->hwd", rows, columns, maps, precision="highest")
    return jnp.concatenate([positions[:, :1], rearrange(maps, "h w d -> 1 (h w) d")], axis=1)


class ViT(Backbone):
    """A ViT backbone: images f32[b, h, w, 3] (any h, w) -> BackboneOutput.

    What does not fill a patch is left out, see `PatchEmbed`. A block's vector in `block_means` is
    the class token after it, normalised as the last one is: what the published linear evaluation
    takes.

    Attributes:
      embed_dim: features of a token.
      depths, num_heads: blocks and attention heads of its only stage.
      patch_size: pixels along a patch's side.
      image_size: pixels; the position embedding is of a square image of this size, and is resized
        for all others.
      mlp_ratio: hidden features of an MLP over its input's.
      drop_path_rate: of the last block; grows linearly from 0 at the first.
      dtype: of matrix products and of the tokens between blocks.
      attention: by which code: "auto" or "xla", see `attend`.
      patches: by which code they are embedded; see `Swin`.
      remat: what the backward pass computes again; see `Swin`.
    """

    view_feature: ClassVar[str] = "the class token"
    when_spread: ClassVar[Mapping[str, str] | None] = {"attention": "xla", "patches": "product"}

    embed_dim: int
    depths: Sequence[int]
    num_heads: Sequence[int]
    patch_size: int = 16
    image_size: int = 224
    mlp_ratio: float = 4.0
    drop_path_rate: float = 0.0
    dtype: DTypeLike = jnp.float32
    attention: str = "auto"
    patches: str = "convolution"
    remat: str = "none"

    @property
    def side(self) -> int:
        """Patches along a side of the position embedding."""
        return self.image_size // self.patch_size

    @property
    def stages(self) -> tuple[StageInfo, ...]:
        return (StageInfo(self.patch_size, self.embed_dim),)

    @property
    def blocks(self) -> tuple[BlockInfo, ...]:
        return (BlockInfo(0, None, num_global=1),) * self.depths[0]

    def layer_of(self, names: Sequence[str]) -> int:
        if names[0].startswith("blocks_"):
            return int(names[0].removeprefix("blocks_")) + 1
        return self.num_blocks + 1 if names[0] == "norm" else 0

    @property
    def num_draws(self) -> int:
        return 2 * self.depths[0]

    def validate(self) -> None:
        for name in ("depths", "num_heads"):
            if len(value := tuple(getattr(self, name))) != 1:
                message = "a ViT has one stage, so that one number is needed"
                raise UserError(message, argument=name, value=value)
        if self.embed_dim % self.num_heads[0]:
            raise UserError(
                f"{self.num_heads[0]} does not divide embed_dim = {self.embed_dim}",
                argument="num_heads", value=tuple(self.num_heads),
            )  # fmt: skip
        if self.image_size < self.patch_size:
            raise UserError(
                f"a patch of {self.patch_size} needs at least as many pixels",
                argument="image_size", value=self.image_size,
            )  # fmt: skip
        if self.attention not in ("auto", "xla"):
            message = "a ViT has no such code; it has 'auto' and 'xla'"
            raise UserError(message, argument="attention", value=self.attention)

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "b h w 3"],
        drawn: Float[Array, "b draws"] | None = None,
        *,
        outputs: Collection[str] = (),
    ) -> BackboneOutput:
        check_outputs(outputs)
        dim = self.embed_dim
        class_token = self.param("cls_token", LINEAR_INIT, (1, 1, dim))
        positions = self.param("pos_embed", LINEAR_INIT, (1, 1 + self.side**2, dim))

        x = PatchEmbed(
            dim,
            self.patch_size,
            self.dtype,
            as_product=self.patches == "product",
            name="patch_embed",
        )(images)
        b, height, width, _ = x.shape
        tokens = 1 + height * width
        class_token = jnp.broadcast_to(class_token.astype(self.dtype), (b, 1, dim))
        x = jnp.concatenate([class_token, rearrange(x, "b h w d -> b (h w) d")], axis=1)
        x += resize_positions(positions, self.side, height, width).astype(self.dtype)

        block_class = Block
        if self.remat != "none":
            block_class = nn.remat(Block, static_argnums=(2,), policy=REMAT_POLICIES[self.remat])
        rates, of_blocks = drop_path_of_blocks(self.drop_path_rate, self.num_blocks, drawn)
        norm = LayerNorm(name="norm")  # float32: the losses compare what it returns
        rows, class_tokens, weights = rearrange(x, "b n d -> (b n) d"), [], []
        for i in range(self.num_blocks):
            rows, block_weights = block_class(
                num_heads=self.num_heads[0],
                mlp_ratio=self.mlp_ratio,
                drop_path_rate=rates[i],
                dtype=self.dtype,
                attention=self.attention,
                return_weights="attention" in outputs,
                name=f"blocks_{i}",
            )(rows, tokens, of_blocks[i])
            x = rearrange(rows, "(b n) d -> b n d", n=tokens)
            class_tokens.append(norm(x[:, 0]))
            weights.append(block_weights)
        regions = rearrange(norm(x[:, 1:]), "b (h w) d -> b h w d", w=width)
        return BackboneOutput(
            view_features=class_tokens[-1],
            region_features=regions,
            stage_maps=(regions,),
            block_means=tuple(class_tokens),
            attention=tuple(weights) if "attention" in outputs else (),
        )
