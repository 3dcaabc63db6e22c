"""Files of PyTorch tensors, and published state dicts to params and back."""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from esvit_jax.config import UserError

HEADS = {"head": "view_head", "head_dense": "region_head"}
BUFFERS = ("relative_position_index", "attn_mask")


def params_from_state_dict(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Params {"backbone", "view_head", "region_head"} (the parts there are) of a state dict.

    Names map mechanically: numbers join what they follow (layers.0 -> layers_0), weights of
    linears and convolutions become kernels with the output features last, weights of norms
    become scales. Buffers are dropped.
    """
    flat = {}
    for name, tensor in tensors.items():
        if name.rsplit(".", 1)[-1] in BUFFERS:
            continue
        *path, leaf = re.sub(r"\.(\d+)", r"_\1", name).split(".")
        path = [HEADS[path[0]], *path[1:]] if path and path[0] in HEADS else ["backbone", *path]
        if leaf == "weight":
            leaf = "scale" if tensor.ndim == 1 else "kernel"
            tensor = _kernel_from_weight(tensor)
        flat[(*path, leaf)] = np.asarray(tensor)
    return traverse_util.unflatten_dict(flat)


def state_dict_from_params(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inverse of `params_from_state_dict`; buffers are not made up."""
    heads = {ours: theirs for theirs, ours in HEADS.items()}
    tensors = {}
    for (part, *path, leaf), value in traverse_util.flatten_dict(dict(params)).items():
        value = np.asarray(value)
        if leaf == "kernel":
            value = _weight_from_kernel(value)
        leaf = {"kernel": "weight", "scale": "weight"}.get(leaf, leaf)
        prefix = [] if part == "backbone" else [heads[part]]
        tensors[re.sub(r"_(\d+)", r".\1", ".".join([*prefix, *path, leaf]))] = value
    return tensors


def _kernel_from_weight(weight: np.ndarray) -> np.ndarray:
    if weight.ndim == 4:
        return weight.transpose(2, 3, 1, 0)
    return weight.T


def _weight_from_kernel(kernel: np.ndarray) -> np.ndarray:
    if kernel.ndim == 4:
        return kernel.transpose(3, 2, 0, 1)
    return kernel.T


def read_tensors(path: Path) -> dict[str, Any]:
    """The content of a .safetensors file, or of any other as what `torch.save` wrote.

    Returns:
      As in the file, nested dicts included, with tensors as NumPy arrays; floating-point ones,
      bfloat16 and half among them, are float32. Names of a .safetensors file are not split.

    Raises:
      UserError: there is no such file, it is neither, it would run code when read, or it needs
        torch, which is not installed.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    return _read_torch(path)


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is no safetensors file: {error}") from error
    return {name: _as_float32(tensor) for name, tensor in tensors.items()}


def _read_torch(path: Path) -> dict[str, Any]:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path}: reading it needs torch: pip install esvit_jax[torch] (.safetensors does not)"
        ) from error

    def to_numpy(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            value = value.detach()
            return (value.to(torch.float32) if value.is_floating_point() else value).numpy()
        if isinstance(value, Mapping):
            return {key: to_numpy(entry) for key, entry in value.items()}
        return value

    try:
        # The published files keep their command line in a Namespace, which only holds values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for a file that is not one of its
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise UserError(
                f"{path} would run code when read ({found[1]}) and is refused: save it again with "
                "nothing but tensors and plain values in it"
            ) from error
        raise UserError(f"{path} is no file of torch.save ({type(error).__name__})") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dict of tensors")
    return to_numpy(content)


def _as_float32(tensor: np.ndarray) -> np.ndarray:
    # NumPy does not count bfloat16 among its floating-point types.
    is_float = np.issubdtype(tensor.dtype, np.floating) or tensor.dtype.name == "bfloat16"
    return tensor.astype(np.float32) if is_float else tensor
