"""Files of PyTorch tensors, sorted into networks, and published state dicts to params and back."""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from esvit_jax.errors import UserError

HEADS = {"head": "view_head", "head_dense": "region_head"}
BUFFERS = ("relative_position_index", "attn_mask")
CENTERS = {"center": "view", "center_grid": "region"}
CLASSIFIER = ("head.weight", "head.bias", "head.fc.weight", "head.fc.bias")
# Entries of a checkpoint that hold tensors which are no part of a network.
TRAINING = ("optimizer", "lr_scheduler", "fp16_scaler", "scaler", "amp")

Tensors = dict[str, np.ndarray]


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
            return {str(key): to_numpy(entry) for key, entry in value.items()}
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


class Found(NamedTuple):
    """What a file holds.

    Attributes:
      networks: "student" and "teacher", or one of them, or "model"; EsViT's names.
      centers: {"view": [k], "region": [k]}, or fewer.
      epoch: epochs trained, where the file says so.
      left: what is left behind, in words.
      unknown: names of tensors that belong to nothing known.
    """

    networks: dict[str, Tensors]
    centers: Tensors
    epoch: int | None
    left: list[str]
    unknown: list[str]

    def network(self, key: str) -> str:
        """The name of the network that stands for "teacher" or "student".

        Raises:
          UserError: there is only the other one.
        """
        name = "model" if "model" in self.networks else key
        if name not in self.networks:
            raise UserError(f"it holds no {key}, only the {', '.join(self.networks)}")
        return name

    @property
    def has_heads(self) -> bool:
        """Whether these are EsViT's networks, and not backbones alone."""
        return any(
            name.startswith(("head.mlp.", "head.last_layer.", "head_dense."))
            for tensors in self.networks.values()
            for name in tensors
        )


def sort_out(content: Mapping[str, Any]) -> Found:
    """Sorts the content of a file (of `read_tensors`) into networks, centers and the rest."""
    content = dict(content)
    if any(name.startswith(("student.", "teacher.")) for name in content):
        content = _nested(content)
    networks = {name: content.pop(name) for name in ("student", "teacher") if name in content}
    if not networks:
        wrappers = [name for name in ("model", "state_dict") if name in content]
        if wrappers:
            networks = {"model": content.pop(wrappers[0])}
        else:
            networks, content = {"model": content}, {}
    losses = content.pop("dino_loss", {})
    centers = {
        ours: losses[theirs].reshape(-1) for theirs, ours in CENTERS.items() if theirs in losses
    }
    rest = {f"dino_loss.{name}": x for name, x in losses.items() if name not in CENTERS}
    rest |= {name: x for name, x in content.items() if name not in TRAINING}
    epoch = content.get("epoch")
    left = [name for name in content if name != "epoch"]
    unknown = _tensor_names(rest)
    for name, entries in networks.items():
        tensors = {n: x for n, x in entries.items() if isinstance(x, np.ndarray)}
        unknown += [f"{name} {n}" for n in entries if n not in tensors]
        networks[name], classifier = _published_names(tensors)
        left += [f"{name} {n}" for n in classifier]
    return Found(networks, centers, epoch if isinstance(epoch, int) else None, left, unknown)


def _nested(content: Mapping[str, Any]) -> dict[str, Any]:
    """{"student.norm.weight": x} -> {"student": {"norm.weight": x}}."""
    nested: dict[str, Any] = {}
    for name, value in content.items():
        entry, _, rest = name.partition(".")
        nested.setdefault(entry, {})[rest] = value
    return nested


def _published_names(tensors: Tensors) -> tuple[Tensors, list[str]]:
    """A network's tensors by EsViT's names, and the names of its classifier, which is left out."""
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): x for name, x in tensors.items()}
    classifier = [name for name in CLASSIFIER if name in tensors]
    tensors = {name: x for name, x in tensors.items() if name not in classifier}
    # timm (since 0.9) has the merging of patches at the start of a stage, not at its end.
    last = max([int(n) for n in re.findall(r"^layers\.(\d+)", "\n".join(tensors), re.M)], default=0)
    if any(name.startswith(f"layers.{last}.downsample.") for name in tensors):

        def before(match: re.Match) -> str:
            return f"layers.{int(match[1]) - 1}.downsample."

        tensors = {
            re.sub(r"^layers\.(\d+)\.downsample\.", before, name): x for name, x in tensors.items()
        }
    return tensors, classifier


def _tensor_names(content: Mapping[str, Any], prefix: str = "") -> list[str]:
    names = []
    for name, value in content.items():
        if isinstance(value, np.ndarray):
            names.append(f"{prefix}{name}")
        elif isinstance(value, Mapping):
            names += _tensor_names(value, f"{prefix}{name}.")
    return names
