"""Backbones, projection heads, and EsViT, which is made of both."""

from esvit_jax.models.backbone import Backbone, BackboneOutput, StageInfo
from esvit_jax.models.cvt import CvT
from esvit_jax.models.esvit import EsViT, EsViTOutput, HeadOutput
from esvit_jax.models.presets import PRESETS, create_backbone, create_model
from esvit_jax.models.resnet import ResNet
from esvit_jax.models.swin import Swin
from esvit_jax.models.vil import ViL
from esvit_jax.models.vit import ViT

__all__ = [
    "PRESETS", "Backbone", "BackboneOutput", "CvT", "EsViT", "EsViTOutput", "HeadOutput", "ResNet",
    "StageInfo", "Swin", "ViL", "ViT", "create_backbone", "create_model",
]  # fmt: skip
