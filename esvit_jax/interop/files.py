"""Files of PyTorch tensors: read without running what they hold, and sorted into networks."""

import argparse
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from esvit_jax.errors import UserError
from esvit_jax.interop.names import recognise
from esvit_jax.interop.names.base import Family
from esvit_jax.interop.names.published import CENTERS, Tensors
from esvit_jax.models import Backbone

CLASSIFIER = (
    "head.weight", "head.bias", "head.fc.weight", "head.fc.bias", "fc.weight", "fc.bias",
    "classifier.weight", "classifier.bias", "classifier.1.weight", "classifier.1.bias",
)  # fmt: skip
# Entries of a checkpoint that hold tensors which are no part of a network.
TRAINING = ("optimizer", "lr_scheduler", "fp16_scaler", "scaler", "amp")


def read_tensors(path: Path) -> dict[str, Any]:
    """The content of a .safetensors file, or of any other as what `torch.save` wrote.

    Returns:
      As in the file, nested dicts included, with tensors as NumPy arrays; floating-point ones,
      bfloat16 and half among them, are float32. Names of a .safetensors file are not split.

    Raises:
      UserError: there is no such file, it is neither, it would run code when read, or it needs
        torch, which is not installed.
    """
    try:
        if path.is_dir():
            raise _refusal(path, "it is a folder; give the .pth or .safetensors file in it")
        if not path.is_file():
            raise _refusal(path, "there is no such file")
        return _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    except OSError as error:
        raise _refusal(path, f"it cannot be read: {error.strerror or error}") from error


def _refusal(path: Path, message: str) -> UserError:
    return UserError(message, argument="path", value=str(path))


def _read_safetensors(path: Path) -> Tensors:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise _refusal(path, f"it is no whole safetensors file: {error}") from error
    except KeyError as error:  # a type that NumPy lacks
        raise _refusal(path, f"it holds tensors of type {error.args[0]}") from error
    return {name: _as_float32(tensor) for name, tensor in tensors.items()}


def _read_torch(path: Path) -> dict[str, Any]:
    try:
        import torch
    except ImportError as error:
        message = "reading it needs torch: pip install esvit_jax[torch] (.safetensors does not)"
        raise _refusal(path, message) from error

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
    except OSError:
        raise
    except Exception as error:  # torch raises half a dozen kinds for a file that is not one of its
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise _refusal(
                path,
                f"it would run code when read ({found[1]}) and is refused: save it again with "
                "nothing but tensors and plain values in it",
            ) from error
        raise _refusal(path, f"it is no file of torch.save ({type(error).__name__})") from error
    if not isinstance(content, Mapping):
        raise _refusal(path, f"it holds a {type(content).__name__}, not a dict of tensors")
    return to_numpy(content)


def _as_float32(tensor: np.ndarray) -> np.ndarray:
    # NumPy does not count bfloat16 among its floating-point types.
    is_float = np.issubdtype(tensor.dtype, np.floating) or tensor.dtype.name == "bfloat16"
    return tensor.astype(np.float32) if is_float else tensor


class Contents(NamedTuple):
    """What a file holds.

    Attributes:
      networks: "student" and "teacher", or one of them, or "model"; published names.
      backbone_class, family: what the networks are.
      centers: {"view": [k], "region": [k]}, or fewer.
      epoch: epochs trained, where the file says so.
      left_behind: names of what is known and not used.
      unknown: names of tensors that belong to nothing known.
    """

    networks: dict[str, Tensors]
    backbone_class: type[Backbone]
    family: Family[Any]
    centers: Tensors
    epoch: int | None
    left_behind: list[str]
    unknown: list[str]

    def network_name(self, key: str) -> str:
        """The name of the network that stands for "teacher" or "student".

        Raises:
          UserError: there is only the other one.
        """
        name = "model" if "model" in self.networks else key
        if name not in self.networks:
            raise UserError(
                f"the file holds no {key}, only the {', '.join(self.networks)}",
                argument="key", value=key,
            )  # fmt: skip
        return name

    @property
    def has_heads(self) -> bool:
        """Whether these are EsViT's networks, and not backbones alone."""
        return any(
            name.startswith(("head.mlp.", "head.last_layer.", "head_dense."))
            for tensors in self.networks.values()
            for name in tensors
        )


def sort_contents(content: Mapping[str, Any]) -> Contents:
    """Sorts the content of a file (of `read_tensors`) into networks, centers and the rest.

    Raises:
      UserError: there is no network of a known family, or a tensor of one is empty.
    """
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
    losses = _tensors_of("dino_loss", content.pop("dino_loss", {}))
    centers = {
        ours: losses[theirs].reshape(-1) for theirs, ours in CENTERS.items() if theirs in losses
    }
    rest = {f"dino_loss.{name}": x for name, x in losses.items() if name not in CENTERS}
    rest |= {name: x for name, x in content.items() if name not in TRAINING}
    epoch = content.get("epoch")
    left_behind = [name for name in content if name != "epoch"]
    unknown = _tensor_names(rest)
    backbone_class = family = None
    for name, entries in networks.items():
        tensors = _tensors_of(name, entries)
        unknown += [f"{name} {n}" for n in entries if n not in tensors]
        backbone_class, family, networks[name], classifier = _sort_network(tensors)
        left_behind += [f"{name} {n}" for n in classifier]
    assert backbone_class is not None and family is not None
    epoch = epoch if isinstance(epoch, int) else None
    return Contents(networks, backbone_class, family, centers, epoch, left_behind, unknown)


@contextmanager
def naming(file: Path, own: tuple[str, ...]) -> Iterator[None]:
    """Puts a file's name before what is wrong with its content.

    Args:
      file: whose content is judged.
      own: arguments of the caller, whose errors pass as they are.
    """
    try:
        yield
    except UserError as error:
        if error.argument in own:
            raise
        raise UserError(f"{file}: {error}") from error


def _nested(content: Mapping[str, Any]) -> dict[str, Any]:
    """{"student.norm.weight": x} -> {"student": {"norm.weight": x}}."""
    nested: dict[str, Any] = {}
    for name, value in content.items():
        entry, _, rest = name.partition(".")
        nested.setdefault(entry, {})[rest] = value
    return nested


def _tensors_of(name: str, entries: Any) -> Tensors:
    """The tensors in one entry of a file.

    Raises:
      UserError: it is no dict.
    """
    if not isinstance(entries, Mapping):
        raise UserError(f"its entry {name} is a {type(entries).__name__}, not a dict of tensors")
    return {n: x for n, x in entries.items() if isinstance(x, np.ndarray)}


def _sort_network(tensors: Tensors) -> tuple[type[Backbone], Family[Any], Tensors, list[str]]:
    """Class, family, the tensors by published names, and the names of a classifier, left out."""
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): x for name, x in tensors.items()}
    if any(name.startswith("classifier.") for name in tensors):  # of transformers
        tensors = {re.sub(r"^(swin|vit|resnet)\.", "", name): x for name, x in tensors.items()}
    classifier = [name for name in CLASSIFIER if name in tensors]
    tensors = {name: x for name, x in tensors.items() if name not in classifier}
    for name, tensor in tensors.items():
        if not tensor.size:
            raise UserError(f"its tensor {name} of shape {list(tensor.shape)} is empty")
    return *recognise(tensors), classifier


def _tensor_names(content: Mapping[str, Any], prefix: str = "") -> list[str]:
    names = []
    for name, value in content.items():
        if isinstance(value, np.ndarray):
            names.append(f"{prefix}{name}")
        elif isinstance(value, Mapping):
            names += _tensor_names(value, f"{prefix}{name}.")
    return names
