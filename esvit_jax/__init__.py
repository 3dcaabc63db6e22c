"""EsViT in JAX: self-supervised pretraining of multi-stage vision transformers."""

__version__ = "0.1.0"
