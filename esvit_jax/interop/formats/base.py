"""What every export format is, and what it gets: a backbone, its weights, images to compare on."""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from safetensors.numpy import load_file, save

from esvit_jax import checkpoint
from esvit_jax.config import ConfigDict
from esvit_jax.errors import UserError
from esvit_jax.interop.exported import load_network
from esvit_jax.interop.infer import bad_values
from esvit_jax.interop.names import FAMILIES, family_of
from esvit_jax.interop.names.base import LARGEST_IMAGE, Family, Peer
from esvit_jax.interop.names.published import (
    Tensors,
    params_from_state_dict,
    state_dict_from_params,
)
from esvit_jax.models import Backbone

OWN_BOUND = 1e-6  # relative error of features where our own network reads the files
LIBRARY_BOUND = 1e-4  # and where another implementation does
WEIGHTS_FILE = "model.safetensors"


class Exportable(NamedTuple):
    """A backbone on its way out.

    Attributes:
      loaded: the run or converted checkpoint that it comes from.
      key: "teacher" or "student", whose weights these are.
      backbone: computes in float32, whatever it was trained in.
      params: of the backbone, on the host.
      image_size: pixels along a side of the images it is exported for and checked on.
      features: (params, images f32[b, h, w, 3]) -> view features f32[b, d]; compiled once.
    """

    loaded: checkpoint.LoadedModel
    key: str
    backbone: Backbone
    params: Any
    image_size: int
    features: Callable[[Any, Any], Any]

    @property
    def family(self) -> Family[Any]:
        """The backbone's names in files.

        Raises:
          UserError: its class has none, so that only formats without names can hold it.
        """
        return family_of(self.backbone)

    @property
    def architecture(self) -> str:
        """The backbone in words."""
        if type(self.backbone) in FAMILIES:
            return self.family.describe(self.backbone).removeprefix("a ")
        return type(self.backbone).__name__

    @property
    def config(self) -> ConfigDict:
        """That of the run, evaluated at this image size."""
        config = self.loaded.config.copy_and_resolve_references()
        config.evaluate.size = self.image_size
        return config

    @property
    def resize_size(self) -> int:
        """Pixels that the shorter side of an image is resized to before its centre is cut out."""
        return round(self.image_size / self.loaded.config.evaluate.crop)


Pixels = Callable[[Exportable, Path, Sequence[np.ndarray]], np.ndarray]


class Reading(NamedTuple):
    """View features as somebody computes them from the files of an export.

    Attributes:
      reader: who, with its version.
      features: f32[b, d].
      bound: largest relative error.
    """

    reader: str
    features: Any
    bound: float


class CannotCheck(Exception):
    """A library that would check the files is not there.

    Args:
      library: its name.
      reason: why not, after "because".
    """

    def __init__(self, library: str, reason: str):
        super().__init__(f"not checked with {library}, because {reason}")
        self.library, self.reason = library, reason


@contextmanager
def importing(library: str) -> Iterator[None]:
    """Within the block a library is imported, and as little else done as can be.

    What a broken installation raises is of many kinds: RuntimeError of a torchvision that is made
    for another torch, OSError of a shared library that is not there, AttributeError.

    Args:
      library: that checks an export.

    Raises:
      CannotCheck: for any of them.
    """
    try:
        yield
    except Exception as error:
        cause = error
        while cause.__cause__ is not None and isinstance(cause.__cause__, Exception):
            cause = cause.__cause__
        name = (getattr(cause, "name", None) or "") if isinstance(cause, ImportError) else ""
        if isinstance(cause, ModuleNotFoundError) and name and "." not in name:
            raise CannotCheck(library, f"{name} is not installed") from error
        reason = " ".join(f"{type(cause).__name__}: {cause}".split())[:200]
        raise CannotCheck(library, f"it cannot be imported ({reason})") from error


class Checks(NamedTuple):
    """Who computed features from the files of an export, and who could not.

    Attributes:
      errors: by reader, how far features of `check_images` were off, relative to their length.
      unchecked: lines "not checked with LIBRARY, because …".
    """

    errors: dict[str, float]
    unchecked: list[str]


@dataclasses.dataclass(frozen=True)
class Format:
    """A format of exports; `formats.FORMATS` names them.

    Attributes:
      check: refuses with a UserError what the format cannot hold, before anything is computed.
      write: writes the files into a folder.
      readings: (what was exported, its folder, images f32[b, s, s, 3]) -> the features that our
        network and then the library compute from the files. A RunError says that a library cannot
        read them, CannotCheck that it is not there.
      usage: how to use the files, in Markdown; FOLDER stands for their folder.
      library: that reads them, as the hub names it.
      pixels: (what was exported, its folder, photos uint8[h, w, 3]) -> f32[b, s, s, 3], how the
        library prepares photos; CannotCheck says that it is not there. None where it does not.
      config_file: the name that our own config gets beside them.
    """

    check: Callable[[Exportable], None]
    write: Callable[[Exportable, Path], None]
    readings: Callable[[Exportable, Path, np.ndarray], Iterator[Reading]]
    usage: Callable[[Exportable], str]
    library: str
    pixels: Pixels | None = None
    config_file: str = "config.json"


def load_exportable(
    workdir: str | os.PathLike,
    *,
    key: str | None,
    image_size: int | None,
    step: int | None,
    strict: bool,
) -> Exportable:
    """Reads the backbone of a run or a converted checkpoint.

    Args:
      workdir: see `load_network`.
      key: "teacher" or "student"; None is the one that evaluation uses.
      image_size: pixels; None is the size that the run is evaluated at.
      step, strict: see `load_network`.

    Raises:
      UserError: there is no such model, its weights have `bad_values`, or `image_size` is smaller
        than a patch or too large.
    """
    loaded = load_network(workdir, step, strict=strict)
    network = loaded.network(key)
    config = loaded.config
    chosen = loaded.chosen(key)
    backbone = _in_float32(loaded.model.backbone)
    size = image_size
    if size is None:
        size = config.evaluate.size or config.views.global_size
    patch_size = backbone.stages[0].stride
    if not patch_size <= size <= LARGEST_IMAGE:
        message = f"it must be from {patch_size}, one patch, to {LARGEST_IMAGE}"
        raise UserError(message, argument="image_size", value=size)
    params = jax.tree.map(np.asarray, network["backbone"])
    for name, words in bad_values(state_dict_from_params({"backbone": params})).items():
        raise UserError(f"{workdir}: {name} of the {chosen}: {words}")

    @jax.jit
    def features(params, images):
        return backbone.forward(params, images).view_features

    return Exportable(loaded, chosen, backbone, params, size, features)


def _in_float32(backbone: Backbone) -> Backbone:
    known = {field.name for field in dataclasses.fields(backbone)}
    fields = {"dtype": jnp.float32, "attention_dtype": "float32", "remat": "none"}
    fields["attention"] = "xla"  # for any platform
    return backbone.clone(**{name: value for name, value in fields.items() if name in known})


def check_images(image_size: int) -> Float[np.ndarray, "3 s s 3"]:
    """Always the same normalised images: noise, coarse noise, and ramps of each colour."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(image_size, image_size, 3))
    coarse = rng.normal(size=(4, 4, 3))
    index = np.arange(image_size) * 4 // image_size
    ramp = np.linspace(-2.0, 2.0, image_size)
    ramps = np.stack(np.broadcast_arrays(ramp[:, None], ramp, -ramp[:, None]), axis=-1)
    return np.stack([noise, coarse[index][:, index], ramps]).astype(np.float32)


def relative_error(found: Any, expected: Any) -> float:
    """|found - expected| / |expected|: Euclidean norms over all elements."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if found.shape != expected.shape:
        return math.inf
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def write_tensors(path: Path, tensors: Tensors) -> None:
    """Writes a safetensors file, which keeps neither strides nor what is not contiguous."""
    # Not `ascontiguousarray`, of which a scalar comes back as [1].
    tensors = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    # `save_file` would make it readable for nobody else.
    path.write_bytes(save(tensors, metadata={"format": "pt"}))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes an object for a reader that is a person, too."""
    path.write_text(json.dumps(content, indent=2) + "\n")


def read_weights(source: Exportable, folder: Path, peer: Peer[Any]) -> Any:
    """The backbone's params in a folder with `WEIGHTS_FILE` by the names of another library."""
    tensors = source.family.weights(peer.from_names(load_file(folder / WEIGHTS_FILE)))
    return params_from_state_dict(tensors)["backbone"]


def peer_or_refuse(source: Exportable, peer: Peer[Any] | None, library: str) -> Peer[Any]:
    """The peer, if its library has the backbone and computes the same features at this image size.

    Raises:
      UserError: it does not.
    """
    if peer is None:
        why = source.family.why_no_peer
        raise UserError(
            f"{library} has no {type(source.backbone).__name__}{f' ({why})' if why else ''}; take "
            "another format"
        )
    sizes = peer.agreeing_sizes(source.backbone)
    if source.image_size not in sizes:
        where = f"it agrees at {size_ranges(sizes)}" if sizes else "it agrees at no size"
        raise UserError(
            f"{library}'s {peer.model} would compute other features ({peer.difference}); {where}",
            argument="image_size", value=source.image_size,
        )  # fmt: skip
    return peer


def size_ranges(sizes: Sequence[int]) -> str:
    """Ascending sizes as ranges: "193 to 224 pixels"."""
    starts = [s for s in sizes if s - 1 not in sizes]
    ends = [s for s in sizes if s + 1 not in sizes]
    pairs = zip(starts, ends, strict=True)
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in pairs) + " pixels"
