"""`esvit_jax.load`: a trained backbone in a notebook."""

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from esvit_jax import checkpoint
from esvit_jax.config import ConfigDict
from esvit_jax.data.loader import DecodeError, decode
from esvit_jax.errors import UserError
from esvit_jax.evaluate.features import evaluation_images
from esvit_jax.interop.files import params_from_state_dict, read_tensors, sort_out
from esvit_jax.interop.formats import huggingface
from esvit_jax.interop.infer import check_fit
from esvit_jax.models import create_model

Preprocess = Callable[[Sequence[Any]], jax.Array]


def load(path: str | os.PathLike) -> tuple[Any, dict[str, Any], Preprocess]:
    """A trained backbone, ready for images.

        backbone, variables, preprocess = esvit_jax.load("runs/my_run")
        out = backbone.apply(variables, preprocess(["cat.jpg", "dog.jpg"]))
        out.view_features, out.region_features  # f32[2, d], f32[2, h, w, d]

    Args:
      path: a workdir (its newest checkpoint), a directory of `esvit convert`, or of
        `esvit export` in a format that holds tensors (or the file in it).

    Returns:
      backbone: a Flax module, images f32[b, h, w, 3] -> `models.BackboneOutput`.
      variables: {"params": …}, the teacher's (of a directory converted or exported with
        --key=student, the student's).
      preprocess: a list of images -> f32[b, s, s, 3], normalised: the centre of each, as in the
        run's evaluation. An image is a path, a Pillow image, or uint8[h, w, 3] (or grey, [h, w]).

    Raises:
      UserError: there is no model of ours, or it does not fit its config.json.
    """
    if checkpoint.has_checkpoint(path):
        loaded = checkpoint.load_model(path)
        config, params = loaded.config, loaded.params["backbone"]
    else:
        config, params = _read_export(Path(path))
    return create_model(config).backbone, {"params": params}, preprocessor(config)


def _read_export(path: Path) -> tuple[ConfigDict, Any]:
    """The config and the backbone's params of a folder of `esvit export`."""
    folder = path if path.is_dir() else path.parent
    files = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.pth"))
    file = path if path.is_file() else next(iter(files), None)
    of_huggingface = (folder / huggingface.CONFIG_FILE).exists()
    config_file = huggingface.CONFIG_FILE if of_huggingface else "config.json"
    content = checkpoint.read_config(folder, config_file)
    if content is None or file is None:
        raise UserError(
            f"{path} is no workdir and no converted or exported checkpoint: it has no "
            + ("config.json beside it" if content is None else "checkpoint")
            + "; `esvit convert` takes files of other origin"
        )
    config, facts = content
    tensors = read_tensors(file)
    found = sort_out(huggingface.from_huggingface(tensors) if of_huggingface else tensors)
    try:
        network = found.network(facts.get("key", "teacher"))
        check_fit(found, create_model(config))
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    return config, params_from_state_dict(found.networks[network])["backbone"]


def preprocessor(config: ConfigDict) -> Preprocess:
    """The function from images to a backbone's input that `load` returns."""
    center = jax.jit(functools.partial(evaluation_images, config))

    def preprocess(images: Sequence[Any]) -> jax.Array:
        if not isinstance(images, list | tuple) or not images:
            raise UserError("preprocess takes a list of images, also for a single one")
        decoded = [_decode(image, config.data.canvas_size) for image in images]
        canvas, size = (np.stack(arrays) for arrays in zip(*decoded, strict=True))
        return center({"canvas": canvas, "size": size})

    return preprocess


def _decode(image: Any, canvas_size: int) -> tuple[np.ndarray, np.ndarray]:
    name = "an image"
    if isinstance(image, str | os.PathLike):
        name = os.fspath(image)
        try:
            image = Path(image).read_bytes()
        except OSError as error:
            raise UserError(f"{name} cannot be read: {error.strerror}") from error
    elif hasattr(image, "getexif"):  # Pillow's; a camera's orientation is kept beside the pixels
        from PIL import ImageOps

        image = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    try:
        return decode(image, canvas_size)
    except DecodeError as error:
        raise UserError(f"{name} cannot be decoded: {error}") from error
