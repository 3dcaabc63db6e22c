"""ResNet: names in the published checkpoints, in timm (torchvision's) and in transformers.

The published EsViT holds torchvision's network two attributes deep, "backbone.backbone.", DINO one.
timm and transformers compute the same function, at any size of images: region and view features
are theirs before and after pooling.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from esvit_jax.errors import UserError
from esvit_jax.interop.names.base import COUNTER, LARGEST_IMAGE, Family, Inferred, Peer
from esvit_jax.interop.names.published import HEADS, Tensors
from esvit_jax.interop.names.spelling import Spelling
from esvit_jax.models import ResNet
from esvit_jax.models.resnet import EXPANSION

PREFIX = "backbone.backbone."
STEM, FIRST = "conv1.weight", "layer1.0.conv3.weight"
SPELLING = Spelling(
    starts={
        "conv1.": "embedder.embedder.convolution.",
        "bn1.": "embedder.embedder.normalization.",
        **{f"layer{i + 1}.": f"encoder.stages.{i}.layers." for i in range(9)},
    },
    parts={
        ".conv1.": ".layer.0.convolution.",
        ".bn1.": ".layer.0.normalization.",
        ".conv2.": ".layer.1.convolution.",
        ".bn2.": ".layer.1.normalization.",
        ".conv3.": ".layer.2.convolution.",
        ".bn3.": ".layer.2.normalization.",
        ".downsample.0.": ".shortcut.convolution.",
        ".downsample.1.": ".shortcut.normalization.",
    },
)


def transformers_config(backbone: ResNet, image_size: int) -> dict[str, Any]:
    """A `transformers.ResNetConfig` as JSON holds it."""
    return {
        "architectures": ["ResNetModel"],
        "model_type": "resnet",
        "num_channels": 3,
        "embedding_size": backbone.base_width,
        "hidden_sizes": [stage.num_features for stage in backbone.stages],
        "depths": list(backbone.depths),
        "layer_type": "bottleneck",
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
        "torch_dtype": "float32",
    }


def any_size(backbone: ResNet) -> Sequence[int]:
    """The sizes, in pixels, at which others compute what `backbone` does: all."""
    return range(1, LARGEST_IMAGE + 1)


def timm_arguments(backbone: ResNet, image_size: int) -> dict[str, Any]:
    """The arguments of timm's ResNet that describe the backbone."""
    return {"layers": tuple(backbone.depths)}


def sizes_like_timm(backbone: ResNet) -> Sequence[int]:
    """All sizes, if its stem is timm's."""
    usual = backbone.base_width == 64 and len(backbone.depths) == 4
    return any_size(backbone) if usual else []


class ResNetFamily(Family[ResNet]):
    """See the top of this file."""

    signature = f"{STEM} and {FIRST}"
    timm = Peer(
        model="ResNet",
        to_names=dict,
        from_names=dict,
        arguments=timm_arguments,
        agreeing_sizes=sizes_like_timm,
        difference="its stem has 64 features, and it has four stages",
        advice="Images may have any size, square or not.",
        view_features=lambda model, pixels: model(pixels),
        snippet="""\
model(images)                   # view features [b, d], images [b, 3, h, w]
model.forward_features(images)  # region features [b, d, h, w]""",
        architecture="resnet50",
        transformer=False,
    )
    transformers = Peer(
        model="ResNetModel",
        to_names=SPELLING.to_names,
        from_names=SPELLING.from_names,
        arguments=transformers_config,
        agreeing_sizes=any_size,
        difference="it agrees at any size",
        advice="Images may have any size, square or not.",
        snippet="""\
inputs = processor(images, return_tensors="pt")
out = model(**inputs, output_hidden_states=True)
out.pooler_output.flatten(1)  # view features [b, d]
out.last_hidden_state         # region features [b, d, h, w]
out.hidden_states[1:]         # the maps of all stages, finest first""",
    )

    def published_names(self, tensors: Tensors) -> Tensors:
        if any(name.startswith("encoder.stages.") for name in tensors):
            tensors = SPELLING.from_names(tensors)
        return {re.sub(r"^(backbone\.)+", "", name): tensor for name, tensor in tensors.items()}

    def file_names(self, tensors: Tensors) -> Tensors:
        heads = tuple(f"{head}." for head in HEADS)
        return {
            name if name.startswith(heads) else PREFIX + name: tensor
            for name, tensor in tensors.items()
        }

    def recognises(self, tensors: Tensors) -> bool:
        return all(name in tensors and tensors[name].ndim == 4 for name in (STEM, FIRST))

    def infer(self, tensors: Tensors, image_size: int | None) -> Inferred:
        """See `Family.infer`; any image size fits."""
        found: dict[int, int] = {}
        for name in tensors:
            if match := re.fullmatch(r"layer(\d+)\.(\d+)\.conv1\.weight", name):
                stage, block = int(match[1]), int(match[2])
                found[stage] = max(found.get(stage, 0), block + 1)
        if sorted(found) != list(range(1, len(found) + 1)):
            raise UserError(f"it has the stages {sorted(found)}, which no ResNet has")
        width = tensors[STEM].shape[0]
        if tensors[FIRST].shape[0] != EXPANSION * width:
            raise UserError(
                f"its stem has {width} features and its first block {tensors[FIRST].shape[0]}; of "
                f"the ResNets, those with {EXPANSION} times the stem's are known"
            )
        fields = {"depths": tuple(found[stage] for stage in sorted(found)), "base_width": width}
        note = "assumed; any fits" if image_size is None else "as told"
        return Inferred(fields | {"image_size": image_size or 224}, note)

    def describe(self, backbone: ResNet) -> str:
        return (
            f"a ResNet of depths {tuple(backbone.depths)} with bottleneck blocks, base_width "
            f"{backbone.base_width}"
        )

    def buffer_tensors(self, backbone: ResNet) -> Tensors:
        norms = ["bn1"]
        for i, depth in enumerate(backbone.depths):
            for j in range(depth):
                parts = ["bn1", "bn2", "bn3", *(["downsample.1"] if not j else [])]
                norms += [f"layer{i + 1}.{j}.{part}" for part in parts]
        return {f"{norm}.{COUNTER}": np.zeros((), np.int64) for norm in norms}

    def resized(self, params: Mapping[str, Any], old: ResNet, new: ResNet) -> dict[str, Any]:
        """Nothing in a ResNet depends on the size of images."""
        return dict(params)
