"""Folders that `AutoModel` and `AutoImageProcessor` of transformers load.

Of transformers' image processors none gives the pixels of our evaluation: they have no canvas, cut
the centre out at the lower of two middles where ours takes the even one (torchvision's rule), and
round to whole levels after the resize. BitImageProcessor is the nearest; the card says how far its
features are off, and gives lines that make it agree.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

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

USAGE = """\
```python
from transformers import AutoImageProcessor, {model}

model = {model}.from_pretrained("FOLDER"{options})
processor = AutoImageProcessor.from_pretrained("FOLDER")
{snippet}
```

{advice}"""

EXACTLY = """\
`processor` comes near to how images were prepared in training (see below). This is how, for a
Pillow image:

```python
import cv2
import numpy as np

def pixel_values(image):
    image = np.asarray(image.convert("RGB"))
    scale = {canvas} / max(image.shape[:2])
    if scale < 1:
        width_height = [max(1, round(side * scale)) for side in image.shape[1::-1]]
        image = cv2.resize(image, width_height, interpolation=cv2.INTER_AREA)
    image = image.astype(np.float32)  # so that nothing is rounded, where torchvision is installed
    pixels = processor(
        image, do_center_crop=False, input_data_format="channels_last", return_tensors="pt"
    ).pixel_values
    top, left = (round((side - {size}) / 2) for side in pixels.shape[-2:])
    return pixels[..., top : top + {size}, left : left + {size}]
```"""


def _peer(source: Exportable) -> Peer[Any]:
    return peer_or_refuse(source, source.family.transformers, "transformers")


def check(source: Exportable) -> None:
    """Refuses what transformers lacks, and image sizes at which it computes other features."""
    _peer(source)


def usage(source: Exportable) -> str:
    """How to load the folder, and for which images."""
    peer, size = _peer(source), source.image_size
    advice = peer.advice.format(sizes=size_ranges(peer.agreeing_sizes(source.backbone)))
    options = "".join(f", {name}={value!r}" for name, value in peer.options.items())
    parts = [
        USAGE.format(model=peer.model, options=options, snippet=peer.snippet, advice=advice),
        peer.maps(source.backbone),
        EXACTLY.format(canvas=source.loaded.config.data.canvas_size, size=size),
    ]
    return "\n\n".join(part for part in parts if part)


def write(source: Exportable, folder: Path) -> None:
    """Writes config.json, model.safetensors and preprocessor_config.json."""
    peer = _peer(source)
    tensors = state_dict_from_params({"backbone": source.params})
    tensors |= source.family.buffer_tensors(source.backbone)  # transformers 4 looks for them
    write_tensors(folder / WEIGHTS_FILE, peer.to_names(tensors))
    write_json(folder / "config.json", peer.arguments(source.backbone, source.image_size))
    write_json(folder / "preprocessor_config.json", preprocessor_config(source))


def readings(source: Exportable, folder: Path, images: np.ndarray) -> Iterator[Reading]:
    """Yields the features of our own network and of transformers."""
    peer = _peer(source)
    params = read_weights(source, folder, peer)
    yield Reading("esvit_jax", source.features(params, images), OWN_BOUND)
    with importing("transformers"):
        import torch
        import transformers

        model_class = getattr(transformers, peer.model)
    reader = f"transformers {transformers.__version__}"
    try:
        model, report = model_class.from_pretrained(
            folder, output_loading_info=True, **peer.options
        )
    except RuntimeError as error:
        raise RunError(f"{reader} cannot read the files: {error}") from error
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


def pixels(source: Exportable, folder: Path, photos: Sequence[np.ndarray]) -> np.ndarray:
    """What the image processor makes of photos."""
    with importing("transformers"):  # which imports much of itself, and torch, only when it works
        from PIL import Image
        from transformers import AutoImageProcessor

        processor = AutoImageProcessor.from_pretrained(folder)
        images = [Image.fromarray(photo) for photo in photos]
        found = processor(images, return_tensors="np")["pixel_values"]
    return np.asarray(found, np.float32).transpose(0, 2, 3, 1)


# config.json is that of transformers.
FORMAT = Format(
    check=check, write=write, readings=readings, usage=usage, library="transformers",
    pixels=pixels, config_file=CONFIG_BESIDE,
)  # fmt: skip
