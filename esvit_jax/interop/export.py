"""`esvit export`: a trained backbone in files that other libraries, or JAX alone, read.

Whatever is written is read again, its features of fixed images are compared with the backbone's,
and only then does the folder get its name.
"""

import os
from collections.abc import Callable
from pathlib import Path

from etils import epath

from esvit_jax import config_file
from esvit_jax.errors import RunError, UserError
from esvit_jax.interop.card import model_card
from esvit_jax.interop.folders import new_folder
from esvit_jax.interop.formats import FORMATS
from esvit_jax.interop.formats.base import (
    CannotCheck,
    Checks,
    Exportable,
    Format,
    check_images,
    load_exportable,
    relative_error,
)


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
) -> Checks:
    """Writes a backbone in one of `FORMATS`, with a model card; the folder is whole or not there.

    Args:
      workdir: a run, a converted checkpoint or an export.
      directory: to be made.
      format: one of `FORMATS`.
      key: "teacher" or "student"; None is the one that evaluation uses.
      image_size: pixels along a side of its images; None is the size that the run is evaluated at.
      step: of the checkpoint; None is the newest.
      strict: refuse a damaged newest checkpoint, in place of taking the one before it.
      report: called with what is being done, a line each.

    Returns:
      Who computed features from the files, how far they were off, and who could not.

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
        checks = check_features(chosen, source, folder)
        name = Path(os.path.abspath(directory)).name
        card = model_card(source, chosen, epath.Path(workdir), folder, checks)
        (folder / "README.md").write_text(card.replace("FOLDER", name))
    return checks


def write_config(source: Exportable, format: str, folder: Path) -> None:
    """Writes our own config, which `esvit_jax.load` reads, next to the weights."""
    loaded = source.loaded
    origin = loaded.origin | {"format": format, "key": source.key, "step": loaded.step}
    config_file.write_config(folder, source.config, origin, FORMATS[format].config_file)


def check_features(format: Format, source: Exportable, folder: Path) -> Checks:
    """Reads what was written, and compares features computed from it with the backbone's.

    Raises:
      RunError: they differ by more than they may.
    """
    images = check_images(source.image_size)
    expected = source.features(source.params, images)
    checks = Checks({}, [])
    try:
        for reader, features, bound in format.readings(source, folder, images):
            checks.errors[reader] = error = relative_error(features, expected)
            if not error <= bound:
                raise RunError(
                    f"nothing is written: features that {reader} computes from the files are off "
                    f"by {error:.1e} (at most {bound:.0e})"
                )
    except CannotCheck as missing:
        checks.unchecked.append(str(missing))
    return checks
