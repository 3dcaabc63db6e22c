"""Backbones by name, and the network that a config describes."""

import jax.numpy as jnp
from flax import linen as nn

from esvit_jax.errors import UserError
from esvit_jax.models.esvit import EsViT, EsViTOutput
from esvit_jax.models.swin import BackboneOutput, Swin

__all__ = ["BACKBONES", "BackboneOutput", "EsViT", "EsViTOutput", "Swin", "create_backbone"]

# Drop-path rates are the ones each was published with.
BACKBONES = {
    "swin_tiny": dict(
        embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), drop_path_rate=0.1
    ),
    "swin_small": dict(
        embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24), drop_path_rate=0.2
    ),
    "swin_base": dict(
        embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), drop_path_rate=0.2
    ),
    "swin_large": dict(
        embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48), drop_path_rate=0.2
    ),
}


def create_backbone(name: str, **overrides) -> nn.Module:
    """The backbone of this name, with the given fields of `Swin` in place of its own.

    Raises:
      UserError: no backbone has this name.
    """
    if name not in BACKBONES:
        raise UserError(
            f"config.backbone.name = {name!r} is unknown; known are {', '.join(BACKBONES)}"
        )
    return Swin(**(BACKBONES[name] | overrides))


def create_model(config) -> EsViT:
    """The student's (and teacher's) network of a resolved config."""
    dtype = jnp.dtype(config.dtype)
    fields = {name: value for name, value in config.backbone.items() if value is not None}
    backbone = create_backbone(**fields, dtype=dtype, remat=config.remat)
    return EsViT(backbone, **config.head, region=config.loss.region, dtype=dtype)
