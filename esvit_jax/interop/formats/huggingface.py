"""Folders that `transformers.SwinModel` and `AutoImageProcessor` load.

SwinModel derives windows and shifts from the image at hand: where a map's shorter side is no
longer than the window, the window is clipped to it and nothing is shifted. Ours are fixed by the
size that the backbone was trained at. Both pad maps alike (zeros at the bottom and the right,
after the norm, not masked) and merge patches alike, so the features agree exactly where the two
rules give the same windows and shifts in every stage:

- Stages with a shift need maps with a shorter side longer than the window, stages without one
  maps with a shorter side of just the window. For a window of 7 and 224-px training that is the
  shorter side of the image from 193 to 224 pixels, whatever the longer one. Beyond, SwinModel
  shifts windows of the last stage too; below, its bias tables do not fit the clipped windows and
  it stops with an error.
- SwinModel's bias tables have the same window in every stage. A backbone whose last stage has a
  smaller one (window 14 at 224 px: 7) agrees at no size and is refused.

Two norms, after patch embedding and in patch merging, have an eps of 1e-5 there that no config
changes, instead of 1e-6. For that, features of photos differ by 1e-5 to 2e-5 of their length
(measured on random networks; 4e-5 for an image of one flat grey).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from esvit_jax.errors import UserError
from esvit_jax.interop.files import params_from_state_dict, state_dict_from_params
from esvit_jax.interop.formats.base import (
    LIBRARY_BOUND,
    OWN_BOUND,
    Exportable,
    Reading,
    in_words,
    map_size,
    position_indices,
    refuse_size,
    write_tensors,
)
from esvit_jax.models import Swin

CONFIG_FILE = "esvit_config.json"  # ours; config.json is that of transformers

# The names that transformers 4 uses; transformers 5 renames them when it reads them.
STARTS = {
    "patch_embed.proj.": "embeddings.patch_embeddings.projection.",
    "patch_embed.norm.": "embeddings.norm.",
    "layers.": "encoder.layers.",
    "norm.": "layernorm.",
}
BLOCK_PARTS = {
    ".norm1.": ".layernorm_before.",
    ".norm2.": ".layernorm_after.",
    ".attn.relative_position": ".attention.self.relative_position",
    ".attn.proj.": ".attention.output.dense.",
    ".mlp.fc1.": ".intermediate.dense.",
    ".mlp.fc2.": ".output.dense.",
}
QKV = ("query", "key", "value")

USAGE = """\
```python
from transformers import AutoImageProcessor, SwinModel

model = SwinModel.from_pretrained("FOLDER")
processor = AutoImageProcessor.from_pretrained("FOLDER")
out = model(**processor(images, return_tensors="pt"))
out.pooler_output      # view features [b, d]
out.last_hidden_state  # region features [b, h * w, d]
```

SwinModel takes windows and shifts from the image at hand; those of this backbone are fixed. Its
features agree with the ones measured in training for images whose shorter side has {sizes}
(the longer side is free), and are others, or an error, for all else. Use a new SwinModel after an
image of another size: it keeps the windows of the smallest that it has seen."""


def usage(source: Exportable) -> str:
    """How to load the folder, and for which images."""
    return USAGE.format(sizes=in_words(agreeing_sizes(source.backbone)))


def agreeing_sizes(backbone: Swin) -> list[int]:
    """The shorter sides of images, in pixels, at which SwinModel computes what `backbone` does.

    Up to twice the size that the backbone was trained at; where that is among them, all larger
    ones agree as well.
    """
    window = backbone.window_size

    def windows_agree(size: int) -> bool:
        for stage in range(len(backbone.depths)):
            side = map_size(backbone, size, stage)
            theirs = (side, 0) if side <= window else (window, window // 2)
            if theirs != backbone.stage_window(stage) or theirs[0] != window:
                return False
        return True

    return [size for size in range(1, 2 * backbone.image_size + 1) if windows_agree(size)]


def check(source: Exportable) -> None:
    """Refuses what SwinModel cannot compute.

    Raises:
      UserError: at this image size its windows differ from the backbone's.
    """
    windows = [source.backbone.stage_window(i)[0] for i in range(len(source.backbone.depths))]
    refuse_size(
        source.image_size, agreeing_sizes(source.backbone), "transformers' SwinModel",
        f"it has one window in all stages and takes shifts from the image; here they are {windows} "
        f"and fixed for {source.backbone.image_size} pixels",
    )  # fmt: skip


def write(source: Exportable, folder: Path) -> None:
    """Writes config.json, model.safetensors and preprocessor_config.json."""
    tensors = state_dict_from_params({"backbone": source.params})
    tensors |= position_indices(source.backbone)  # transformers 4 looks for them
    write_tensors(folder / "model.safetensors", to_huggingface(tensors))
    _write_json(folder / "config.json", model_config(source))
    _write_json(folder / "preprocessor_config.json", preprocessor_config(source))


def read_params(folder: Path) -> Any:
    """The backbone's params in a folder of `write`."""
    tensors = from_huggingface(load_file(folder / "model.safetensors"))
    return params_from_state_dict(tensors)["backbone"]


def readings(source: Exportable, folder: Path, images: Any) -> Iterator[Reading]:
    """Yields the features of our own network and, if it is installed, of SwinModel.

    Raises:
      UserError: SwinModel misses tensors in the folder, or does not know some.
    """
    yield Reading("esvit_jax", source.features(read_params(folder), images), OWN_BOUND)
    try:
        import torch
        import transformers
        from transformers import SwinModel
    except ImportError:
        return
    reader = f"transformers {transformers.__version__}"
    model, report = SwinModel.from_pretrained(folder, output_loading_info=True)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:
            raise UserError(f"nothing is written: {reader}: {problem} {report[problem]}")
    pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    with torch.no_grad():
        features = model.eval()(pixels).pooler_output.numpy()
    yield Reading(reader, features, LIBRARY_BOUND)


def model_config(source: Exportable) -> dict[str, Any]:
    """A `transformers.SwinConfig` as JSON holds it."""
    backbone = source.backbone
    return {
        "architectures": ["SwinModel"],
        "model_type": "swin",
        "image_size": source.image_size,
        "patch_size": backbone.patch_size,
        "num_channels": 3,
        "embed_dim": backbone.embed_dim,
        "depths": list(backbone.depths),
        "num_heads": list(backbone.num_heads),
        "window_size": backbone.window_size,
        "mlp_ratio": backbone.mlp_ratio,
        "qkv_bias": True,
        "hidden_act": "gelu",
        "drop_path_rate": backbone.drop_path_rate,
        "layer_norm_eps": 1e-6,
        "use_absolute_embeddings": False,
        "torch_dtype": "float32",
    }


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


def to_huggingface(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A backbone's tensors by transformers' names; qkv becomes query, key and value."""
    renamed = {}
    for name, tensor in tensors.items():
        name = _rename(name, STARTS, BLOCK_PARTS)
        if ".attn.qkv." in name:
            for part, piece in zip(QKV, np.split(tensor, 3), strict=True):
                renamed[name.replace(".attn.qkv.", f".attention.self.{part}.")] = piece
        else:
            renamed[name] = tensor
    return renamed


def from_huggingface(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of `to_huggingface`."""
    starts, parts = ({new: old for old, new in table.items()} for table in (STARTS, BLOCK_PARTS))
    renamed = {}
    for name, tensor in tensors.items():
        if ".self.key." in name or ".self.value." in name:
            continue  # joined to their query
        if ".self.query." in name:
            tensor = np.concatenate([tensors[name.replace(".query.", f".{p}.")] for p in QKV])
            name = name.replace(".attention.self.query.", ".attn.qkv.")
        renamed[_rename(name, starts, parts)] = tensor
    return renamed


def _rename(name: str, starts: dict[str, str], parts: dict[str, str]) -> str:
    for old, new in starts.items():
        if name.startswith(old):
            name = new + name.removeprefix(old)
            break
    for old, new in parts.items():
        if ".blocks." in name and old in name:
            return name.replace(old, new)
    return name


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
