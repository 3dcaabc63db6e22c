"""What every export format gets: a backbone, its weights, and images to compare features on."""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from safetensors.numpy import save

from esvit_jax import checkpoint
from esvit_jax.errors import UserError
from esvit_jax.models import Swin
from esvit_jax.models.attention import relative_position_index

OWN_BOUND = 1e-6  # relative error of features where our own network reads the files
LIBRARY_BOUND = 1e-4  # and where another implementation does


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
    backbone: Swin
    params: Any
    image_size: int
    features: Callable[[Any, Any], Any]

    @property
    def resize_size(self) -> int:
        """Pixels that the shorter side of an image is resized to before its centre is cut out."""
        return round(self.image_size / self.loaded.config.evaluate.crop)


def load_exportable(
    workdir: str | os.PathLike, *, key: str | None, image_size: int | None, step: int | None
) -> Exportable:
    """Reads the backbone of a run or a converted checkpoint.

    Args:
      workdir: see `checkpoint.load_model`.
      key: "teacher" or "student"; None is the one that evaluation uses.
      image_size: None is the size that the run is evaluated at.
      step: of the checkpoint; None is the newest.

    Raises:
      UserError: there is no such model, or `image_size` is smaller than a patch.
    """
    loaded = checkpoint.load_model(workdir, step)
    config = loaded.config
    chosen: str = key or loaded.facts.get("key", "teacher")
    backbone: Any = loaded.model.backbone.clone(
        dtype=jnp.float32, attention_dtype="float32", remat="none"
    )
    size = image_size
    if size is None:
        size = config.evaluate.size or config.views.global_size
    if size < backbone.patch_size:
        raise UserError(
            f"--image_size={size}: it must be at least {backbone.patch_size}, one patch"
        )
    params = jax.tree.map(np.asarray, getattr(loaded, chosen)["backbone"])

    @jax.jit
    def features(params, images):
        return backbone.forward(params, images).view_features

    return Exportable(loaded, chosen, backbone, params, size, features)


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


def map_size(backbone: Swin, image_size: int, stage: int) -> int:
    """Tokens along a side of a stage's map."""
    return math.ceil(image_size / (backbone.patch_size * 2**stage))


def position_indices(backbone: Swin) -> dict[str, Int[np.ndarray, "n n"]]:
    """The buffers of relative positions that PyTorch's Swins keep, by published names."""
    return {
        f"layers.{stage}.blocks.{block}.attn.relative_position_index": relative_position_index(
            backbone.stage_window(stage)[0]
        ).astype(np.int64)
        for stage, depth in enumerate(backbone.depths)
        for block in range(depth)
    }


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes a safetensors file, which keeps neither strides nor what is not contiguous."""
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    # `save_file` would make it readable for nobody else.
    path.write_bytes(save(tensors, metadata={"format": "pt"}))


def refuse_size(image_size: int, sizes: Sequence[int], library: str, why: str) -> None:
    """Raises a UserError unless `image_size` is among those at which a library agrees with us.

    Args:
      image_size: pixels.
      sizes: ascending.
      library: whose features are compared.
      why: what it does otherwise.
    """
    if image_size in sizes:
        return
    where = f"it agrees at {in_words(sizes)}" if sizes else "it agrees at no size"
    raise UserError(
        f"--image_size={image_size}: {library} would compute other features ({why}); {where}"
    )


def in_words(sizes: Sequence[int]) -> str:
    """Ascending sizes as ranges: "193 to 224 pixels"."""
    starts = [s for s in sizes if s - 1 not in sizes]
    ends = [s for s in sizes if s + 1 not in sizes]
    pairs = zip(starts, ends, strict=True)
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in pairs) + " pixels"
