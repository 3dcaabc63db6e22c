"""A safetensors file with the names and shapes of a model of timm (1.0)."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from esvit_jax.errors import RunError
from esvit_jax.interop.formats.base import (
    LIBRARY_BOUND,
    OWN_BOUND,
    WEIGHTS_FILE,
    Exportable,
    Format,
    Reading,
    peer_or_refuse,
    read_weights,
    size_ranges,
    write_tensors,
)
from esvit_jax.interop.names.base import Peer
from esvit_jax.interop.names.published import state_dict_from_params

USAGE = """\
```python
from functools import partial

import timm
import torch
from safetensors.torch import load_file

model = timm.models.{model}(
    {arguments},
    num_classes=0,
    norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),  # as it was trained
).eval()
model.load_state_dict(load_file("FOLDER/model.safetensors"))
{snippet}
```

{advice}"""


def _peer(source: Exportable) -> Peer[Any]:
    return peer_or_refuse(source, source.family.timm, "timm")


def _arguments(source: Exportable) -> dict[str, Any]:
    return _peer(source).arguments(source.backbone, source.image_size)


def check(source: Exportable) -> None:
    """Refuses what timm lacks, and image sizes at which it computes other features."""
    _peer(source)


def usage(source: Exportable) -> str:
    """How to load the file with timm."""
    peer = _peer(source)
    arguments = ",\n    ".join(f"{name}={value}" for name, value in _arguments(source).items())
    advice = peer.advice.format(sizes=size_ranges(peer.agreeing_sizes(source.backbone)))
    return USAGE.format(model=peer.model, arguments=arguments, snippet=peer.snippet, advice=advice)


def write(source: Exportable, folder: Path) -> None:
    """Writes model.safetensors."""
    tensors = state_dict_from_params({"backbone": source.params})
    write_tensors(folder / WEIGHTS_FILE, _peer(source).to_names(tensors))


def readings(source: Exportable, folder: Path, images: np.ndarray) -> Iterator[Reading]:
    """Yields the features of our own network and, if it is installed, of timm."""
    peer = _peer(source)
    params = read_weights(source, folder, peer)
    yield Reading("esvit_jax", source.features(params, images), OWN_BOUND)
    try:
        import timm
        import torch
    except ImportError:
        return
    reader = f"timm {timm.__version__}"
    norm = partial(torch.nn.LayerNorm, eps=1e-6)
    model_class = getattr(timm.models, peer.model)
    model = model_class(**_arguments(source), num_classes=0, norm_layer=norm)
    tensors = load_file(folder / WEIGHTS_FILE)
    try:
        model.load_state_dict({name: torch.from_numpy(x) for name, x in tensors.items()})
    except RuntimeError as error:
        raise RunError(f"{reader} cannot read the files: {error}") from error
    pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    with torch.no_grad():
        features = peer.view_features(model.eval(), pixels).numpy()
    yield Reading(reader, features, LIBRARY_BOUND)


FORMAT = Format(check=check, write=write, readings=readings, usage=usage)
