"""ViT: names in the published checkpoints, in timm and in transformers, and what shapes tell.

EsViT's, DINO's, DeiT's and timm's files have the same names, but for a prefix in whole checkpoints
of DINO. Shapes do not tell the number of heads: DeiT has one for each 64 features.

Both libraries leave out what does not fill a patch, as we do. For an image of another size than
that of the position embedding, transformers resizes it as we do (if it is told to), timm with
another bicubic kernel.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from esvit_jax.errors import UserError
from esvit_jax.interop.names.base import LARGEST_IMAGE, Family, Inferred, Peer
from esvit_jax.interop.names.published import Tensors
from esvit_jax.interop.names.spelling import Spelling
from esvit_jax.models import ViT
from esvit_jax.models.vit import resize_positions

PATCHES = "patch_embed.proj.weight"
HEAD_DIM = 64  # of DeiT's, whatever their size


# timm


def timm_arguments(backbone: ViT, image_size: int) -> dict[str, Any]:
    """The arguments of timm's VisionTransformer that describe the backbone."""
    return {
        "img_size": image_size,
        "patch_size": backbone.patch_size,
        "embed_dim": backbone.embed_dim,
        "depth": backbone.depths[0],
        "num_heads": backbone.num_heads[0],
        "mlp_ratio": backbone.mlp_ratio,
        "drop_path_rate": backbone.drop_path_rate,
    }


def sizes_like_timm(backbone: ViT) -> list[int]:
    """The size of the position embedding."""
    return [backbone.image_size]


# transformers

# The names that transformers 4 uses; transformers 5 renames them when it reads them.
SPELLING = Spelling(
    starts={
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj.": "embeddings.patch_embeddings.projection.",
        "blocks.": "encoder.layer.",
        "norm.": "layernorm.",
    },
    parts={
        ".norm1.": ".layernorm_before.",
        ".norm2.": ".layernorm_after.",
        ".attn.proj.": ".attention.output.dense.",
        ".mlp.fc1.": ".intermediate.dense.",
        ".mlp.fc2.": ".output.dense.",
    },
    trio=".attention.attention.{}.",
)


def transformers_config(backbone: ViT, image_size: int) -> dict[str, Any]:
    """A `transformers.ViTConfig` as JSON holds it; its size is that of the position embedding."""
    return {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "image_size": backbone.side * backbone.patch_size,
        "patch_size": backbone.patch_size,
        "num_channels": 3,
        "hidden_size": backbone.embed_dim,
        "num_hidden_layers": backbone.depths[0],
        "num_attention_heads": backbone.num_heads[0],
        "intermediate_size": int(backbone.embed_dim * backbone.mlp_ratio),
        "qkv_bias": True,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "torch_dtype": "float32",
    }


def sizes_like_transformers(backbone: ViT) -> Sequence[int]:
    """All that have a patch."""
    return range(backbone.patch_size, LARGEST_IMAGE + 1)


# What shapes tell


def depth_of(tensors: Tensors) -> int:
    """Blocks, by the numbers in published names; 0 where one is larger than the file can mean."""
    blocks = [int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))]
    return 1 + max(blocks, default=-1) if max(blocks, default=0) < len(tensors) else 0


def heads_of(embed_dim: int) -> int:
    """DeiT's; of a width that no DeiT can have, the 3 heads of the smallest one, or 1."""
    if embed_dim % HEAD_DIM:
        return 1 if embed_dim % 3 else 3
    return embed_dim // HEAD_DIM


class ViTFamily(Family[ViT]):
    """See the top of this file."""

    signature = f"{PATCHES}, cls_token, pos_embed and blocks.I.attn.qkv.weight"
    timm = Peer(
        model="VisionTransformer",
        to_names=dict,
        from_names=dict,
        arguments=timm_arguments,
        agreeing_sizes=sizes_like_timm,
        difference="it resizes the position embedding with another bicubic kernel",
        advice="For images of another size, timm's `dynamic_img_size` gives other features.",
        view_features=lambda model, pixels: model(pixels),
        snippet="""\
model(images)                          # view features [b, d], images [b, 3, h, w]
model.forward_features(images)[:, 1:]  # region features [b, h * w, d]""",
        architecture="vit_tiny_patch16_224",
    )
    transformers = Peer(
        model="ViTModel",
        to_names=SPELLING.to_names,
        from_names=SPELLING.from_names,
        arguments=transformers_config,
        agreeing_sizes=sizes_like_transformers,
        difference="it agrees at any size",
        advice="Features agree for images of any size from a patch on, square or not.",
        options={"add_pooling_layer": False},
        view_features=lambda model, pixels: model(
            pixels, interpolate_pos_encoding=True
        ).last_hidden_state[:, 0],
        snippet="""\
inputs = processor(images, return_tensors="pt")
out = model(**inputs, interpolate_pos_encoding=True)
out.last_hidden_state[:, 0]   # view features [b, d]
out.last_hidden_state[:, 1:]  # region features [b, h * w, d]""",
    )

    def published_names(self, tensors: Tensors) -> Tensors:
        if "embeddings.cls_token" in tensors:
            return SPELLING.from_names(tensors)
        if "backbone.cls_token" in tensors:  # DINO's
            return {name.removeprefix("backbone."): tensor for name, tensor in tensors.items()}
        return tensors

    def recognises(self, tensors: Tensors) -> bool:
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        return (
            len(shapes.get(PATCHES, ())) == 4
            and len(shapes.get("pos_embed", ())) == 3
            and "cls_token" in shapes
            and "blocks.0.attn.qkv.weight" in shapes
            and depth_of(tensors) > 0
        )

    def infer(self, tensors: Tensors, image_size: int | None) -> Inferred:
        """See `Family.infer`. The number of heads is assumed, see `heads_of`."""
        embed_dim, _, patch_size, _ = tensors[PATCHES].shape
        patches = tensors["pos_embed"].shape[1] - 1
        side = math.isqrt(max(patches, 0))
        if side == 0 or side**2 != patches:
            raise UserError(
                f"its position embedding is of a class token and {patches} others, which are the "
                "patches of no square image"
            )
        if image_size is not None and image_size // patch_size != side:
            raise UserError(
                f"the position embedding is of {side} x {side} patches of {patch_size} pixels",
                argument="image_size", value=image_size,
            )  # fmt: skip
        heads = heads_of(embed_dim)
        fields = {
            "embed_dim": embed_dim,
            "depths": (depth_of(tensors),),
            "num_heads": (heads,),
            "patch_size": patch_size,
            "image_size": image_size or side * patch_size,
        }
        told = "as told" if image_size else "from its position embedding"
        note = f"{told}; num_heads {heads}: assumed, of {embed_dim // heads} features each"
        return Inferred(fields, note)

    def describe(self, backbone: ViT) -> str:
        return (
            f"a ViT of depth {backbone.depths[0]}, heads {backbone.num_heads[0]}, embed_dim "
            f"{backbone.embed_dim}, patch {backbone.patch_size}, with a position embedding for "
            f"{backbone.image_size} pixels"
        )

    def resized(self, params: Mapping[str, Any], old: ViT, new: ViT) -> dict[str, Any]:
        """Resizes the position embedding for another image size or patch size."""
        positions = resize_positions(params["pos_embed"], old.side, new.side, new.side)
        return {**params, "pos_embed": np.asarray(positions)}
