"""`config.json`: what a run, a converted checkpoint or an export was made with."""

import json
import os
from typing import Any

from esvit_jax import buckets
from esvit_jax import config as config_lib
from esvit_jax.config import ConfigDict
from esvit_jax.errors import UserError


def write_config(
    workdir: str | os.PathLike,
    config: ConfigDict,
    origin: dict[str, Any],
    name: str = "config.json",
) -> None:
    """Writes `workdir/config.json`, whole or not at all.

    Args:
      workdir: made if it is not there.
      config: all fields, by their dotted names.
      origin: what else describes the run (steps per epoch, classes, …), under "facts".
      name: of the file, where another library wants that one for itself.
    """
    directory = buckets.ready_path(workdir)
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"config": config_lib.flatten(config), "facts": origin}, indent=1)
    temporary = directory / f"{name}.{os.getpid()}.tmp"
    temporary.write_text(text + "\n")
    temporary.replace(directory / name)


class NotOurs(UserError):
    """A config.json that is another program's, or none at all."""


@buckets.reads_bucket
def read_config(
    workdir: str | os.PathLike, name: str = "config.json"
) -> tuple[ConfigDict, dict[str, Any]] | None:
    """What `write_config` wrote, checked; None where there is no such file.

    Raises:
      NotOurs: the file is not one of ours.
      UserError: it cannot be read, or somebody has set a field to what cannot work.
    """
    path = buckets.ready_path(workdir) / name
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise NotOurs(f"{path} is not the config of a run: it is no JSON, {error}") from error
    if not (isinstance(content, dict) and {"config", "facts"} <= content.keys()):
        raise NotOurs(f'{path} is not the config of a run: it lacks "config" or "facts"')
    fields, origin = content["config"], content["facts"]
    if not (isinstance(fields, dict) and isinstance(origin, dict)):
        raise UserError(f'{path} is not the config of a run: "config" and "facts" are objects')
    try:
        config = config_lib.unflatten(fields)
        config_lib.check(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return config, origin
