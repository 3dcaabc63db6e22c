"""Folders of `esvit export`, read again: as the network of a run is."""

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from esvit_jax import checkpoint, parallel
from esvit_jax.checkpoint import LoadedModel
from esvit_jax.errors import UserError
from esvit_jax.interop.config_beside import read_config
from esvit_jax.interop.files import naming, read_tensors, sort_contents
from esvit_jax.interop.infer import check_fit
from esvit_jax.interop.names.published import params_from_state_dict
from esvit_jax.models import create_model

PROGRAM = "backbone.jax_export"  # of an export to StableHLO


def load_network(
    workdir: str | os.PathLike, step: int | None = None, *, strict: bool = False
) -> LoadedModel:
    """The network of a run, a converted checkpoint or an export.

    Args:
      workdir: see `checkpoint.load_model`, or a folder of `esvit export`.
      step, strict: see `checkpoint.load_model`; an export is of one step.

    Raises:
      UserError: there is no such network, or it does not fit its config.json.
    """
    folder = Path(os.path.expanduser(workdir))
    if not checkpoint.has_checkpoint(workdir):
        if (folder / PROGRAM).is_file():
            raise UserError(
                "it holds a program and no weights, which only `esvit_jax.load` takes; export the "
                "network in another format",
                argument="workdir", value=str(workdir),
            )  # fmt: skip
        if weights_file(folder):
            loaded = read_export(folder)
            if step not in (None, loaded.step):
                raise UserError(
                    f"{workdir} has no checkpoint of step {step}; it is an export of step "
                    f"{loaded.step}"
                )
            return loaded
    return checkpoint.load_model(workdir, step, strict=strict)


def read_export(path: Path) -> LoadedModel:
    """The networks in a folder of `esvit export`, replicated over the devices.

    Where the file holds one backbone, the other network is None.

    Args:
      path: the folder, or the file of tensors in it.

    Raises:
      UserError: it is none; or the tensors do not fit the config beside them, or have `bad_values`.
    """
    folder = path if path.is_dir() else path.parent
    found = read_config(folder)
    file = path if path.is_file() else weights_file(folder)
    if found is None or file is None:
        raise UserError(
            "it is no workdir and no converted or exported checkpoint: it has no "
            + ("config.json beside it" if found is None else "checkpoint")
            + "; `esvit convert` takes files of other origin",
            argument="path", value=str(path),
        )  # fmt: skip
    model, origin = create_model(found.config), dict(found.origin)
    tensors = read_tensors(file)
    with naming(file, own=()):
        contents = sort_contents(tensors)
        check_fit(contents, model)
    if not contents.has_heads:
        origin["parts"] = "backbone"
    everywhere = parallel.replicated_sharding()

    def arrays(tensors: dict[str, np.ndarray]) -> Any:
        params = params_from_state_dict(contents.family.weights(tensors))
        return jax.tree.map(lambda x: parallel.place(x, everywhere), params)

    networks: dict[str, Any] = dict.fromkeys(("student", "teacher"))
    for name, tensors in contents.networks.items():
        networks[origin.get("key", "teacher") if name == "model" else name] = arrays(tensors)
    centers = {name: parallel.place(x, everywhere) for name, x in contents.centers.items()}
    return LoadedModel(
        found.config, origin, model, **networks, centers=centers, step=origin.get("step", 0)
    )


def weights_file(folder: Path) -> Path | None:
    """The file of tensors in a folder, a .safetensors file rather than a .pth."""
    files = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.pth"))
    return next(iter(files), None)
