"""The folder of a run: whether it can be one, and whether what it holds is this run."""

import dataclasses
import os
from pathlib import Path

from etils import epath

from esvit_jax import buckets, checkpoint, config_file
from esvit_jax.config import ConfigDict, RunNumbers, differences
from esvit_jax.errors import UserError

# What of `RunNumbers` must stay as it was for a run to go on.
KEPT_NUMBERS = ("num_images", "total_steps", "steps_per_epoch")
# What changes with the length of a run alone, and with the size of its data set alone.
LENGTH = {"config.total_epochs", "config.total_steps", "total_steps"}
DATA = {"num_images", "steps_per_epoch", "total_steps"}


def usable_workdir(workdir: str | os.PathLike[str]) -> epath.Path:
    """The folder that is meant; it may be missing, and is not made.

    Args:
      workdir: a local path (~ is the home directory), or gs://bucket/run.

    Raises:
      UserError: no run can be kept there.
      RunError: the bucket cannot be reached.
    """
    text = os.fspath(workdir)

    def refusal(message: str) -> UserError:
        return UserError(message, argument="workdir", value=text)

    if not text.strip():
        raise refusal("it is empty; give a folder, such as runs/first")
    if "\0" in text:
        raise refusal("no path has a NUL character")
    if buckets.is_remote(text):
        return buckets.usable_folder(text)
    path = Path(os.path.abspath(os.path.expanduser(text)))
    try:
        there = _existing_part(path)
    except OSError as error:
        raise refusal(f"it cannot be looked at: {error.strerror}") from error
    if not there.is_dir():
        raise refusal(f"{'it' if there == path else there} is a file; give a folder")
    longest = os.pathconf(there, "PC_NAME_MAX")
    if any(len(os.fsencode(part)) > longest for part in path.relative_to(there).parts):
        raise refusal(f"names have at most {longest} bytes there")
    kept = ("config.json", "metrics.jsonl", "checkpoints", "tensorboard")
    for item in (there, *(path / name for name in kept)):
        if item.exists() and not os.access(item, os.W_OK):
            raise refusal(f"{item} may not be written to; give another folder")
    return epath.Path(path)


def _existing_part(path: Path) -> Path:
    """The longest part of an absolute path that is there."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return _existing_part(path.parent)
    return path


def check_same_run(workdir: os.PathLike[str], config: ConfigDict, numbers: RunNumbers) -> None:
    """Refuses to go on with a run of another model, data set or length.

    Raises:
      UserError: lists what differs and says what can be done.
    """
    if not checkpoint.has_checkpoint(workdir):
        return
    found = config_file.read_config(workdir)
    if found is None:
        raise UserError(
            f"{workdir} has checkpoints but no config.json to tell which run they are of: put it "
            "back, or take another workdir"
        )
    old_config, origin = found
    if "source" in origin:
        raise UserError(
            f"{workdir} is a converted checkpoint: take another workdir, and "
            f"config.init_from={workdir}"
        )
    if missing := [name for name in KEPT_NUMBERS if name not in origin]:
        raise UserError(
            f"{workdir}/config.json lacks {', '.join(missing)} among its facts: put the file of "
            "the run back, or take another workdir"
        )
    now = dataclasses.asdict(numbers)
    changes = differences(old_config, config) + [
        f"{name} was {origin[name]} and is {now[name]} now"
        for name in KEPT_NUMBERS
        if origin[name] != now[name]
    ]
    if changes:
        raise UserError(f"{workdir} holds another run: {'; '.join(changes)}. {_advice(changes)}")


def _advice(changes: list[str]) -> str:
    """What can be done about changes, lines of "name was … and is … now"."""
    names = {change.split(" was ")[0] for change in changes}
    new_run = "in a new workdir with config.init_from at this one, a run starts from its weights"
    if names <= LENGTH:
        return (
            "The learning rate and other schedules stretch over the whole length, so a run cannot "
            f"become longer or shorter on its way: set it back to finish this one; or, {new_run} "
            "with schedules of their own"
        )
    if names <= DATA:
        return (
            "The data set has another number of images, and with it the order of images and the "
            f"length of an epoch change: bring back the old ones to finish this run; or, {new_run}"
        )
    return f"Set it back to go on with this run, or take another workdir; {new_run}"


def write_run_config(workdir: os.PathLike[str], config: ConfigDict, numbers: RunNumbers) -> None:
    """Makes the folder and writes its config.json.

    Raises:
      UserError: that fails after all.
    """
    origin = dataclasses.asdict(numbers)
    del origin["images_per_device"]  # may differ: the number of devices is free
    try:
        config_file.write_config(workdir, config, origin)
    except OSError as error:
        raise UserError(
            f"it cannot be written to: {error.strerror}", argument="workdir", value=str(workdir)
        ) from error
