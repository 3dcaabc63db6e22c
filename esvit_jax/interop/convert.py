"""`esvit convert`: a PyTorch checkpoint becomes a directory that commands take for a workdir.

Three kinds are told apart by their names: a published EsViT checkpoint (student, teacher, centers,
or one of the two networks alone), and supervised backbones of their authors, of timm and of
transformers, whose classifier is left behind. Everything else in the file is used exactly once, or
nothing is written.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from esvit_jax import buckets, checkpoint
from esvit_jax.config import ConfigDict
from esvit_jax.errors import UserError, renamed
from esvit_jax.interop.config_beside import config_of
from esvit_jax.interop.files import Contents, naming, read_tensors, sort_contents
from esvit_jax.interop.folders import new_folder
from esvit_jax.interop.infer import check_fit, infer_config
from esvit_jax.interop.names.base import LARGEST_IMAGE
from esvit_jax.interop.names.published import params_from_state_dict
from esvit_jax.models import EsViT, create_model
from esvit_jax.state import zero_centers


def convert(
    source: str | os.PathLike,
    directory: str | os.PathLike,
    *,
    key: str = "teacher",
    window_size: int | None = None,
    image_size: int | None = None,
    report: Callable[[str], None] = lambda message: None,
) -> list[str]:
    """Writes the networks of a PyTorch checkpoint as a directory of `checkpoint.load_model`.

    What shapes do not tell is taken from the config that an export of ours has beside its file.

    Args:
      source: .pth (needs torch) or .safetensors file, local or gs://.
      directory: to be made; whole or not at all.
      key: the network that evaluation, exports and `config.init_from` use, "teacher" or "student".
      window_size: tokens along a side; resizes the bias tables to windows of this size; None keeps
        them.
      image_size: pixels the network was trained with; None takes it from the config beside the
        file, or infers it, see `Family.infer`.
      report: called with what is being done, a line each.

    Returns:
      What was found, assumed and left behind, a line each.

    Raises:
      UserError: the file cannot be read or does not fit (every name and shape that does not, and
        every tensor with `bad_values`, is listed) or is not what the config beside it says, the
        directory cannot be made, or an argument is wrong. Nothing is written then.
    """
    if key not in ("teacher", "student"):
        raise UserError("it must be 'teacher' or 'student'", argument="key", value=key)
    for name, size in (("window_size", window_size), ("image_size", image_size)):
        if size is not None and not 1 <= size <= LARGEST_IMAGE:
            message = f"it must be from 1 to {LARGEST_IMAGE}"
            raise UserError(message, argument=name, value=size)
    with (
        new_folder(directory) as folder, renamed(path="source"),
        buckets.local_copy(source) as file,
    ):  # fmt: skip
        report(f"reading {file}")
        tensors = read_tensors(file)
        told = config_of(source)
        with naming(file, own=("key", "image_size")):
            contents = sort_contents(tensors)
            network = contents.network_name(key)
            config, notes = infer_config(contents, network, image_size, told)
            model = create_model(config)
            check_fit(contents, model)

        networks = {
            name: params_from_state_dict(contents.family.weights(x))
            for name, x in contents.networks.items()
        }
        found = [f"{file.name}: {contents.family.describe(model.backbone)}", *notes]
        if window_size is not None:
            found.append(_resize_windows(networks, contents, model, config, window_size))
        report("writing it as a checkpoint")
        _save(folder, config, contents, networks, model, {"source": file.name, "key": key})
    return found + _remarks(contents, config, network, ours=told is not None)


def _resize_windows(
    networks: dict[str, Any], contents: Contents, model: EsViT, config: ConfigDict, size: int
) -> str:
    """Changes, in place, the networks and the config to another window; returns that in words."""
    old, config.backbone.window_size = config.backbone.window_size, size
    resized = create_model(config).backbone
    for params in networks.values():
        params["backbone"] = contents.family.resized(params["backbone"], model.backbone, resized)
    return f"window {old} resized to {size}"


def _save(
    folder: Path,
    config: ConfigDict,
    contents: Contents,
    networks: dict[str, Any],
    model: EsViT,
    origin: dict[str, Any],
) -> None:
    """Writes the networks; one that the file lacks is the other one."""
    origin["epoch"] = contents.epoch
    chosen = networks[contents.network_name(origin["key"])]
    if contents.has_heads:
        student, teacher = (networks.get(name, chosen) for name in ("student", "teacher"))
        centers = {name: np.asarray(x) for name, x in zero_centers(model).items()}
        centers |= contents.centers
    else:
        origin["parts"] = "backbone"
        student, teacher, centers = None, chosen, None
    checkpoint.save_model(
        folder, config=config, origin=origin, student=student, teacher=teacher, centers=centers
    )


def _remarks(contents: Contents, config: ConfigDict, network: str, *, ours: bool) -> list[str]:
    """What else somebody who converts the file wants to know, a line each."""
    lines = []
    if contents.has_heads:
        head = config.head
        lines.append(
            f"{'view and region heads' if config.loss.region else 'a view head'} of "
            f"{head.num_prototypes} prototypes (hidden {head.hidden_dim}, bottleneck "
            f"{head.bottleneck_dim})"
        )
        if len(contents.networks) == 1:
            lines.append(f"it holds one network ({network}): student and teacher both get it")
        if not contents.centers:
            lines.append("it holds no centers: they are 0")
    else:
        lines.append(
            f"a backbone alone ({network}): good for evaluation, exports and "
            "config.init_parts=backbone"
        )
        if network == "model" and contents.family.supervised_remark and not ours:
            lines.append(contents.family.supervised_remark)
    if contents.left_behind:
        lines.append("left behind: " + ", ".join(contents.left_behind))
    return lines
