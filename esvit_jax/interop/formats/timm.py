"""A safetensors file with the names and shapes of timm's `SwinTransformer` (1.0).

timm clips a window to the map, as we do, and builds masks and bias tables for one image size. It
rolls a map before padding it, we pad first: the features agree at sizes where shifted maps are a
multiple of the window, such as 224 (221 to 224) for windows of 7 and 14.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from esvit_jax.interop.files import params_from_state_dict, state_dict_from_params
from esvit_jax.interop.formats.base import (
    LIBRARY_BOUND,
    OWN_BOUND,
    Exportable,
    Reading,
    map_size,
    refuse_size,
    write_tensors,
)
from esvit_jax.models import Swin

USAGE = """\
```python
from functools import partial

import timm
import torch
from safetensors.torch import load_file

model = timm.models.SwinTransformer(
    {arguments},
    num_classes=0,
    norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),  # timm's own is 1e-5
).eval()
model.load_state_dict(load_file("FOLDER/model.safetensors"))
model(images)                   # view features [b, d], images [b, 3, h, w]
model.forward_features(images)  # region features [b, h, w, d]
```

timm takes windows and shifts from `img_size`; another size gives other features."""


def usage(source: Exportable) -> str:
    """How to load the file with timm."""
    arguments = ",\n    ".join(f"{name}={value}" for name, value in arguments_of(source).items())
    return USAGE.format(arguments=arguments)


def arguments_of(source: Exportable) -> dict[str, Any]:
    """The arguments of timm's SwinTransformer that describe the backbone."""
    backbone = source.backbone
    return {
        "img_size": source.image_size,
        "patch_size": backbone.patch_size,
        "embed_dim": backbone.embed_dim,
        "depths": tuple(backbone.depths),
        "num_heads": tuple(backbone.num_heads),
        "window_size": backbone.window_size,
        "mlp_ratio": backbone.mlp_ratio,
        "drop_path_rate": backbone.drop_path_rate,
    }


def agreeing_sizes(backbone: Swin) -> list[int]:
    """The sizes, in pixels, at which timm computes what `backbone` does, up to twice its own."""
    window = backbone.window_size

    def windows_agree(size: int) -> bool:
        for stage in range(len(backbone.depths)):
            side = map_size(backbone, size, stage)
            theirs = (side, 0) if side <= window else (window, window // 2)
            padded = theirs[1] > 0 and side % window
            if theirs != backbone.stage_window(stage) or padded:
                return False
        return True

    return [size for size in range(1, 2 * backbone.image_size + 1) if windows_agree(size)]


def check(source: Exportable) -> None:
    """Refuses sizes at which timm's windows, or the padding of shifted maps, differ.

    Raises:
      UserError: as said.
    """
    refuse_size(
        source.image_size, agreeing_sizes(source.backbone), "timm",
        "it takes windows and shifts from this size, and pads shifted maps after the shift",
    )  # fmt: skip


def write(source: Exportable, folder: Path) -> None:
    """Writes model.safetensors."""
    tensors = state_dict_from_params({"backbone": source.params})
    write_tensors(folder / "model.safetensors", to_timm(tensors))


def read_params(folder: Path) -> Any:
    """The backbone's params in a folder of `write`."""
    tensors = from_timm(load_file(folder / "model.safetensors"))
    return params_from_state_dict(tensors)["backbone"]


def readings(source: Exportable, folder: Path, images: Any) -> Iterator[Reading]:
    """Yields the features of our own network and, if it is installed, of timm.

    Raises:
      RuntimeError: timm misses tensors in the file, or they are unknown or of another shape.
    """
    yield Reading("esvit_jax", source.features(read_params(folder), images), OWN_BOUND)
    try:
        import timm
        import torch
    except ImportError:
        return
    norm = partial(torch.nn.LayerNorm, eps=1e-6)
    model = timm.models.SwinTransformer(**arguments_of(source), num_classes=0, norm_layer=norm)
    tensors = load_file(folder / "model.safetensors")
    model.load_state_dict({name: torch.from_numpy(x) for name, x in tensors.items()})
    pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    with torch.no_grad():
        features = model.eval()(pixels).numpy()
    yield Reading(f"timm {timm.__version__}", features, LIBRARY_BOUND)


def to_timm(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A backbone's tensors by timm's names: the merging of patches belongs to the stage after."""
    return {_move_merging(name, 1): tensor for name, tensor in tensors.items()}


def from_timm(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of `to_timm`."""
    return {_move_merging(name, -1): tensor for name, tensor in tensors.items()}


def _move_merging(name: str, stages: int) -> str:
    match name.split("."):
        case ["layers", stage, "downsample", *rest]:
            return ".".join(["layers", str(int(stage) + stages), "downsample", *rest])
    return name
