"""What commands share that draw the features of a split."""

import atexit
import shutil
import tempfile
from typing import TYPE_CHECKING, Any

from esvit_jax.commands.arguments import (
    Parser,
    add_key,
    add_network,
    add_split,
    open_network,
    open_split,
    output_folder,
    path,
    quiet_libraries,
)
from esvit_jax.commands.labelled import features_folder
from esvit_jax.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from esvit_jax.checkpoint import LoadedModel
    from esvit_jax.data.sources import Source
    from esvit_jax.evaluate.cache import KeptFeatures


def add_flags(parser: Parser, file: str) -> None:
    """A network, a split, and where `file` goes."""
    add_network(parser)
    add_key(parser)
    add_split(parser)
    parser.add_argument(
        "--out", type=path, metavar="FOLDER",
        help=f"for {file} (default: the workdir, if network and data are the run's own)",
    )  # fmt: skip


def open_all(arguments: Any) -> "tuple[Console, LoadedModel, Source, str]":
    """What the flags name, and the folder to draw in.

    Raises:
      UserError: there is no such network or data, or no folder.
    """
    from rich.console import Console

    quiet_libraries()
    folder = output_folder(arguments)
    if not folder:
        raise UserError("--out is missing: the folder to draw in, as the images are not the run's")
    loaded = open_network(arguments)
    return Console(), loaded, open_split(arguments, loaded), folder


def features_of(
    loaded: "LoadedModel", source: "Source", arguments: Any, console: "Console"
) -> "KeptFeatures":
    """View features of the split, which lie in the workdir for the next time if they can.

    Raises:
      UserError: no record is an image.
      RunError: features are not finite.
    """
    from esvit_jax.evaluate.cache import can_keep, kept_features
    from esvit_jax.evaluate.features import check_finite

    folder = features_folder(arguments)
    if not can_keep(folder):
        folder = tempfile.mkdtemp(prefix="esvit_features")
        atexit.register(shutil.rmtree, folder)
    (kept,) = kept_features(loaded, [source], folder, key=arguments.key, console=console)
    if not len(kept.labels):
        raise UserError(f"{source.name} {source.split}: none of {len(source)} records is an image")
    check_finite(source, kept.finite())
    return kept
