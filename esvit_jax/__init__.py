"""EsViT in JAX: self-supervised pretraining of multi-stage vision transformers."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esvit_jax.interop.load import load as load
    from esvit_jax.models import create_backbone as create_backbone

__version__ = "0.1.0"
__all__ = ["__version__", "create_backbone", "load"]


def __getattr__(name: str) -> Any:
    """The public names, imported when they are used: `import esvit_jax` alone is instant."""
    if name == "load":
        from esvit_jax.interop.load import load

        return load
    if name == "create_backbone":
        from esvit_jax.models import create_backbone

        return create_backbone
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
