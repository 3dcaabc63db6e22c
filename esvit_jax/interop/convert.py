"""`esvit convert`: a PyTorch checkpoint becomes a directory that commands take for a workdir.

Three kinds are told apart by their names: a published EsViT checkpoint (student, teacher, centers,
or one of the two networks alone), and the supervised Swin of Microsoft and of timm, whose
classifier is left behind. Everything else in the file is used exactly once, or nothing is written.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from esvit_jax import checkpoint
from esvit_jax.config import ConfigDict
from esvit_jax.errors import UserError
from esvit_jax.interop.files import (
    Found,
    params_from_state_dict,
    read_tensors,
    sort_out,
)
from esvit_jax.interop.infer import check_fit, in_words, infer_config
from esvit_jax.models import create_model
from esvit_jax.state import zero_centers


def resize_bias_table(
    table: Float[np.ndarray, "rows heads"], window_size: int
) -> Float[np.ndarray, "new_rows heads"]:
    """A table [(2w-1)², heads] for another window, as Swin does it for fine-tuning.

    Bicubic (Keys' kernel with a = -0.75) over the map of relative positions, corners not aligned,
    borders repeated: PyTorch's `interpolate(mode="bicubic")`.
    """
    side, new_side = round(len(table) ** 0.5), 2 * window_size - 1
    position = (np.arange(new_side) + 0.5) * side / new_side - 0.5
    taps = np.floor(position)[:, None].astype(int) + np.arange(-1, 3)
    distance = np.abs(position[:, None] - taps)
    a = -0.75
    near = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    far = a * (distance**3 - 5 * distance**2 + 8 * distance - 4)
    weights = np.zeros((new_side, side))
    rows = np.arange(new_side)[:, None]
    np.add.at(weights, (rows, taps.clip(0, side - 1)), np.where(distance <= 1, near, far))
    square = table.reshape(side, side, -1).astype(np.float64)
    resized = np.einsum("yi,xj,ijh->yxh", weights, weights, square)
    return resized.reshape(new_side**2, -1).astype(np.float32)


def resize_windows(params: dict[str, Any], old: Any, new: Any) -> None:
    """Resizes, in place, the bias tables of the stages whose windows differ between two Swins."""
    for i in range(len(old.depths)):
        window_size = new.stage_window(i)[0]
        if window_size == old.stage_window(i)[0]:
            continue
        for block in params[f"layers_{i}"].values():
            if "attn" in block:
                table = block["attn"]["relative_position_bias_table"]
                block["attn"]["relative_position_bias_table"] = resize_bias_table(
                    table, window_size
                )


def convert(
    source: str | os.PathLike,
    directory: str | os.PathLike,
    *,
    key: str = "teacher",
    window_size: int | None = None,
    image_size: int | None = None,
) -> list[str]:
    """Writes the networks of a PyTorch checkpoint as a directory of `checkpoint.load_model`.

    Args:
      source: .pth (needs torch) or .safetensors file.
      directory: to be made; whole or not at all.
      key: the network that evaluation, exports and `config.init_from` use.
      window_size: resizes the bias tables to windows of this size; None keeps them.
      image_size: pixels the network was trained with; None infers it, see `infer_backbone`.

    Returns:
      What was found, assumed and left behind, a line each.

    Raises:
      UserError: the file cannot be read or does not fit (every name and shape that does not is
        listed), or the directory is there already. Nothing is written then.
    """
    if "://" in str(directory):
        raise UserError(f"--to={directory}: convert to a local directory, then copy it")
    source, directory = Path(source), Path(directory)
    if directory.exists():
        raise UserError(f"--to={directory} exists already; remove it or take another name")
    found = sort_out(read_tensors(source))
    try:
        network = found.network(key)
        config, notes = infer_config(found.networks[network], image_size)
        model = create_model(config)
        check_fit(found, model)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error

    networks = {name: params_from_state_dict(x) for name, x in found.networks.items()}
    if window_size:
        config.backbone.window_size = window_size
        resized = create_model(config).backbone
        for params in networks.values():
            resize_windows(params["backbone"], model.backbone, resized)
        notes.append(f"window {model.backbone.window_size} resized to {window_size}")
    facts: dict[str, Any] = {"source": source.name, "key": key, "epoch": found.epoch}
    chosen = networks[network]
    if found.has_heads:
        student, teacher = (networks.get(name, chosen) for name in ("student", "teacher"))
        centers = {name: np.asarray(x) for name, x in zero_centers(model).items()} | found.centers
    else:
        facts["parts"] = "backbone"
        student, teacher, centers = None, chosen, None
    with checkpoint.whole_folder(directory) as folder:
        checkpoint.save_model(
            folder, config=config, facts=facts, student=student, teacher=teacher, centers=centers
        )
    return [f"{source.name}: {in_words(model)}", *notes, *_report(found, config, network)]


def _report(found: Found, config: ConfigDict, network: str) -> list[str]:
    lines = []
    if found.has_heads:
        head = config.head
        lines.append(
            f"{'view and region heads' if config.loss.region else 'a view head'} of "
            f"{head.num_prototypes} prototypes (hidden {head.hidden_dim}, bottleneck "
            f"{head.bottleneck_dim})"
        )
        if len(found.networks) == 1:
            lines.append(f"it holds one network ({network}): student and teacher both get it")
        if not found.centers:
            lines.append("it holds no centers: they are 0")
    else:
        lines.append(
            f"a backbone alone ({network}): good for evaluation, exports and "
            "config.init_parts=backbone"
        )
        if network == "model":
            lines.append(
                "its norms get EsViT's eps of 1e-6; a supervised Swin was trained with 1e-5"
            )
    if found.left:
        lines.append("left behind: " + ", ".join(found.left))
    return lines
