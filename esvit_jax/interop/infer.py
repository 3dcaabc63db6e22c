"""What the names and shapes of a network's tensors tell: its config, or what does not fit one."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from esvit_jax.config import ConfigDict, check, default_config
from esvit_jax.errors import UserError
from esvit_jax.interop.config_beside import OurConfig
from esvit_jax.interop.files import Contents
from esvit_jax.interop.names.base import LARGEST_IMAGE
from esvit_jax.interop.names.published import Tensors, state_dict_from_params
from esvit_jax.models import PRESETS, Backbone, EsViT, create_model
from esvit_jax.state import init_params, zero_centers

# What of a config says how images are prepared.
IMAGE_FIELDS = (
    ("views", "global_size"), ("views", "local_size"), ("views", "mean"), ("views", "std"),
    ("data", "canvas_size"), ("evaluate", "size"), ("evaluate", "crop"),
)  # fmt: skip


def infer_config(
    contents: Contents, network: str, image_size: int | None, told: OurConfig | None = None
) -> tuple[ConfigDict, list[str]]:
    """The config of a network by its shapes, and what had to be assumed, in words.

    All else is the default config's, but for float32, in which published features are computed,
    and views of the network's image size.

    Args:
      contents: of a file.
      network: which of its networks.
      image_size: pixels it was trained with; None infers it, see `Family.infer`.
      told: the config beside the file, whose backbone, and way to prepare images, are taken.

    Raises:
      UserError: no backbone of its family has these shapes, or the one that is told has not.
    """
    tensors = contents.networks[network]
    config = default_config()
    config.dtype = "float32"
    if told is None:
        inferred = contents.family.infer(tensors, image_size)
        for name, value in preset_and_fields(contents.backbone_class, inferred.fields).items():
            config.backbone[name] = value
        size = inferred.fields["image_size"]
        note = inferred.note
    else:
        size, note = _take_told(config, told, contents, network, image_size)
    if size > LARGEST_IMAGE:
        raise UserError(f"its shapes are those for images of {size} pixels, over {LARGEST_IMAGE}")
    notes = [f"image size {size}: {note}"]
    if told is None:
        config.views.global_size = size
        config.data.canvas_size = config.data.canvas_size * max(size, 224) // 224
    matrices = {name: x for name, x in tensors.items() if x.ndim == 2}
    v, g = (matrices.get(f"head.last_layer.weight_{x}") for x in "vg")
    hidden = matrices.get("head.mlp.0.weight")
    if v is not None and hidden is not None:
        config.head.num_prototypes = v.shape[0]
        config.head.hidden_dim = hidden.shape[0]
        config.head.bottleneck_dim = v.shape[1]
        config.head.batch_norm = "head.mlp.6.weight" in tensors  # without, the last one is mlp.4
        # Shapes do not tell; but norms that were free to move do not all end at 1.
        fixed = g is not None and bool(np.all(g == 1))
        why = f"assumed, because the prototypes' norms are {'all' if fixed else 'not all'} 1"
        if told is not None:
            fixed, why = told.config.head.norm_last_layer, f"as {told.name} beside it says"
        config.head.norm_last_layer = fixed
        notes.append(f"norm_last_layer {fixed}: {why}")
    config.loss.region = any(name.startswith("head_dense.") for name in tensors)
    check(config)
    return config, notes


def _take_told(
    config: ConfigDict,
    told: OurConfig,
    contents: Contents,
    network: str,
    image_size: int | None,
) -> tuple[int, str]:
    """Takes a config's backbone, and how it prepares images; returns image size and note.

    Raises:
      UserError: the shapes are not of that backbone (with `image_size`).
    """
    for section, name in [("backbone", name) for name in config.backbone] + [*IMAGE_FIELDS]:
        config[section][name] = told.config[section][name]
    note = f"as {told.name} beside it says, and how images are prepared"
    if image_size is not None:
        config.backbone.image_size = config.evaluate.size = image_size
        config.data.canvas_size, note = max(config.data.canvas_size, image_size), "as told"
    model, tensors = create_model(config), contents.networks[network]
    size: int = getattr(model.backbone, "image_size")  # noqa: B009 - which every class has
    expected = _expected_shapes(model, heads=False)
    found = {name: x.shape for name, x in contents.family.weights(tensors).items()}
    if any(found.get(name) != shape for name, shape in expected.items()):
        _check_told(told, contents, network, model.backbone, size, image_size is not None)
    return size, note


def _check_told(
    told: OurConfig,
    contents: Contents,
    network: str,
    backbone: Backbone,
    size: int,
    from_user: bool,
) -> None:
    """Refuses a config that contradicts shapes; a file that lacks tensors is left to `check_fit`.

    Raises:
      UserError: in one line.
    """
    advice = f"; mend {told.name}, or remove it if it is another network's"
    if type(backbone) is not contents.backbone_class:
        raise UserError(
            f"{told.name} beside it is of a {type(backbone).__name__}, its tensors of a "
            f"{contents.backbone_class.__name__}{advice}"
        )
    try:
        fields = contents.family.infer(contents.networks[network], size).fields
    except UserError as error:
        if from_user:
            raise
        message = f"{told.name} beside it says image_size {size}, but {error.message}{advice}"
        raise UserError(message) from error
    says = {name: getattr(backbone, name) for name in fields}
    if differing := [name for name in fields if says[name] != fields[name]]:
        told_words, shape_words = (
            ", ".join(f"{name} {values[name]}" for name in differing) for values in (says, fields)
        )
        raise UserError(
            f"{told.name} beside it says {told_words}, its shapes {shape_words}{advice}"
        )


def preset_and_fields(backbone_class: type[Backbone], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `config.backbone`: a preset's name, and what it does not say or says otherwise.

    The preset is the one of this class with the same fields, or else its first.
    """
    presets = {name: preset for name, (cls, preset) in PRESETS.items() if cls is backbone_class}
    for name, preset in presets.items():
        shared = fields.keys() & preset.keys()
        if shared and all(fields[field] == preset[field] for field in shared):
            return {"name": name} | {k: x for k, x in fields.items() if k not in shared}
    return {"name": next(iter(presets)), **fields}


def check_fit(contents: Contents, model: EsViT) -> None:
    """Makes sure that a file's networks and centers are exactly a model's, or its backbone.

    Raises:
      UserError: lists, a line each, all names that are unknown or missing, all wrong shapes, and
        tensors with `bad_values`.
    """
    family = contents.family
    shapes = _expected_shapes(model, heads=contents.has_heads)
    lines = [f"unknown: {name}" for name in contents.unknown]
    for network, tensors in contents.networks.items():
        lines += _misfits(family.weights(tensors), shapes, network)
    centers = zero_centers(model) if contents.has_heads else {}
    lines += [
        f"wrong shape: {name} center is {list(center.shape)}, unlike its head"
        for name, center in contents.centers.items()
        if name not in centers or center.shape != centers[name].shape
    ]
    lines += [f"{name} center: {words}" for name, words in bad_values(contents.centers).items()]
    if lines:
        words = family.describe(model.backbone)
        raise UserError(f"it does not fit {words}:\n  " + "\n  ".join(lines))


def bad_values(tensors: Mapping[str, Any]) -> dict[str, str]:
    """By the names of floating-point tensors of which no network can be made: what is wrong.

    That is NaN, infinities, and negative variances of batch norms.
    """
    found = {}
    for name, tensor in tensors.items():
        values = np.asarray(tensor)
        if values.dtype.kind != "f":
            continue
        if bad := np.count_nonzero(~np.isfinite(values)):
            found[name] = f"{bad} of its {values.size} values are not finite"
        elif name.endswith("running_var") and (bad := np.count_nonzero(values < 0)):
            found[name] = f"{bad} of its {values.size} variances are negative"
    return found


def _expected_shapes(model: EsViT, *, heads: bool) -> dict[str, tuple[int, ...]]:
    """Published names and shapes of the network's tensors, buffers not among them."""
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    if not heads:
        params = {"backbone": params["backbone"]}
    # Arrays of these shapes that take no memory.
    params = jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), params)
    return {name: x.shape for name, x in state_dict_from_params(params).items()}


def _misfits(tensors: Tensors, shapes: Mapping[str, tuple[int, ...]], network: str) -> list[str]:
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
    return lines + [f"{network} {name}: {words}" for name, words in bad_values(tensors).items()]
