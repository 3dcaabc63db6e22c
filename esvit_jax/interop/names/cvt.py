"""CvT: names in the published checkpoints, what shapes tell, and why there is no peer.

The published EsViT trains a CvT of its own: windowed attention, whose queries, keys and values come
of one convolution, and the mean of the last map. Microsoft's supervised CvT (Wu et al. 2021), which
transformers has as `CvtModel`, is another function of other weights: attention goes over the whole
map, queries, keys and values have a depthwise convolution and a batch norm each (keys and values
with a stride of 2), there are three stages, the MLP has the exact GELU, and the last stage has a
class token. So neither can hold the other's weights: files of the one are refused, and exports to
transformers too. timm (1.0) has no CvT.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from esvit_jax.errors import UserError
from esvit_jax.interop.names.base import COUNTER, Family, Inferred
from esvit_jax.interop.names.published import Tensors
from esvit_jax.models import PRESETS, CvT

EMBEDDING, DEPTHWISE = "stage0.0.proj.weight", "stage0.1.layers.0.0.fn.qkv.dw.weight"
# Parts of names that only the supervised one has, in Microsoft's files and in transformers'.
SUPERVISED = ("attn.conv_proj_q.", "convolution_projection_query.")


def published_heads(embed_dims: tuple[int, ...], depths: tuple[int, ...]) -> tuple[int, ...]:
    """Attention heads of each stage, which shapes do not tell.

    Those of the preset of these sizes; else of 64 features, as in cvt_tiny, or of the most that
    divide both 64 and the features of every stage.
    """
    for backbone_class, preset in PRESETS.values():
        sizes = preset.get("embed_dims"), preset["depths"]
        if backbone_class is CvT and sizes == (embed_dims, depths):
            return preset["num_heads"]
    features = math.gcd(64, *embed_dims)
    return tuple(dim // features for dim in embed_dims)


class CvTFamily(Family[CvT]):
    """See the top of this file."""

    signature = f"{EMBEDDING} and {DEPTHWISE}"
    why_no_peer = "a supervised CvT, such as transformers' CvtModel, is another function"

    def published_names(self, tensors: Tensors) -> Tensors:
        """Refuses a supervised CvT.

        Raises:
          UserError: it is one.
        """
        if any(part in name for name in tensors for part in SUPERVISED):
            raise UserError(
                "it holds a supervised CvT (Microsoft's, CvtModel), which attends to the whole map "
                "with a class token; EsViT's CvT, with attention in windows, cannot take its "
                "weights"
            )
        return tensors

    def recognises(self, tensors: Tensors) -> bool:
        return all(name in tensors and tensors[name].ndim == 4 for name in (EMBEDDING, DEPTHWISE))

    def infer(self, tensors: Tensors, image_size: int | None) -> Inferred:
        """See `Family.infer`; any image size fits, and heads and window are assumed."""
        found: dict[int, int] = {}
        for name in tensors:
            if match := re.match(r"stage(\d+)\.1\.layers\.(\d+)\.", name):
                stage, block = int(match[1]), int(match[2])
                found[stage] = max(found.get(stage, 0), block + 1)
        embeddings = [tensors.get(f"stage{i}.0.proj.weight") for i in range(len(found))]
        if sorted(found) != list(range(len(found))) or any(x is None for x in embeddings):
            raise UserError(f"it has blocks of the stages {sorted(found)}, which no CvT has")
        depths = tuple(found[stage] for stage in sorted(found))
        embed_dims = tuple(len(x) for x in embeddings if x is not None)
        heads = published_heads(embed_dims, depths)
        fields = {"embed_dims": embed_dims, "depths": depths, "num_heads": heads}
        note = (
            f"{'assumed' if image_size is None else 'as told'}; any fits. Shapes do not tell "
            f"num_heads and window_size: {heads} and {CvT.window_size} are assumed"
        )
        return Inferred(fields | {"image_size": image_size or 224}, note)

    def describe(self, backbone: CvT) -> str:
        return (
            f"a CvT of embed_dims {tuple(backbone.embed_dims)}, depths {tuple(backbone.depths)}, "
            f"heads {tuple(backbone.num_heads)}, window {backbone.window_size}"
        )

    def buffer_tensors(self, backbone: CvT) -> Tensors:
        return {
            f"stage{i}.1.layers.{j}.0.fn.qkv.bn.{COUNTER}": np.zeros((), np.int64)
            for i, depth in enumerate(backbone.depths)
            for j in range(depth)
        }

    def resized(self, params: Mapping[str, Any], old: CvT, new: CvT) -> dict[str, Any]:
        """No weight of a CvT depends on the window or on the size of images."""
        return dict(params)
