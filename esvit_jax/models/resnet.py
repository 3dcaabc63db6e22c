"""ResNet (He et al. 2016) with bottleneck blocks, v1.5: the stride is in the 3 x 3 convolution.

The region features are the cells of the last map, the view feature is their mean. In training,
batch norms normalise by the batch: see `batch_norm.BatchNorm`.
"""

from collections.abc import Collection, Sequence

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from esvit_jax.errors import UserError
from esvit_jax.models.backbone import (
    Backbone,
    BackboneOutput,
    BlockInfo,
    StageInfo,
    check_outputs,
)
from esvit_jax.models.batch_norm import BatchNorm
from esvit_jax.models.layers import REMAT_POLICIES

CONV_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
EXPANSION = 4  # features of a block's output over those of its 3 x 3 convolution


def convolution(features: int, size: int, stride: int, dtype: DTypeLike, name: str) -> nn.Conv:
    """A convolution without bias that keeps the map's size, but for the stride."""
    return nn.Conv(
        features,
        (size, size),
        strides=stride,
        padding=size // 2,
        use_bias=False,
        kernel_init=CONV_INIT,
        dtype=dtype,
        name=name,
    )


class Bottleneck(nn.Module):
    """relu(shortcut(x) + three convolutions of x, 1 x 1, 3 x 3 and 1 x 1, with batch norms)."""

    width: int
    stride: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h2 w2 d2"]:
        features, dtype = EXPANSION * self.width, self.dtype
        y = convolution(self.width, 1, 1, dtype, name="conv1")(x)
        y = nn.relu(BatchNorm(dtype, name="bn1")(y))
        y = convolution(self.width, 3, self.stride, dtype, name="conv2")(y)
        y = nn.relu(BatchNorm(dtype, name="bn2")(y))
        y = convolution(features, 1, 1, dtype, name="conv3")(y)
        y = BatchNorm(dtype, name="bn3")(y)
        if x.shape[-1] != features or self.stride != 1:
            x = convolution(features, 1, self.stride, dtype, name="downsample_0")(x)
            x = BatchNorm(dtype, name="downsample_1")(x)
        return nn.relu(x + y)


class ResNet(Backbone):
    """A ResNet: images f32[b, h, w, 3] (any h, w) -> BackboneOutput.

    Attributes:
      depths: blocks of each stage.
      base_width: features of the stem, and of the 3 x 3 convolutions of the first stage; doubled
        by every later one.
      image_size: pixels along the images that it is trained on; changes nothing here.
      dtype: of convolutions and of the maps between them.
      remat: what the backward pass computes again: "none", "dots" (all but products with weights;
        convolutions are none) or "block" (whole blocks).
    """

    depths: Sequence[int]
    base_width: int = 64
    image_size: int = 224
    dtype: DTypeLike = jnp.float32
    remat: str = "none"

    @property
    def stages(self) -> tuple[StageInfo, ...]:
        return tuple(
            StageInfo(4 * 2**i, EXPANSION * self.base_width * 2**i) for i in range(len(self.depths))
        )

    @property
    def blocks(self) -> tuple[BlockInfo, ...]:
        return ()

    def layer_of(self, names: Sequence[str]) -> int:
        if names[0] in ("conv1", "bn1"):
            return 0
        stage, block = map(int, names[0].removeprefix("layer").split("_"))
        return sum(self.depths[: stage - 1]) + block + 1

    @property
    def num_draws(self) -> int:
        return 0

    def validate(self) -> None:
        """Any depths and width make a ResNet."""

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "b h w 3"],
        drawn: Float[Array, "b draws"] | None = None,
        *,
        outputs: Collection[str] = (),
    ) -> BackboneOutput:
        check_outputs(outputs)
        if "attention" in outputs:
            raise UserError("a ResNet has none", argument="outputs", value=tuple(outputs))
        x = convolution(self.base_width, 7, 2, self.dtype, name="conv1")(images)
        x = nn.relu(BatchNorm(self.dtype, name="bn1")(x))
        # With zeros around it, which are never above what a ReLU returns.
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        x = nn.max_pool(x, (3, 3), strides=(2, 2))
        block_class = Bottleneck
        if self.remat != "none":
            block_class = nn.remat(Bottleneck, policy=REMAT_POLICIES[self.remat])
        stage_maps, block_means = [], []
        for i, depth in enumerate(self.depths):
            for j in range(depth):
                stride = 2 if i and not j else 1
                width = self.base_width * 2**i
                x = block_class(width, stride, self.dtype, name=f"layer{i + 1}_{j}")(x)
                block_means.append(jnp.mean(x.astype(jnp.float32), axis=(1, 2)))
            stage_maps.append(x.astype(jnp.float32))
        return BackboneOutput(
            view_features=block_means[-1],
            region_features=stage_maps[-1],
            stage_maps=tuple(stage_maps),
            block_means=tuple(block_means),
            attention=(),
        )
