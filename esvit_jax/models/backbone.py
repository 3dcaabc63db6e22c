"""What every backbone is: a Flax module from images of any size to the same named outputs."""

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Float, PyTree

from esvit_jax.errors import UserError
from esvit_jax.models.layers import Leaf

# What a backbone computes only where it is asked for it by name.
ON_REQUEST = ("attention",)


class StageInfo(NamedTuple):
    """What the map of one stage is like.

    Attributes:
      stride: pixels of the image along a side of one cell of the map.
      num_features: of a cell.
    """

    stride: int
    num_features: int


class BlockInfo(NamedTuple):
    """How one block attends.

    Attributes:
      stage: of the block, from 0.
      window_size: tokens along a side of its windows; None where one is over the whole map.
      shift: tokens by which the map is rolled up and left before it is cut into windows.
      num_global: tokens that stand before those of the map in each window.
      clipped: whether windows are no larger than the map's shorter side.
    """

    stage: int
    window_size: int | None
    shift: int = 0
    num_global: int = 0
    clipped: bool = False

    def window(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of its windows on a map of this size, tokens."""
        if self.window_size is None:
            return height, width
        size = min(self.window_size, height, width) if self.clipped else self.window_size
        return size, size


@struct.dataclass
class BackboneOutput:
    """What a backbone returns for a batch of images, all float32.

    Attributes:
      view_features: [b, d], one vector an image.
      region_features: [b, h, w, d], the last map, normalised.
      stage_maps: one [b, h_i, w_i, d_i] a stage, finest first, as `Backbone.stages` says; the last
        one is `region_features`. For an image of H x W pixels h_i is H / stride, rounded up (a
        ViT and a ViL leave out what does not fill a patch).
      block_means: one [b, d_l] a block, the mean of its map (in the last stage after the norm), or
        its first global token, if it has any.
      attention: one [b, windows, heads, n, n] for each of `Backbone.blocks` (softmax over the last
        axis, windows in row-major order of the padded and shifted map), or () unless "attention"
        was asked for.
    """

    view_features: Leaf
    region_features: Leaf
    stage_maps: tuple[Leaf, ...]
    block_means: tuple[Leaf, ...]
    attention: tuple[Leaf, ...]


class Backbone(nn.Module):
    """The protocol of all backbones; `presets.PRESETS` names them.

    A subclass has as fields what its presets set, `depths` (blocks of each stage) and `image_size`
    (pixels along the images that it is trained on) and, for `models.create_model`, `dtype` (of
    matrix products) and `remat` (what the backward pass computes again).

    Attributes:
      view_feature: what the feature of a view is, in words.
      when_spread: fields by which XLA can cut the backbone for several devices
        (`config.parallel="fsdp"`); None where it cannot.
    """

    view_feature: ClassVar[str] = "the mean of the regions"
    when_spread: ClassVar[Mapping[str, str] | None] = None

    @property
    def num_features(self) -> int:
        """Features of a view and of a region, d."""
        return self.stages[-1].num_features

    @property
    def stages(self) -> tuple[StageInfo, ...]:
        """The maps of `BackboneOutput.stage_maps`."""
        raise NotImplementedError

    @property
    def blocks(self) -> tuple[BlockInfo, ...]:
        """The blocks of `BackboneOutput.attention`."""
        raise NotImplementedError

    @property
    def num_blocks(self) -> int:
        """Blocks of all stages."""
        depths: Sequence[int] = self.depths  # pyright: ignore[reportAttributeAccessIssue]
        return sum(depths)

    def layer_of(self, names: Sequence[str]) -> int:
        """The layer of the param at a path in the tree, by which fine-tuning sets learning rates.

        0 is what makes tokens of an image, then every block is one (with what leads from it to the
        next stage, if any); the norm after the last is num_blocks + 1.
        """
        raise NotImplementedError

    @property
    def num_draws(self) -> int:
        """Random numbers that an image takes in training, for drop path."""
        raise NotImplementedError

    def validate(self) -> None:
        """Refuses fields that do not fit each other.

        Raises:
          UserError: names the field.
        """
        raise NotImplementedError

    def __call__(
        self,
        images: Float[Array, "b h w 3"],
        drawn: Float[Array, "b draws"] | None = None,
        *,
        outputs: Collection[str] = (),
    ) -> BackboneOutput:
        """Images of any size to features.

        Args:
          images: normalised.
          drawn: in training, `num_draws` random numbers in [0, 1) an image, for drop path.
          outputs: of `ON_REQUEST`, what is wanted beside what is always returned.
        """
        raise NotImplementedError

    def forward(
        self,
        params: PyTree,
        images: Float[Array, "b h w 3"],
        *,
        drawn: Array | None = None,
        outputs: Collection[str] = (),
    ) -> BackboneOutput:
        """`apply` by params alone; with numbers for drop path it is a student's, in training."""
        out = self.apply({"params": params}, images, drawn, outputs=outputs)
        assert isinstance(out, BackboneOutput)
        return out


def output_of_maps(
    block_maps: Sequence[Float[Array, "b _ _ _"]],
    depths: Sequence[int],
    norm: Callable[[Array], Array],
    attention: Sequence[Array],
) -> BackboneOutput:
    """What a backbone returns whose regions are cells, and whose view feature is their mean.

    Args:
      block_maps: the map after each block.
      depths: blocks of each stage; a stage's map is that of its last one.
      norm: of the maps of the last stage.
      attention: see `BackboneOutput`.
    """
    last = sum(depths[:-1])
    maps = [*block_maps[:last], *map(norm, block_maps[last:])]
    maps = [x.astype(jnp.float32) for x in maps]
    stage_maps = tuple(maps[end - 1] for end in itertools.accumulate(depths))
    block_means = tuple(jnp.mean(x, axis=(1, 2)) for x in maps)
    return BackboneOutput(
        view_features=block_means[-1],
        region_features=stage_maps[-1],
        stage_maps=stage_maps,
        block_means=block_means,
        attention=tuple(attention),
    )


def check_stages(depths: Sequence[int], **numbers: Sequence[int]) -> None:
    """Makes sure that there is one number for each stage.

    Raises:
      UserError: names the field that has others.
    """
    for name, values in numbers.items():
        if len(values) != len(depths):
            raise UserError(
                f"one number is needed for each of the {len(depths)} stages of depths = "
                f"{tuple(depths)}",
                argument=name, value=tuple(values),
            )  # fmt: skip


def check_heads(num_heads: Sequence[int], stages: Sequence[StageInfo]) -> None:
    """Makes sure that the heads of each stage share its features.

    Raises:
      UserError: they cannot.
    """
    for stage, heads in zip(stages, num_heads, strict=True):
        if stage.num_features % heads:
            raise UserError(
                f"{heads} does not divide its stage's {stage.num_features} features",
                argument="num_heads", value=tuple(num_heads),
            )  # fmt: skip


def check_outputs(outputs: Collection[str]) -> None:
    """Refuses what no backbone returns.

    Raises:
      UserError: names it.
    """
    for name in outputs:
        if name not in ON_REQUEST:
            raise UserError(
                f"{name!r} is unknown; known are {', '.join(ON_REQUEST)}",
                argument="outputs", value=tuple(outputs),
            )  # fmt: skip
