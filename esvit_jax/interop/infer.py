"""What the names and shapes of a network's tensors tell: its config, or what does not fit one."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from esvit_jax.config import ConfigDict, check, default_config
from esvit_jax.errors import UserError
from esvit_jax.interop.files import BUFFERS, Found, Tensors, state_dict_from_params
from esvit_jax.models import PRESETS, EsViT, Swin
from esvit_jax.state import init_params, zero_centers

TABLE = "attn.relative_position_bias_table"


def infer_backbone(tensors: Tensors, image_size: int | None) -> tuple[dict[str, Any], str]:
    """The fields of `config.backbone` that a network's shapes tell, and how its size was found.

    Windows and shifts follow from the image size (see `Swin`), which shapes tell only in part:
    Microsoft's and timm's shift masks do; a last stage with a smaller bias table does; otherwise
    224 is assumed if it fits the tables, or else the smallest size that does.

    Args:
      tensors: by EsViT's names.
      image_size: pixels, if it is known.

    Raises:
      UserError: this is no Swin, or its bias tables fit no image size.
    """
    tables = _bias_tables(tensors)
    weight = tensors.get("patch_embed.proj.weight", np.zeros(0))
    if weight.ndim != 4 or not tables or not all(tables):
        raise UserError(
            "it holds no Swin (patch_embed.proj.weight and, in each stage, "
            f"layers.I.blocks.J.{TABLE}); its {len(tensors)} names begin with "
            + ", ".join(list(tensors)[:4])
        )
    firsts = [next(iter(stage.values())) for stage in tables]
    windows = [(round(len(table) ** 0.5) + 1) // 2 for table in firsts]
    fields = {
        "embed_dim": weight.shape[0],
        "depths": tuple(1 + max(stage) for stage in tables),
        "num_heads": tuple(table.shape[1] for table in firsts),
        "window_size": max(windows),
        "patch_size": weight.shape[2],
    }

    def fits(size: int | None) -> bool:
        swin = Swin(**fields, image_size=size or 0)
        return [swin.stage_window(i)[0] for i in range(len(windows))] == windows

    smallest = fields["patch_size"] * 2 ** (len(windows) - 1) * windows[-1]
    candidates = [
        (_masked_size(tensors, fields["patch_size"]), "from its shift masks"),
        (224, "assumed; it fits the bias tables"),
        (smallest, "assumed; the smallest that fits the bias tables"),
    ]
    if image_size:
        candidates = [(image_size, "as told")]
    size, how = next(((size, how) for size, how in candidates if fits(size)), (None, ""))
    if size is None:
        raise UserError(
            f"its bias tables are of windows {windows}, which no Swin has at "
            + (f"--image_size={image_size}" if image_size else "any image size")
        )
    name = "swin_tiny"
    for known, (_, preset) in PRESETS.items():
        shared = {"embed_dim", "depths", "num_heads"} & preset.keys()
        if all(fields[k] == preset[k] for k in shared):
            name = known
            fields = {k: x for k, x in fields.items() if k not in shared}
            break
    return {"name": name, **fields, "image_size": size}, how


def _bias_tables(tensors: Tensors) -> list[dict[int, np.ndarray]]:
    """{block: bias table [rows, heads]} of each stage."""
    found: dict[int, dict[int, np.ndarray]] = {}
    for name, tensor in tensors.items():
        match = re.match(rf"layers\.(\d+)\.blocks\.(\d+)\.{re.escape(TABLE)}$", name)
        if match and tensor.ndim == 2:
            found.setdefault(int(match[1]), {})[int(match[2])] = tensor
    return [found.get(stage, {}) for stage in range(1 + max(found, default=-1))]


def _masked_size(tensors: Tensors, patch_size: int) -> int | None:
    """Pixels along the images that the first stage's shift mask f32[windows, n, n] was made for."""
    masks = [x for name, x in tensors.items() if re.match(r"layers\.0\..*attn_mask$", name)]
    if not masks:
        return None
    return round((masks[0].shape[0] * masks[0].shape[1]) ** 0.5) * patch_size


def infer_config(tensors: Tensors, image_size: int | None) -> tuple[ConfigDict, list[str]]:
    """The config of a network by its shapes, and what had to be assumed, in words.

    All else is the default config's, but for float32, in which published features are computed,
    and views of the network's image size.
    """
    config = default_config()
    config.dtype = "float32"
    backbone, why = infer_backbone(tensors, image_size)
    for name, value in backbone.items():
        config.backbone[name] = value
    notes = [f"image size {backbone['image_size']}: {why}"]
    config.views.global_size = backbone["image_size"]
    config.data.canvas_size = max(
        config.data.canvas_size, config.data.canvas_size * backbone["image_size"] // 224
    )
    v, g = (tensors.get(f"head.last_layer.weight_{x}") for x in "vg")
    hidden, bottleneck = (tensors.get(f"head.mlp.{i}.weight") for i in (0, 4))
    if v is not None and hidden is not None and bottleneck is not None:
        config.head.num_prototypes = v.shape[0]
        config.head.hidden_dim = hidden.shape[0]
        config.head.bottleneck_dim = bottleneck.shape[0]
        # Shapes do not tell; but norms that were free to move do not all end at 1.
        fixed = g is not None and bool(np.all(g == 1))
        config.head.norm_last_layer = fixed
        notes.append(
            f"norm_last_layer {fixed}: assumed, because the prototypes' norms are "
            f"{'all' if fixed else 'not all'} 1"
        )
    config.loss.region = any(name.startswith("head_dense.") for name in tensors)
    check(config)
    return config, notes


def check_fit(found: Found, model: EsViT) -> None:
    """Makes sure that a file's networks and centers are exactly a model's, or its backbone.

    Raises:
      UserError: lists, a line each, all names that are unknown or missing and all wrong shapes.
    """
    shapes = _expected_shapes(model, heads=found.has_heads)
    lines = [f"unknown: {name}" for name in found.unknown]
    for network, tensors in found.networks.items():
        lines += _misfits(tensors, shapes, network)
    centers = zero_centers(model) if found.has_heads else {}
    lines += [
        f"wrong shape: {name} center is {list(center.shape)}, unlike its head"
        for name, center in found.centers.items()
        if name not in centers or center.shape != centers[name].shape
    ]
    if lines:
        raise UserError(f"it does not fit {in_words(model)}:\n  " + "\n  ".join(lines))


def _expected_shapes(model: EsViT, *, heads: bool) -> dict[str, tuple[int, ...]]:
    """Published names and shapes of the network's tensors, buffers not among them."""
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    if not heads:
        params = {"backbone": params["backbone"]}
    # Arrays of these shapes that take no memory.
    params = jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), params)
    return {name: x.shape for name, x in state_dict_from_params(params).items()}


def _misfits(tensors: Tensors, shapes: Mapping[str, tuple[int, ...]], network: str) -> list[str]:
    tensors = {n: x for n, x in tensors.items() if n.rsplit(".", 1)[-1] not in BUFFERS}
    lines = [f"unknown: {network} {name}" for name in tensors if name not in shapes]
    lines += [f"missing: {network} {name}" for name in shapes if name not in tensors]
    for name, tensor in tensors.items():
        if name not in shapes:
            continue
        if tensor.shape != shapes[name]:
            shape, wanted = list(tensor.shape), list(shapes[name])
            lines.append(f"wrong shape: {network} {name} is {shape}, not {wanted}")
        elif tensor.dtype != np.float32:
            lines.append(f"wrong type: {network} {name} is {tensor.dtype}, no floating-point one")
    return lines


def in_words(model: EsViT) -> str:
    """The backbone's architecture."""
    swin = model.backbone
    return (
        f"a Swin of depths {swin.depths}, heads {swin.num_heads}, embed_dim {swin.embed_dim}, "
        f"window {swin.window_size}, patch {swin.patch_size}"
    )
