"""Swin: names in the published checkpoints, in timm and in transformers, and what shapes tell.

Windows and shifts of a Swin of ours are fixed by the image size that it was trained at. Both
libraries take them from the image instead, so their features agree at some sizes only.

timm (1.0) clips a window to the map, as we do, and builds masks and bias tables for one image
size. It rolls a map before padding it, we pad first: the features agree at sizes where shifted
maps are a multiple of the window, such as 224 (221 to 224) for windows of 7 and 14.

SwinModel derives windows and shifts from the image at hand: where a map's shorter side is no
longer than the window, the window is clipped to it and nothing is shifted. Both pad maps alike
(zeros at the bottom and the right, after the norm, not masked) and merge patches alike, so the
features agree exactly where the two rules give the same windows and shifts in every stage:

- Stages with a shift need maps with a shorter side longer than the window, stages without one
  maps with a shorter side of just the window. For a window of 7 and 224-px training that is the
  shorter side of the image from 193 to 224 pixels, whatever the longer one. Beyond, SwinModel
  shifts windows of the last stage too; below, its bias tables do not fit the clipped windows and
  it stops with an error.
- SwinModel's bias tables have the same window in every stage. A backbone whose last stage has a
  smaller one (window 14 at 224 px: 7) agrees at no size and is refused.

Two norms, after patch embedding and in patch merging, have an eps of 1e-5 there that no config
changes, instead of 1e-6. For that, features of photos differ by 1e-5 to 2e-5 of their length
(measured on random networks; 4e-5 for an image of one flat grey).
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from esvit_jax.errors import UserError
from esvit_jax.interop.names.base import Family, Inferred, Peer
from esvit_jax.interop.names.published import Tensors
from esvit_jax.interop.names.spelling import Spelling
from esvit_jax.models import Swin
from esvit_jax.models.attention import relative_position_index
from esvit_jax.models.resize import bicubic_matrix

PATCHES = "patch_embed.proj.weight"
TABLE = "attn.relative_position_bias_table"


# timm


def to_timm(tensors: Tensors) -> Tensors:
    """A backbone's tensors by timm's names: the merging of patches belongs to the stage after."""
    return {_move_merging(name, 1): tensor for name, tensor in tensors.items()}


def from_timm(tensors: Tensors) -> Tensors:
    """The inverse of `to_timm`."""
    return {_move_merging(name, -1): tensor for name, tensor in tensors.items()}


def _move_merging(name: str, stages: int) -> str:
    match name.split("."):
        case ["layers", stage, "downsample", *rest] if stage.isdecimal():
            return ".".join(["layers", str(int(stage) + stages), "downsample", *rest])
    return name


def timm_arguments(backbone: Swin, image_size: int) -> dict[str, Any]:
    """The arguments of timm's SwinTransformer that describe the backbone."""
    return {
        "img_size": image_size,
        "patch_size": backbone.patch_size,
        "embed_dim": backbone.embed_dim,
        "depths": tuple(backbone.depths),
        "num_heads": tuple(backbone.num_heads),
        "window_size": backbone.window_size,
        "mlp_ratio": backbone.mlp_ratio,
        "drop_path_rate": backbone.drop_path_rate,
    }


TIMM_MAPS = """\
The maps of all stages, [b, d, h, w] and finest first, as for a feature pyramid:

```python
maps = model.forward_intermediates(images, norm=True, intermediates_only=True)
```"""


def sizes_like_timm(backbone: Swin) -> list[int]:
    """The sizes, in pixels, at which timm computes what `backbone` does, up to twice its own."""
    return _agreeing_sizes(backbone, lambda side, window, shift: not shift or side % window == 0)


def _agreeing_sizes(backbone: Swin, agrees: Callable[[int, int, int], bool]) -> list[int]:
    """Sizes at which windows clipped to the map are ours, and (side, window, shift) `agrees`."""
    fixed = backbone.window_size

    def all_agree(size: int) -> bool:
        for stage, info in enumerate(backbone.stages):
            side = -(-size // info.stride)
            window, shift = (side, 0) if side <= fixed else (fixed, fixed // 2)
            if (window, shift) != backbone.stage_window(stage) or not agrees(side, window, shift):
                return False
        return True

    return [size for size in range(1, 2 * backbone.image_size + 1) if all_agree(size)]


# transformers

# The names that transformers 4 uses; transformers 5 renames them when it reads them.
SPELLING = Spelling(
    starts={
        "patch_embed.proj.": "embeddings.patch_embeddings.projection.",
        "patch_embed.norm.": "embeddings.norm.",
        "layers.": "encoder.layers.",
        "norm.": "layernorm.",
    },
    parts={
        ".norm1.": ".layernorm_before.",
        ".norm2.": ".layernorm_after.",
        ".attn.relative_position": ".attention.self.relative_position",
        ".attn.proj.": ".attention.output.dense.",
        ".mlp.fc1.": ".intermediate.dense.",
        ".mlp.fc2.": ".output.dense.",
    },
    trio=".attention.self.{}.",
)
to_transformers, from_transformers = SPELLING.to_names, SPELLING.from_names


def transformers_config(backbone: Swin, image_size: int) -> dict[str, Any]:
    """A `transformers.SwinConfig` as JSON holds it."""
    return {
        "architectures": ["SwinModel"],
        "model_type": "swin",
        "image_size": image_size,
        "patch_size": backbone.patch_size,
        "num_channels": 3,
        "embed_dim": backbone.embed_dim,
        "depths": list(backbone.depths),
        "num_heads": list(backbone.num_heads),
        "window_size": backbone.window_size,
        "mlp_ratio": backbone.mlp_ratio,
        "qkv_bias": True,
        "hidden_act": "gelu",
        "drop_path_rate": backbone.drop_path_rate,
        "layer_norm_eps": 1e-6,
        "use_absolute_embeddings": False,
        "torch_dtype": "float32",
    }


# Of a SwinBackbone, {earlier} being all stages but the last.
TRANSFORMERS_MAPS = """\
The maps of the earlier stages, as for a feature pyramid:

```python
import torch
from transformers import SwinBackbone

pyramid = SwinBackbone.from_pretrained("FOLDER", out_features={earlier}).eval()
for stage in pyramid.out_features:  # norms that SwinBackbone adds, and that nobody has trained
    pyramid.hidden_states_norms[stage] = torch.nn.Identity()
maps = pyramid(**processor(images, return_tensors="pt")).feature_maps  # [b, d, h, w], finest first
```

The last map is `last_hidden_state` of the model above: SwinBackbone shifts the windows of the last
stage too."""


def transformers_maps(backbone: Swin) -> str:
    """See `Peer.maps`."""
    earlier = [f"stage{i + 1}" for i in range(len(backbone.depths) - 1)]
    return TRANSFORMERS_MAPS.format(earlier=earlier) if earlier else ""


def sizes_like_transformers(backbone: Swin) -> list[int]:
    """The shorter sides of images, in pixels, at which SwinModel computes what `backbone` does.

    Up to twice the size that the backbone was trained at; where that is among them, all larger
    ones agree as well.
    """
    return _agreeing_sizes(backbone, lambda side, window, shift: window == backbone.window_size)


# Other windows


def resize_bias_table(
    table: Float[np.ndarray, "rows heads"], window_size: int
) -> Float[np.ndarray, "new_rows heads"]:
    """A table [(2w-1)², heads] for another window, as Swin does it for fine-tuning.

    Bicubic over the map of relative positions; see `bicubic_matrix`.
    """
    side, new_side = round(len(table) ** 0.5), 2 * window_size - 1
    weights = bicubic_matrix(side, new_side)
    square = table.reshape(side, side, -1).astype(np.float64)
    resized = np.einsum("yi,xj,ijh->yxh", weights, weights, square)
    return resized.reshape(new_side**2, -1).astype(np.float32)


# What shapes tell


def bias_tables(tensors: Tensors) -> list[dict[int, np.ndarray]]:
    """{block: bias table [rows, heads]} of each stage, by the numbers in published names.

    Nothing, where a number is larger than the file can mean: a stage has several tensors.
    """
    found: dict[int, dict[int, np.ndarray]] = {}
    for name, tensor in tensors.items():
        match = re.match(rf"layers\.(\d+)\.blocks\.(\d+)\.{re.escape(TABLE)}$", name)
        if match and tensor.ndim == 2:
            stage, block = int(match[1]), int(match[2])
            if max(stage, block) >= len(tensors):
                return []
            found.setdefault(stage, {})[block] = tensor
    return [found.get(stage, {}) for stage in range(1 + max(found, default=-1))]


def masked_size(tensors: Tensors, patch_size: int) -> int | None:
    """Pixels along the images that the first stage's shift mask f32[windows, n, n] was made for."""
    masks = [x for name, x in tensors.items() if re.match(r"layers\.0\..*attn_mask$", name)]
    if not masks or masks[0].ndim != 3:
        return None
    return round((masks[0].shape[0] * masks[0].shape[1]) ** 0.5) * patch_size


class SwinFamily(Family[Swin]):
    """See the top of this file."""

    signature = f"{PATCHES} and, in each stage, layers.I.blocks.J.{TABLE}"
    buffers = ("relative_position_index", "attn_mask")
    supervised_remark = "its norms get EsViT's eps of 1e-6; a supervised Swin was trained with 1e-5"
    timm = Peer(
        model="SwinTransformer",
        to_names=to_timm,
        from_names=from_timm,
        arguments=timm_arguments,
        agreeing_sizes=sizes_like_timm,
        difference=(
            "it takes windows and shifts from this size, and pads shifted maps after the shift"
        ),
        advice="timm takes windows and shifts from `img_size`; another size gives other features.",
        view_features=lambda model, pixels: model(pixels),
        snippet="""\
model(images)                   # view features [b, d], images [b, 3, h, w]
model.forward_features(images)  # region features [b, h, w, d]""",
        maps=lambda backbone: TIMM_MAPS,
        architecture="swin_tiny_patch4_window7_224",
    )
    transformers = Peer(
        model="SwinModel",
        to_names=to_transformers,
        from_names=from_transformers,
        arguments=transformers_config,
        agreeing_sizes=sizes_like_transformers,
        difference=(
            "it has one window in all stages and takes shifts from the image; here both are fixed "
            "by the size that the backbone was trained at"
        ),
        advice="""\
SwinModel takes windows and shifts from the image at hand; those of this backbone are fixed. Its
features agree with the ones measured in training for images whose shorter side has {sizes}
(the longer side is free), and are others, or an error, for all else. Use a new SwinModel after an
image of another size: it keeps the windows of the smallest that it has seen.""",
        maps=transformers_maps,
    )

    def published_names(self, tensors: Tensors) -> Tensors:
        if any(name.startswith("encoder.layers.") for name in tensors):
            tensors = from_transformers(tensors)
        # The last stage merges nothing; in timm (since 0.9) the first one does not.
        stages = [int(match[1]) for name in tensors if (match := re.match(r"layers\.(\d+)", name))]
        if any(name.startswith(f"layers.{max(stages, default=0)}.downsample.") for name in tensors):
            tensors = from_timm(tensors)
        return tensors

    def recognises(self, tensors: Tensors) -> bool:
        tables = bias_tables(tensors)
        return PATCHES in tensors and tensors[PATCHES].ndim == 4 and bool(tables) and all(tables)

    def infer(self, tensors: Tensors, image_size: int | None) -> Inferred:
        """See `Family.infer`.

        Windows and shifts follow from the image size (see `Swin`), which shapes tell only in part:
        Microsoft's and timm's shift masks do; a last stage with a smaller bias table does;
        otherwise 224 is assumed if it fits the tables, or else the smallest size that does.
        """
        tables = bias_tables(tensors)
        firsts = [next(iter(stage.values())) for stage in tables]
        windows = [(round(len(table) ** 0.5) + 1) // 2 for table in firsts]
        embed_dim, _, patch_size, _ = tensors[PATCHES].shape
        fields = {
            "embed_dim": embed_dim,
            "depths": tuple(1 + max(stage) for stage in tables),
            "num_heads": tuple(table.shape[1] for table in firsts),
            "window_size": max(windows),
            "patch_size": patch_size,
        }

        def fits(size: int | None) -> bool:
            swin = Swin(**fields, image_size=size or 0)
            return [swin.stage_window(i)[0] for i in range(len(windows))] == windows

        smallest = patch_size * 2 ** (len(windows) - 1) * windows[-1]
        candidates = [
            (masked_size(tensors, patch_size), "from its shift masks"),
            (224, "assumed; it fits the bias tables"),
            (smallest, "assumed; the smallest that fits the bias tables"),
        ]
        if image_size is not None:
            candidates = [(image_size, "as told")]
        for size, note in candidates:
            if size and fits(size):
                return Inferred(fields | {"image_size": size}, note)
        if image_size is None:
            raise UserError(
                f"its bias tables are of windows {windows}, which no Swin has at any image size"
            )
        raise UserError(
            f"the bias tables are of windows {windows}, which no Swin has at this size",
            argument="image_size", value=image_size,
        )  # fmt: skip

    def describe(self, backbone: Swin) -> str:
        return (
            f"a Swin of depths {tuple(backbone.depths)}, heads {tuple(backbone.num_heads)}, "
            f"embed_dim {backbone.embed_dim}, window {backbone.window_size}, patch "
            f"{backbone.patch_size}, with windows and shifts for {backbone.image_size} pixels"
        )

    def buffer_tensors(self, backbone: Swin) -> Tensors:
        return {
            f"layers.{stage}.blocks.{block}.attn.relative_position_index": relative_position_index(
                backbone.stage_window(stage)[0]
            ).astype(np.int64)
            for stage, depth in enumerate(backbone.depths)
            for block in range(depth)
        }

    def resized(self, params: Mapping[str, Any], old: Swin, new: Swin) -> dict[str, Any]:
        """Resizes the bias tables of the stages whose windows differ."""
        resized = dict(params)
        for i in range(len(old.depths)):
            window_size = new.stage_window(i)[0]
            if window_size == old.stage_window(i)[0]:
                continue
            stage = dict(params[f"layers_{i}"])
            for name, block in stage.items():
                if "attn" in block:
                    table = block["attn"]["relative_position_bias_table"]
                    table = resize_bias_table(table, window_size)
                    attention = block["attn"] | {"relative_position_bias_table": table}
                    stage[name] = block | {"attn": attention}
            resized[f"layers_{i}"] = stage
        return resized
