"""`esvit_jax.load`: a trained backbone in a notebook."""

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from esvit_jax import checkpoint
from esvit_jax.config import ConfigDict
from esvit_jax.data.loader import DecodeError, decode
from esvit_jax.errors import UserError, renamed
from esvit_jax.evaluate.features import evaluation_images
from esvit_jax.interop.config_beside import read_config
from esvit_jax.interop.exported import PROGRAM, read_export
from esvit_jax.interop.formats.stablehlo import load_program
from esvit_jax.interop.infer import bad_values
from esvit_jax.interop.names.published import state_dict_from_params
from esvit_jax.models import Backbone, create_model

# An image is a path, a Pillow image (which need not be installed) or an array.
Preprocess = Callable[[Sequence[Any]], jax.Array]


class LoadedBackbone(NamedTuple):
    """A trained backbone, ready for images.

    Attributes:
      backbone: a Flax module, images f32[b, h, w, 3] -> `models.BackboneOutput`.
      variables: {"params": …}, what `backbone.apply` takes first.
      preprocess: a list of images -> f32[b, s, s, 3], normalised: the centre of each, as in the
        run's evaluation. An image is a path, a Pillow image, or uint8[h, w, 3] (or grey, [h, w]).
    """

    backbone: Backbone
    variables: dict[str, Any]
    preprocess: Preprocess


def load(path: str | os.PathLike) -> LoadedBackbone:
    """A trained backbone, ready for images.

        backbone, variables, preprocess = esvit_jax.load("runs/my_run")
        out = backbone.apply(variables, preprocess(["cat.jpg", "dog.jpg"]))
        out.view_features    # f32[b, d], one vector an image
        out.region_features  # f32[b, h, w, d], the last map
        out.stage_maps       # one f32[b, h_i, w_i, d_i] a stage, finest first

    The stage maps are what a feature pyramid (FPN) for detection or segmentation stands on. Images
    may have any size, square or not: of H x W pixels the map of stage i has H / stride_i rows and
    W / stride_i columns, rounded up (a ViT and a ViL leave out what does not fill a patch), and
    `backbone.stages` has stride and features of each. For those, normalise images yourself, as
    `preprocess` cuts out a square: (pixels / 255 - mean) / std, with `views.mean` and `views.std`
    of its config.json.

    Args:
      path: a workdir (its newest checkpoint), or a directory of `esvit convert` or `esvit export`
        (or the file in that). `~` is the home folder.

    Returns:
      The backbone, its weights (the teacher's; of a directory converted or exported with
      --key=student, the student's), and how to prepare images. A StableHLO export has its weights
      inside, takes images of one size, and gives views, regions and stage maps.

    Raises:
      UserError: there is no model of ours, it does not fit its config.json, or its weights are not
        finite.
    """
    path = os.path.expanduser(path)
    try:
        config, backbone, params = _read(path)
    except OSError as error:
        message = f"it cannot be read: {error.strerror or error}"
        raise UserError(message, argument="path", value=path) from error
    return LoadedBackbone(backbone, {"params": params}, preprocessor(config))


def _read(path: str) -> tuple[ConfigDict, Backbone, Any]:
    """The config of a run, a converted checkpoint or an export, its backbone, and its params."""
    if not checkpoint.has_checkpoint(path):
        if Path(path, PROGRAM).is_file():
            return *_read_program(Path(path)), {}
        loaded = read_export(Path(path))
        return loaded.config, loaded.model.backbone, loaded.network()["backbone"]
    with renamed(workdir="path"):
        loaded = checkpoint.load_model(path)
    params = loaded.network()["backbone"]
    for name, words in bad_values(state_dict_from_params({"backbone": params})).items():
        raise UserError(f"step {loaded.step}: {name}: {words}", argument="path", value=path)
    return loaded.config, loaded.model.backbone, params


def _read_program(folder: Path) -> tuple[ConfigDict, Backbone]:
    """The config of an export to StableHLO, and its program as a backbone."""
    found = read_config(folder)
    if found is None:
        message = f"{PROGRAM} has no config.json beside it"
        raise UserError(message, argument="path", value=str(folder))
    like = create_model(found.config).backbone
    return found.config, load_program(folder, like, found.config.evaluate.size)


def preprocessor(config: ConfigDict) -> Preprocess:
    """The function from images to a backbone's input that `load` returns."""
    center = jax.jit(functools.partial(evaluation_images, config))

    def preprocess(images: Sequence[Any]) -> jax.Array:
        if not isinstance(images, list | tuple) or not images:
            raise UserError("preprocess takes a list of images, also for a single one")
        return center(read_canvases(images, config.data.canvas_size))

    return preprocess


def read_canvases(images: Sequence[Any], canvas_size: int) -> dict[str, np.ndarray]:
    """Images as the loader gives them to a device.

    Args:
      images: at least one; as `preprocess` takes them, or the bytes of files.
      canvas_size: pixels along the side of a canvas.

    Returns:
      "canvas" uint8[b, s, s, 3], each image in its top-left corner; "size" int32[b, 2].

    Raises:
      UserError: one is no image.
    """
    decoded = [_decode(image, canvas_size) for image in images]
    canvas, size = (np.stack(arrays) for arrays in zip(*decoded, strict=True))
    return {"canvas": canvas, "size": size}


def names_of(images: Sequence[Any]) -> list[str]:
    """Names of images, to be shown: of files, those of the files.

    >>> names_of(["cats/tom.jpg", np.zeros((2, 2, 3), np.uint8)])
    ['tom.jpg', 'image 1']
    """
    return [
        os.path.basename(image) if isinstance(image, str | os.PathLike) else f"image {i}"
        for i, image in enumerate(images)
    ]


def _decode(image: Any, canvas_size: int) -> tuple[np.ndarray, np.ndarray]:
    name = "an image"
    if isinstance(image, str | os.PathLike):
        name = os.fspath(image)
        image = _read_bytes(Path(image))
    elif hasattr(image, "getexif"):  # Pillow's; a camera's orientation is kept beside the pixels
        from PIL import ImageOps

        image = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    elif hasattr(image, "__array__"):
        image = np.asarray(image)
    elif not isinstance(image, bytes):
        raise UserError(
            f"a {type(image).__name__} is no image; take a path, a Pillow image or uint8[h, w, 3]"
        )
    try:
        return decode(image, canvas_size)
    except DecodeError as error:
        raise UserError(f"{name} cannot be decoded: {error}") from error


def _read_bytes(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():  # a pipe would wait for ever
            raise UserError(f"{path} cannot be read: it is no file")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
