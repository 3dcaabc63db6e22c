"""`esvit export`: a trained backbone in files that other libraries, or JAX alone, read.

Whatever is written is read again, its features of fixed images are compared with the backbone's,
and only then does the folder get its name.
"""

import os
from collections.abc import Callable
from pathlib import Path

import jax
from etils import epath

from esvit_jax import config_file
from esvit_jax.errors import RunError, UserError
from esvit_jax.interop.folders import new_folder
from esvit_jax.interop.formats import FORMATS
from esvit_jax.interop.formats.base import (
    Exportable,
    Format,
    check_images,
    load_exportable,
    relative_error,
)
from esvit_jax.runlog.writer import read_metrics


def export(
    workdir: str | os.PathLike,
    directory: str | os.PathLike,
    *,
    format: str,
    key: str | None = None,
    image_size: int | None = None,
    step: int | None = None,
    strict: bool = False,
    report: Callable[[str], None] = lambda message: None,
) -> dict[str, float]:
    """Writes a backbone in one of `FORMATS`, with a model card; the folder is whole or not there.

    Args:
      workdir: a run or a converted checkpoint.
      directory: to be made.
      format: one of `FORMATS`.
      key: "teacher" or "student"; None is the one that evaluation uses.
      image_size: pixels along a side of its images; None is the size that the run is evaluated at.
      step: of the checkpoint; None is the newest.
      strict: refuse a damaged newest checkpoint, in place of taking the one before it.
      report: called with what is being done, a line each.

    Returns:
      Who computed features of `check_images` from the files, and how far they were off (relative
      to their length).

    Raises:
      UserError: there is no such model, the format cannot represent it, or the folder cannot be
        made.
      RunError: features computed from the files differ. Nothing is written.
    """
    if format not in FORMATS:
        raise UserError(f"known are {', '.join(FORMATS)}", argument="format", value=format)
    workdir, chosen = os.path.expanduser(workdir), FORMATS[format]
    with new_folder(directory) as folder:
        report(f"reading {workdir}")
        source = load_exportable(workdir, key=key, image_size=image_size, step=step, strict=strict)
        chosen.check(source)
        report(f"writing it for {format}")
        write_config(source, format, folder)
        chosen.write(source, folder)
        report("comparing features computed from the files with the backbone's")
        errors = check_features(chosen, source, folder)
        usage = chosen.usage(source).replace("FOLDER", Path(os.path.abspath(directory)).name)
        card = model_card(source, epath.Path(workdir), errors, usage)
        (folder / "model_card.md").write_text(card)
    return errors


def write_config(source: Exportable, format: str, folder: Path) -> None:
    """Writes our own config, which `esvit_jax.load` reads, next to the weights."""
    loaded = source.loaded
    config = loaded.config.copy_and_resolve_references()
    config.evaluate.size = source.image_size
    origin = loaded.origin | {"format": format, "key": source.key, "step": loaded.step}
    config_file.write_config(folder, config, origin, FORMATS[format].config_file)


def check_features(format: Format, source: Exportable, folder: Path) -> dict[str, float]:
    """Reads what was written, and returns the relative error of the features by reader.

    Raises:
      RunError: one is larger than it may be.
    """
    images = check_images(source.image_size)
    expected = source.features(source.params, images)
    errors = {}
    for reader, features, bound in format.readings(source, folder, images):
        errors[reader] = relative_error(features, expected)
        if not errors[reader] <= bound:
            raise RunError(
                f"nothing is written: features that {reader} computes from the files are off by "
                f"{errors[reader]:.1e} (at most {bound:.0e})"
            )
    return errors


CARD = """\
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

{errors}
"""


def model_card(
    source: Exportable, workdir: epath.Path, errors: dict[str, float], usage: str
) -> str:
    """What somebody who finds the folder needs to know, in Markdown.

    Args:
      source: what was exported.
      workdir: where its metrics lie, if they do.
      errors: of `check_features`.
      usage: of the format.
    """
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
        usage=usage,
        images=len(check_images(source.image_size)),
        errors="\n".join(f"- {reader}: {error:.1e}" for reader, error in errors.items()),
    )


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
