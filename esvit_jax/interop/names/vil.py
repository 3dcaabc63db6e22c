"""ViL: names in the published checkpoints, and what shapes tell. No other library has the class.

Sparse blocks have one set of weights for cells and global tokens, which a state dict lists twice:
`query`, `kv` and `proj`, and the same with "_global". Here they are read and held once.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from esvit_jax.errors import UserError
from esvit_jax.interop.names.base import Family, Inferred
from esvit_jax.interop.names.published import Tensors
from esvit_jax.interop.names.swin import resize_bias_table
from esvit_jax.models import ViL
from esvit_jax.models.attention import relative_position_index
from esvit_jax.models.longformer import TABLE, neighbour_index

PATCHES = "layer1.0.proj.weight"


def single(tensors: Tensors) -> Tensors:
    """The tensors without those that are there for global tokens once more.

    Raises:
      UserError: such a tensor differs from that for cells.
    """
    kept = {}
    for name, tensor in tensors.items():
        short = re.sub(r"\.attn\.(query|kv|proj)_global\.", r".attn.\1.", name)
        if short == name or short not in tensors:
            kept[name] = tensor
        elif not np.array_equal(tensor, tensors[short], equal_nan=tensor.dtype.kind == "f"):
            raise UserError(f"{name} differs from {short}; a ViL here has one for both")
    return kept


def reach_of(table: np.ndarray) -> int:
    """`ViL.reach` of a stage with this bias table."""
    return (round(len(table) ** 0.5) + 1) // 2


def bias_tables(tensors: Tensors) -> list[list[np.ndarray]]:
    """The bias table [rows, heads] of each block of each stage, by the numbers in names.

    Nothing, where these are not one after the other, or a table is no table.
    """
    found: dict[tuple[int, int], np.ndarray] = {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(rf"layer(\d+)\.(\d+)\.attn\.{TABLE}", name):
            if tensor.ndim != 2:
                return []
            found[int(match[1]), int(match[2])] = tensor
    stages: list[list[np.ndarray]] = []
    for stage, number in sorted(found):
        if number == 1 and stage == len(stages) + 1:
            stages.append([])
        if stage != len(stages) or number != 2 * len(stages[-1]) + 1:
            return []
        stages[-1].append(found[stage, number])
    return stages


class ViLFamily(Family[ViL]):
    """See the top of this file."""

    signature = f"{PATCHES} and, in each stage, layerI.J.attn.{TABLE}"
    buffers = ("relative_position_index",)

    def published_names(self, tensors: Tensors) -> Tensors:
        return single(tensors)

    def file_names(self, tensors: Tensors) -> Tensors:
        twice = {}
        for name, tensor in tensors.items():
            match = re.fullmatch(r"(layer\d+)(\.\d+\.attn)\.(query|kv|proj)\.(\w+)", name)
            if match and f"{match[1]}.0.cls_token" in tensors:
                stage, block, part, leaf = match.groups()
                if f"{stage}{block}.query.weight" in tensors:
                    twice[f"{stage}{block}.{part}_global.{leaf}"] = tensor
        return tensors | twice

    def recognises(self, tensors: Tensors) -> bool:
        return PATCHES in tensors and tensors[PATCHES].ndim == 4 and bool(bias_tables(tensors))

    def infer(self, tensors: Tensors, image_size: int | None) -> Inferred:
        """See `Family.infer`.

        Full stages tell the image size up to what their patches leave out: 224 is assumed if it
        fits them, or else the smallest size that does.
        """
        tables = bias_tables(tensors)
        prefixes = [f"layer{stage + 1}." for stage in range(len(tables))]
        sparse = [f"{prefix}1.attn.query.weight" in tensors for prefix in prefixes]
        count = sum(sparse)
        if sparse != sorted(sparse, reverse=True):
            raise UserError("it has a sparse stage after a full one, which no ViL has")
        names = [f"{prefix}0.proj.weight" for prefix in prefixes]
        for name in names:
            if name not in tensors or tensors[name].ndim != 4:
                raise UserError(f"it lacks {name}, the patch embedding of a stage")
        patches = [tensors[name] for name in names]
        tokens = [tensors.get(f"{prefix}0.cls_token", np.zeros((1, 0, 1))) for prefix in prefixes]
        fields: dict[str, Any] = {
            "embed_dims": tuple(x.shape[0] for x in patches),
            "depths": tuple(map(len, tables)),
            "num_heads": tuple(stage[0].shape[1] for stage in tables),
            "window_sizes": tuple(reach_of(stage[0]) // 2 for stage in tables[:count]),
            "num_global": tuple(x.shape[1] if x.ndim == 3 else 0 for x in tokens),
            "patch_sizes": tuple(x.shape[-1] for x in patches),
        }
        sides = [reach_of(stage[0]) for stage in tables[count:]]
        strides = np.cumprod(fields["patch_sizes"]).tolist()[count:]

        def fits(size: int) -> bool:
            return [size // stride for stride in strides] == sides

        smallest = max(
            (side * stride for side, stride in zip(sides, strides, strict=True)), default=0
        )
        candidates = [
            (224, "assumed; it fits the bias tables"),
            (smallest, "assumed; the smallest that fits the bias tables"),
        ]
        if image_size is not None:
            candidates = [(image_size, "as told")]
        for size, note in candidates:
            if fits(size):
                return Inferred(fields | {"image_size": size}, note)
        words = f"the bias tables of its full stages are of maps of {sides} cells along a side"
        if image_size is None:
            raise UserError(f"{words}, which no ViL has at any image size")
        raise UserError(
            f"{words}, which no ViL has at this size", argument="image_size", value=image_size
        )

    def describe(self, backbone: ViL) -> str:
        return (
            f"a ViL of depths {tuple(backbone.depths)}, heads {tuple(backbone.num_heads)}, "
            f"embed_dims {tuple(backbone.embed_dims)}, chunks of {tuple(backbone.window_sizes)} in "
            f"its sparse stages, global tokens {tuple(backbone.num_global)}, patches "
            f"{tuple(backbone.patch_sizes)}, with bias tables for {backbone.image_size} pixels"
        )

    def buffer_tensors(self, backbone: ViL) -> Tensors:
        buffers = {}
        for stage, depth in enumerate(backbone.depths):
            window = backbone.stage_window(stage)
            if window is None:
                index = relative_position_index(backbone.stage_side(stage))
            else:
                index = neighbour_index(window)
            for block in range(depth):
                name = f"layer{stage + 1}.{2 * block + 1}.attn.relative_position_index"
                buffers[name] = index.astype(np.int64)
        return buffers

    def resized(self, params: Mapping[str, Any], old: ViL, new: ViL) -> dict[str, Any]:
        """Resizes the bias tables of the stages whose chunks, or maps, differ."""
        resized = {}
        for name, block in params.items():
            match = re.fullmatch(r"layer(\d+)_\d+", name)
            if match and "attn" in block:
                stage, table = int(match[1]) - 1, block["attn"][TABLE]
                if new.reach(stage) != old.reach(stage):
                    table = resize_bias_table(table, new.reach(stage))
                    block = block | {"attn": block["attn"] | {TABLE: table}}
            resized[name] = block
        return resized
