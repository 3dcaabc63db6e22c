"""Backbones by name, and the network that a config describes."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from esvit_jax.config.fields import FIELDS, ConfigDict  # not of the package: it stands on this
from esvit_jax.errors import UserError
from esvit_jax.models.backbone import Backbone
from esvit_jax.models.cvt import CvT
from esvit_jax.models.esvit import EsViT
from esvit_jax.models.resnet import ResNet
from esvit_jax.models.swin import Swin
from esvit_jax.models.vil import ViL
from esvit_jax.models.vit import ViT

# A name's class and the fields that make it; drop-path rates are the published ones.
PRESETS: dict[str, tuple[type[Backbone], dict[str, Any]]] = {
    "swin_tiny": (Swin, dict(
        embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), drop_path_rate=0.1
    )),
    "swin_small": (Swin, dict(
        embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24), drop_path_rate=0.2
    )),
    "swin_base": (Swin, dict(
        embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), drop_path_rate=0.2
    )),
    "swin_large": (Swin, dict(
        embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48), drop_path_rate=0.2
    )),
    "cvt_tiny": (CvT, dict(
        embed_dims=(64, 192, 384, 768), depths=(2, 2, 6, 2), num_heads=(1, 3, 6, 12),
        drop_path_rate=0.1,
    )),
    # The published code's other one (cvt_v4/s3.yaml), which has fewer weights: 22.6 M, not 29.3 M.
    "cvt_small": (CvT, dict(
        embed_dims=(64, 128, 256, 512), depths=(2, 2, 10, 4), num_heads=(2, 4, 8, 16),
        drop_path_rate=0.2,
    )),
    "resnet50": (ResNet, dict(depths=(3, 4, 6, 3), base_width=64)),
    "vit_tiny": (ViT, dict(embed_dim=192, depths=(12,), num_heads=(3,), drop_path_rate=0.1)),
    "vit_small": (ViT, dict(embed_dim=384, depths=(12,), num_heads=(6,), drop_path_rate=0.1)),
    "vit_base": (ViT, dict(embed_dim=768, depths=(12,), num_heads=(12,), drop_path_rate=0.1)),
    # Named by their depths. The public code gives the heads of 2262 and, by the supervised
    # networks that they follow, of the others.
    "vil_1281": (ViL, dict(
        embed_dims=(96, 192, 384, 768), depths=(1, 2, 8, 1), num_heads=(3, 3, 6, 12),
        drop_path_rate=0.1,
    )),
    "vil_2262": (ViL, dict(
        embed_dims=(96, 192, 384, 768), depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24),
        drop_path_rate=0.1,
    )),
    "vil_14121": (ViL, dict(
        embed_dims=(96, 192, 384, 768), depths=(1, 4, 12, 1), num_heads=(3, 3, 6, 12),
        drop_path_rate=0.1,
    )),
}  # fmt: skip


def create_backbone(name: str, **fields: Any) -> Backbone:
    """The backbone of this name.

        backbone = esvit_jax.create_backbone("swin_tiny", window_size=14)
        variables = backbone.init(jax.random.key(0), images)
        out = backbone.apply(variables, images)  # see `models.BackboneOutput`

    Args:
      name: one of `PRESETS`.
      **fields: of the backbone's class, in place of its own; None keeps its own.

    Raises:
      UserError: no backbone has this name, it has no such field, a field holds what no config may,
        or they do not fit each other.
    """
    if name not in PRESETS:
        raise UserError(f"known are {', '.join(PRESETS)}", argument="name", value=name)
    backbone_class, preset = PRESETS[name]
    known = [f.name for f in dataclasses.fields(backbone_class) if f.name not in ("parent", "name")]
    given = {field: value for field, value in fields.items() if value is not None}
    for field, value in given.items():
        if field not in known:
            raise UserError(
                f"{name} has no such field; it has {', '.join(known)}", argument=field, value=value
            )
        if of_config := FIELDS.get(f"backbone.{field}"):
            of_config.rule.require(field, tuple(value) if isinstance(value, list) else value)
    backbone = backbone_class(**(preset | given))
    backbone.validate()
    return backbone


def create_model(config: ConfigDict) -> EsViT:
    """The student's (and teacher's) network of a checked config."""
    dtype = jnp.dtype(config.dtype)
    fields = dict(config.backbone)
    if config.parallel == "fsdp":
        backbone_class, _ = PRESETS[config.backbone.name]
        fields |= backbone_class.when_spread or {}
    backbone = create_backbone(**fields, dtype=dtype, remat=config.remat)
    return EsViT(backbone, **config.head, region=config.loss.region, dtype=dtype)
