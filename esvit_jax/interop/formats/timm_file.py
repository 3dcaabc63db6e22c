"""Folders that timm (1.0) loads: a safetensors file by its names, and its config.json."""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from esvit_jax.errors import RunError
from esvit_jax.interop.config_beside import CONFIG_BESIDE
from esvit_jax.interop.formats.base import (
    LIBRARY_BOUND,
    OWN_BOUND,
    WEIGHTS_FILE,
    Exportable,
    Format,
    Reading,
    importing,
    peer_or_refuse,
    read_weights,
    size_ranges,
    write_json,
    write_tensors,
)
from esvit_jax.interop.names.base import Peer
from esvit_jax.interop.names.published import state_dict_from_params

EPS = "norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),  # as it was trained"
BY_NAME = f"""\
from functools import partial

import timm
import torch

model = timm.create_model(
    "local-dir:FOLDER",
    pretrained=True,
    {EPS}
).eval()
"""
BY_CLASS = f"""\
from functools import partial

import timm
import torch
from safetensors.torch import load_file

model = timm.models.{{model}}(
    {{arguments}},
    num_classes=0,
    {EPS}
).eval()
model.load_state_dict(load_file("FOLDER/{WEIGHTS_FILE}"))
"""
TRANSFORM = """\
Images are prepared, nearly (see below) as in training, by

```python
transform = timm.data.create_transform(
    input_size=(3, {size}, {size}), crop_pct={crop}, interpolation="bicubic",
    mean={mean}, std={std},
)
```"""


def _peer(source: Exportable) -> Peer[Any]:
    return peer_or_refuse(source, source.family.timm, "timm")


def _arguments(source: Exportable) -> dict[str, Any]:
    return _peer(source).arguments(source.backbone, source.image_size)


def check(source: Exportable) -> None:
    """Refuses what timm lacks, and image sizes at which it computes other features."""
    _peer(source)


def usage(source: Exportable) -> str:
    """How to load the folder with timm, and to prepare images."""
    peer, images = _peer(source), image_arguments(source)
    lines = BY_NAME
    if not peer.transformer:
        lines = lines.replace("from functools import partial\n\n", "").replace(f"    {EPS}\n", "")
    if not peer.architecture:
        arguments = ",\n    ".join(f"{name}={value}" for name, value in _arguments(source).items())
        lines = BY_CLASS.format(model=peer.model, arguments=arguments)
    parts = [
        f"```python\n{lines}{peer.snippet}\n```",
        peer.advice.format(sizes=size_ranges(peer.agreeing_sizes(source.backbone))),
        peer.maps(source.backbone),
        TRANSFORM.format(
            size=source.image_size, crop=images["crop_pct"], mean=images["mean"], std=images["std"]
        ),
    ]
    return "\n\n".join(part for part in parts if part)


def image_arguments(source: Exportable) -> dict[str, Any]:
    """The arguments of timm's `create_transform` that come nearest to our evaluation."""
    size, views = source.image_size, source.loaded.config.views
    # timm rounds size / crop_pct down; the share is cut after six digits, so that it cannot fall
    # below the length that is meant.
    crop = math.floor(size / source.resize_size * 1e6) / 1e6
    return {
        "input_size": (3, size, size),
        "crop_pct": crop,
        "interpolation": "bicubic",
        "mean": tuple(views.mean),
        "std": tuple(views.std),
    }


def write(source: Exportable, folder: Path) -> None:
    """Writes model.safetensors and, where timm has an architecture for it, config.json."""
    peer = _peer(source)
    tensors = state_dict_from_params({"backbone": source.params})
    write_tensors(folder / WEIGHTS_FILE, peer.to_names(tensors))
    if peer.architecture:
        content = {
            "architecture": peer.architecture,
            "num_classes": 0,
            "num_features": source.backbone.num_features,
            "model_args": _arguments(source),
            "pretrained_cfg": image_arguments(source) | {"fixed_input_size": peer.transformer},
        }
        write_json(folder / "config.json", content)


def readings(source: Exportable, folder: Path, images: np.ndarray) -> Iterator[Reading]:
    """Yields the features of our own network and of timm."""
    peer = _peer(source)
    params = read_weights(source, folder, peer)
    yield Reading("esvit_jax", source.features(params, images), OWN_BOUND)
    with importing("timm"):
        import timm
        import torch

        model_class = getattr(timm.models, peer.model)
    reader = f"timm {timm.__version__}"
    options = {"norm_layer": partial(torch.nn.LayerNorm, eps=1e-6)} if peer.transformer else {}
    try:
        if peer.architecture:
            model = timm.create_model(f"local-dir:{folder}", pretrained=True, **options)
        else:
            model = model_class(**_arguments(source), num_classes=0, **options)
            tensors = load_file(folder / WEIGHTS_FILE)
            model.load_state_dict({name: torch.from_numpy(x) for name, x in tensors.items()})
    except RuntimeError as error:
        raise RunError(f"{reader} cannot read the files: {error}") from error
    pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    with torch.no_grad():
        features = peer.view_features(model.eval(), pixels).numpy()
    yield Reading(reader, features, LIBRARY_BOUND)


def pixels(source: Exportable, folder: Path, photos: Sequence[np.ndarray]) -> np.ndarray:
    """What timm's transform makes of photos."""
    with importing("timm"):
        import timm
        from PIL import Image

        transform = timm.data.create_transform(**image_arguments(source))
    found = [np.asarray(transform(Image.fromarray(photo)), np.float32) for photo in photos]
    return np.stack(found).transpose(0, 2, 3, 1)


# config.json is that of timm.
FORMAT = Format(
    check=check, write=write, readings=readings, usage=usage, library="timm", pixels=pixels,
    config_file=CONFIG_BESIDE,
)  # fmt: skip
