"""Folders that `AutoModel` and `AutoImageProcessor` of transformers load."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

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
from transformers import AutoImageProcessor, {model}

model = {model}.from_pretrained("FOLDER"{options})
processor = AutoImageProcessor.from_pretrained("FOLDER")
{snippet}
```

{advice}"""


def _peer(source: Exportable) -> Peer[Any]:
    return peer_or_refuse(source, source.family.transformers, "transformers")


def check(source: Exportable) -> None:
    """Refuses what transformers lacks, and image sizes at which it computes other features."""
    _peer(source)


def usage(source: Exportable) -> str:
    """How to load the folder, and for which images."""
    peer = _peer(source)
    advice = peer.advice.format(sizes=size_ranges(peer.agreeing_sizes(source.backbone)))
    options = "".join(f", {name}={value!r}" for name, value in peer.options.items())
    return USAGE.format(model=peer.model, options=options, snippet=peer.snippet, advice=advice)


def write(source: Exportable, folder: Path) -> None:
    """Writes config.json, model.safetensors and preprocessor_config.json."""
    peer = _peer(source)
    tensors = state_dict_from_params({"backbone": source.params})
    tensors |= source.family.buffer_tensors(source.backbone)  # transformers 4 looks for them
    write_tensors(folder / WEIGHTS_FILE, peer.to_names(tensors))
    _write_json(folder / "config.json", peer.arguments(source.backbone, source.image_size))
    _write_json(folder / "preprocessor_config.json", preprocessor_config(source))


def readings(source: Exportable, folder: Path, images: np.ndarray) -> Iterator[Reading]:
    """Yields the features of our own network and, if it is installed, of transformers."""
    peer = _peer(source)
    params = read_weights(source, folder, peer)
    yield Reading("esvit_jax", source.features(params, images), OWN_BOUND)
    try:
        import torch
        import transformers
        from transformers import AutoModel
    except ImportError:
        return
    reader = f"transformers {transformers.__version__}"
    model, report = AutoModel.from_pretrained(folder, output_loading_info=True, **peer.options)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:
            raise RunError(f"{reader} cannot read the files: {problem} {report[problem]}")
    pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    with torch.no_grad():
        features = peer.view_features(model.eval(), pixels).numpy()
    yield Reading(reader, features, LIBRARY_BOUND)


def preprocessor_config(source: Exportable) -> dict[str, Any]:
    """An image processor that resizes, cuts out the centre and normalises as our evaluation."""
    size = source.image_size
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": source.resize_size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(source.loaded.config.views.mean),
        "image_std": list(source.loaded.config.views.std),
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


# config.json is that of transformers.
FORMAT = Format(
    check=check, write=write, readings=readings, usage=usage, config_file="esvit_config.json"
)
