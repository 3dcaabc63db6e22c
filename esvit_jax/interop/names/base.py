"""What files need to know of a family of backbones: names of tensors, and what shapes tell."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from esvit_jax.interop.names.published import Tensors
from esvit_jax.models import Backbone

COUNTER = "num_batches_tracked"  # of a batch norm, in backbones and in heads
B = TypeVar("B", bound=Backbone)
LARGEST_IMAGE = 4096  # pixels along a side; beyond, masks and images to compare on take gigabytes


class Inferred(NamedTuple):
    """What shapes tell of a backbone.

    Attributes:
      fields: of its class; among them `image_size`, pixels.
      note: how the image size was found.
    """

    fields: dict[str, Any]
    note: str


def _pooled(model: Any, pixels: Any) -> Any:
    """What most models of transformers call view features, some with a map's axes left."""
    return model(pixels).pooler_output.flatten(1)


@dataclasses.dataclass(frozen=True)
class Peer(Generic[B]):
    """How another library (timm, transformers) holds the backbones of a family.

    Attributes:
      model: its class there.
      to_names: tensors by published names -> by the library's (weights may be split or joined).
      from_names: the inverse.
      arguments: (backbone, pixels along an image) -> what describes the model: arguments of timm's
        class, the content of transformers' config.json.
      agreeing_sizes: backbone -> the sizes of images, in pixels, ascending, at which the library
        computes the same features.
      difference: why others do not agree, after "the library would compute other features".
      advice: for the model card, a paragraph; {sizes} stands for the agreeing sizes.
      view_features: (the library's model, pixels [b, 3, h, w]) -> [b, d], its tensors.
      snippet: for the model card, the lines of Python that follow the loading of the model.
      options: what transformers' loader has to be told beside the folder.
      maps: backbone -> for the model card, a paragraph with lines for the maps of all stages, which
        go on from those above; FOLDER stands for the folder.
      architecture: the name under which timm has a model of the class, for which `arguments` are
        others than its own; "" where there is none, and timm's hub cannot load the folder.
      transformer: whether timm's class takes the size of images, and layer norms, whose eps has to
        be told.
    """

    model: str
    to_names: Callable[[Tensors], Tensors]
    from_names: Callable[[Tensors], Tensors]
    arguments: Callable[[B, int], dict[str, Any]]
    agreeing_sizes: Callable[[B], Sequence[int]]
    difference: str
    advice: str
    view_features: Callable[[Any, Any], Any] = _pooled
    snippet: str = """\
out = model(**processor(images, return_tensors="pt"))
out.pooler_output      # view features [b, d]
out.last_hidden_state  # region features [b, h * w, d]"""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    maps: Callable[[B], str] = lambda backbone: ""
    architecture: str = ""
    transformer: bool = True


class Family(Generic[B]):
    """One family; `names.FAMILIES` has them by the class of their backbones.

    A network's tensors are known by published names (those of the EsViT checkpoints, which
    `published.state_dict_from_params` makes of our params).

    Attributes:
      signature: the tensors by which it is recognised, in words.
      buffers: last parts of the names of tensors that hold no weights, beside `COUNTER`.
      timm, transformers: the family in these libraries; None where they lack it.
      why_no_peer: what to know of a library that has none, in words.
      supervised_remark: what to know of a supervised one that is converted, in words.
    """

    signature: str
    buffers: tuple[str, ...] = ()
    timm: Peer[B] | None = None
    transformers: Peer[B] | None = None
    why_no_peer: str = ""
    supervised_remark: str = ""

    def published_names(self, tensors: Tensors) -> Tensors:
        """The tensors by published names, whichever of the family's spellings they come in."""
        raise NotImplementedError

    def file_names(self, tensors: Tensors) -> Tensors:
        """Tensors by published names as the published implementation saves them.

        The inverse of `published_names`, for a family whose files prefix or repeat names.
        """
        return tensors

    def recognises(self, tensors: Tensors) -> bool:
        """Whether tensors, by published names, are of a network of this family."""
        raise NotImplementedError

    def infer(self, tensors: Tensors, image_size: int | None) -> Inferred:
        """The fields that shapes tell, of tensors that are recognised.

        Args:
          tensors: by published names, with buffers.
          image_size: pixels it was trained with, if that is known.

        Raises:
          UserError: no backbone of this family has such shapes (at this `image_size`).
        """
        raise NotImplementedError

    def describe(self, backbone: B) -> str:
        """The architecture in words, with its article."""
        raise NotImplementedError

    def buffer_tensors(self, backbone: B) -> Tensors:
        """The buffers that PyTorch implementations look for in a file, by published names."""
        return {}

    def resized(self, params: Mapping[str, Any], old: B, new: B) -> dict[str, Any]:
        """A backbone's params for one with another window, image size, or the like.

        Args:
          params: of `old`.
          old, new: fields may differ as far as the family can follow.
        """
        raise NotImplementedError

    def weights(self, tensors: Tensors) -> Tensors:
        """The tensors without the buffers."""
        return {
            name: tensor
            for name, tensor in tensors.items()
            if name.rsplit(".", 1)[-1] not in (*self.buffers, COUNTER)
        }
