"""Checkpoints with the names of the public PyTorch implementation, for its own scripts.

A dict {"student", "teacher", "dino_loss": {"center", "center_grid"}, "epoch"}: backbones with both
heads and the buffers of relative positions, the student's names behind "module.". It has no
optimiser state, so the public code evaluates it, or starts training from it, but does not resume.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from esvit_jax.interop.files import read_tensors, sort_contents
from esvit_jax.interop.formats.base import (
    OWN_BOUND,
    CannotCheck,
    Exportable,
    Format,
    Reading,
    importing,
    write_tensors,
)
from esvit_jax.interop.names.published import (
    CENTERS,
    Tensors,
    params_from_state_dict,
    state_dict_from_params,
)

FILE = "checkpoint.safetensors"  # {"teacher": {name: x}} is "teacher.name" there
PTH_FILE = "checkpoint.pth"

USAGE = """\
`checkpoint.pth` goes to the public code as it is (`--pretrained_weights`); it is written where
torch is installed. `checkpoint.safetensors` holds the same tensors, with the keys of the dict in
front of their names. `esvit convert` reads both, and

```python
import esvit_jax

backbone, variables, preprocess = esvit_jax.load("FOLDER")
features = backbone.apply(variables, preprocess(images)).view_features  # [b, d]
```"""


def usage(source: Exportable) -> str:
    """How to read the files."""
    return USAGE


def check(source: Exportable) -> None:
    """Anything that is trained here has published names."""


def write(source: Exportable, folder: Path) -> None:
    """Writes checkpoint.safetensors and, where torch is installed, checkpoint.pth."""
    content = published_content(source)
    flat = {f"{key}.{name}": x for key, part in content.items() for name, x in part.items()}
    write_tensors(folder / FILE, flat)
    try:
        with importing("torch"):
            import torch
    except CannotCheck:
        return
    tensors = jax.tree.map(lambda x: torch.from_numpy(np.array(x)), content)
    torch.save(tensors | {"epoch": epochs(source)}, folder / PTH_FILE)


def published_content(source: Exportable) -> dict[str, Tensors]:
    """{"student", "teacher", "dino_loss"}, or the one backbone that there is."""
    loaded = source.loaded
    networks = {"student": loaded.student, "teacher": loaded.teacher}
    if loaded.origin.get("parts") == "backbone":
        networks = {source.key: networks[source.key]}
    networks = {name: params for name, params in networks.items() if params is not None}
    content = {
        name: source.family.file_names(
            state_dict_from_params(params) | source.family.buffer_tensors(source.backbone)
        )
        for name, params in networks.items()
    }
    if "student" in content:
        content["student"] = {f"module.{name}": x for name, x in content["student"].items()}
    if loaded.centers:
        content["dino_loss"] = {
            theirs: np.asarray(loaded.centers[ours])[None]
            for theirs, ours in CENTERS.items()
            if ours in loaded.centers
        }
    return content


def epochs(source: Exportable) -> int:
    """Whole epochs of training behind the checkpoint, as far as is known."""
    origin = source.loaded.origin
    if "steps_per_epoch" in origin:
        return source.loaded.step // origin["steps_per_epoch"]
    return origin.get("epoch") or 0


def read_params(file: Path, key: str) -> Any:
    """The backbone's params of one network in one of the two files."""
    contents = sort_contents(read_tensors(file))
    tensors = contents.family.weights(contents.networks[key])
    return params_from_state_dict(tensors)["backbone"]


def readings(source: Exportable, folder: Path, images: np.ndarray) -> Iterator[Reading]:
    """Yields the features of our own network from each file."""
    for file in (folder / FILE, folder / PTH_FILE):
        if file.suffix == ".pth":
            with importing("torch"):
                import torch  # noqa: F401 - without which that file was not written
        features = source.features(read_params(file, source.key), images)
        yield Reading(f"esvit_jax from {file.name}", features, OWN_BOUND)


FORMAT = Format(check=check, write=write, readings=readings, usage=usage, library="esvit_jax")
