"""Our config beside a file of tensors, where an export has left it."""

import os
from typing import Any, NamedTuple

from etils import epath

from esvit_jax import buckets, config_file
from esvit_jax.config import ConfigDict

# Its name where another library wants config.json for itself.
CONFIG_BESIDE = "esvit_config.json"


class OurConfig(NamedTuple):
    """What an export says of itself.

    Attributes:
      name: of the file.
      config: of the run that was exported.
      origin: see `config_file.write_config`; also "format", "key" and "step".
    """

    name: str
    config: ConfigDict
    origin: dict[str, Any]


@buckets.reads_bucket
def read_config(folder: str | os.PathLike) -> OurConfig | None:
    """Our config in a folder, where another library's config.json may lie beside it.

    Raises:
      UserError: there is a file of that name, and it is none.
    """
    name = CONFIG_BESIDE if (buckets.ready_path(folder) / CONFIG_BESIDE).exists() else "config.json"
    found = config_file.read_config(folder, name)
    return found and OurConfig(name, *found)


def config_of(file: str | os.PathLike) -> OurConfig | None:
    """Our config beside a file of tensors, or None where there is none, or another library's.

    Raises:
      UserError: it is ours, and somebody has set a field to what cannot work.
    """
    try:
        return read_config(epath.Path(os.path.expanduser(file)).parent)
    except config_file.NotOurs:
        return None
