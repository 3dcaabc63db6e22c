"""Names of tensors in files, and what shapes tell: one file a family of backbones."""

from typing import Any

from esvit_jax.errors import UserError
from esvit_jax.interop.names.base import Family
from esvit_jax.interop.names.cvt import CvTFamily
from esvit_jax.interop.names.published import Tensors
from esvit_jax.interop.names.resnet import ResNetFamily
from esvit_jax.interop.names.swin import SwinFamily
from esvit_jax.interop.names.vil import ViLFamily
from esvit_jax.interop.names.vit import ViTFamily
from esvit_jax.models import Backbone, CvT, ResNet, Swin, ViL, ViT

# One line a family. (Each is a Family of its own class, which a table of all cannot say.)
FAMILIES: dict[type[Backbone], Family[Any]] = {
    Swin: SwinFamily(),
    ResNet: ResNetFamily(),
    ViT: ViTFamily(),
    CvT: CvTFamily(),
    ViL: ViLFamily(),
}


def family_of(backbone: Backbone) -> Family[Any]:
    """The family of a backbone.

    Raises:
      UserError: there are no names for its class.
    """
    try:
        return FAMILIES[type(backbone)]
    except KeyError as error:
        known = ", ".join(known.__name__ for known in FAMILIES)
        raise UserError(
            f"a {type(backbone).__name__} has no names in files yet; known are {known}"
        ) from error


def recognise(tensors: Tensors) -> tuple[type[Backbone], Family[Any], Tensors]:
    """The class and the family that a network's tensors are of, and the tensors by published names.

    Raises:
      UserError: they are of none.
    """
    for backbone_class, family in FAMILIES.items():
        published = family.published_names(tensors)
        if family.recognises(published):
            return backbone_class, family, published
    known = "; or ".join(
        f"{backbone_class.__name__} ({family.signature})"
        for backbone_class, family in FAMILIES.items()
    )
    raise UserError(
        f"it holds no {known}; its {len(tensors)} names begin with {', '.join(list(tensors)[:4])}"
    )
