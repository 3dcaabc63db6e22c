"""Params to the names and shapes of the published PyTorch checkpoints, and back: mechanically."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util

# Tensors of one network by their names in a PyTorch state dict.
Tensors = dict[str, np.ndarray]

HEADS = {"head": "view_head", "head_dense": "region_head"}
CENTERS = {"center": "view", "center_grid": "region"}


def params_from_state_dict(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Params {"backbone", "view_head", "region_head"} (the parts there are) of a state dict.

    Names map mechanically: numbers join what they follow (layers.0 -> layers_0), weights of
    linears and convolutions become kernels with the output features last, weights of norms
    become scales. Buffers are to be left out (`Family.buffers`).
    """
    flat = {}
    for name, tensor in tensors.items():
        *path, leaf = re.sub(r"\.(\d+)", r"_\1", name).split(".")
        path = [HEADS[path[0]], *path[1:]] if path and path[0] in HEADS else ["backbone", *path]
        if leaf == "weight":
            leaf = "scale" if tensor.ndim == 1 else "kernel"
            tensor = _kernel_from_weight(tensor)
        flat[(*path, leaf)] = np.asarray(tensor)
    return traverse_util.unflatten_dict(flat)


def state_dict_from_params(params: Mapping[str, Any]) -> Tensors:
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
