"""The model card of an export: a README.md with the header that the hub of models reads."""

from pathlib import Path

import jax
import numpy as np
from etils import epath

from esvit_jax.interop.formats.base import (
    CannotCheck,
    Checks,
    Exportable,
    Format,
    Pixels,
    check_images,
    relative_error,
)
from esvit_jax.interop.load import preprocessor
from esvit_jax.runlog.writer import read_metrics

CARD = """\
---
license: unknown  # of the weights: yours to choose
library_name: {library}
pipeline_tag: image-feature-extraction
tags:
- esvit
- {family}
- self-supervised-learning
---

# A backbone pretrained with EsViT

| | |
|---|---|
| architecture | {architecture} |
| parameters | {parameters:,}, float32 |
| features | {features} an image ({view_feature}), and as many a region |
| input | RGB, {size} × {size}: shorter side to {resize_size} pixels (bicubic), then the centre |
| normalisation | (pixels / 255 − mean) / std, mean {mean}, std {std} |
| weights | the {key}'s |
| training | {training} |
| k-NN | {knn} |

## Use

{usage}

## Check

Features of {images} fixed images, computed from these files, against those of the backbone they
were written from (relative error):

{checks}

## Pixels

{pixels}
"""


def model_card(
    source: Exportable, format: Format, workdir: epath.Path, folder: Path, checks: Checks
) -> str:
    """What somebody who finds the folder needs to know, in Markdown, with the hub's header.

    Args:
      source: what was exported.
      format: of the export.
      workdir: where its metrics lie, if they do.
      folder: what was written; FOLDER stands for it in the text.
      checks: of its features.
    """
    lines = [f"- {reader}: {error:.1e}" for reader, error in checks.errors.items()]
    lines += [f"- {line}" for line in checks.unchecked]
    backbone, views = source.backbone, source.loaded.config.views
    return CARD.format(
        architecture=source.architecture,
        parameters=sum(x.size for x in jax.tree.leaves(source.params)),
        features=backbone.num_features,
        view_feature=backbone.view_feature,
        size=source.image_size,
        resize_size=source.resize_size,
        mean=", ".join(map(str, views.mean)),
        std=", ".join(map(str, views.std)),
        key=source.key,
        training=describe_training(source),
        knn=describe_knn(source, workdir),
        library=format.library,
        family=type(backbone).__name__.lower(),
        usage=format.usage(source),
        images=len(check_images(source.image_size)),
        checks="\n".join(lines),
        pixels=describe_pixels(source, format, folder),
    )


PIXELS = """\
In training and evaluation an image whose longer side has more than {canvas} pixels is first scaled
down to them by averaging areas, and rounded to whole levels; what follows is not rounded."""
MEASURED = """\
Of photos that {library} prepares as above, features are off by {least:.1f} to {most:.1f} % of their
length (measured with this backbone on scikit-learn's two photos, 640 × 427 pixels, and on the
squares in their middle)."""


def describe_pixels(source: Exportable, format: Format, folder: Path) -> str:
    """How images are prepared, and how far features are off where the library prepares them."""
    words = PIXELS.format(canvas=source.config.data.canvas_size)
    if format.pixels is None:
        return f"{words}\n`preprocess` of `esvit_jax.load` does all of it."
    try:
        errors = [100 * error for error in pixel_errors(source, format.pixels, folder)]
    except CannotCheck as missing:
        return f"{words}\nWhat {format.library} makes of images was {missing}."
    measured = MEASURED.format(library=format.library, least=min(errors), most=max(errors))
    return f"{words}\n\n{measured}"


def pixel_errors(source: Exportable, pixels: Pixels, folder: Path) -> list[float]:
    """Relative errors of the features of some photos as a library prepares them.

    Raises:
      CannotCheck: the library is not there.
    """
    photos = sample_photos()
    theirs = source.features(source.params, pixels(source, folder, photos))
    ours = source.features(source.params, preprocessor(source.config)(photos))
    return [relative_error(x, y) for x, y in zip(theirs, ours, strict=True)]


def sample_photos() -> list[np.ndarray]:
    """Two photos uint8[427, 640, 3], and the squares in their middle."""
    from sklearn.datasets import load_sample_images

    photos = list(load_sample_images().images)
    height, width, _ = photos[0].shape
    left = (width - height) // 2
    return photos + [photo[:, left : left + height] for photo in photos]


def describe_training(source: Exportable) -> str:
    """Steps and data, as far as they are known."""
    config, origin, step = source.loaded.config, source.loaded.origin, source.loaded.step
    if "source" in origin:
        epoch = f", epoch {origin['epoch']}" if origin.get("epoch") else ""
        return f"unknown here: converted from {origin['source']}{epoch}"
    matched = "views and regions" if config.loss.region else "views"
    words = f"{step} steps of {config.batch_size} images, matching {matched}"
    if "steps_per_epoch" in origin:
        words += f" ({step / origin['steps_per_epoch']:.4g} epochs)"
    words += f", on {config.data.name}, split {config.data.train_split}"
    if "num_images" in origin:
        words += f" ({origin['num_images']} images)"
    if config.init_from:
        words += f"; started from {config.init_from} ({config.init_parts})"
    return words


def describe_knn(source: Exportable, workdir: epath.Path) -> str:
    """The last k-NN accuracies that the run logged up to its checkpoint; they are the teacher's."""
    path = workdir / "metrics.jsonl"
    lines = read_metrics(path) if path.exists() and source.key == "teacher" else []
    for line in reversed(lines):
        top1 = {name: x for name, x in line.items() if name.startswith("knn/top1/")}
        if top1 and line["step"] <= source.loaded.step:
            data = source.loaded.config.data
            accuracies = ", ".join(f"{x:.2f} % (k={n.split('/')[-1]})" for n, x in top1.items())
            return f"top-1 {accuracies} on {data.name} {data.test_split}, step {line['step']}"
    return "not known"
