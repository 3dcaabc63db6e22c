"""`config.init_from`: training that starts from a network that is there already."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

from esvit_jax.checkpoint import LoadedModel
from esvit_jax.errors import UserError, renamed
from esvit_jax.interop.exported import load_network
from esvit_jax.interop.infer import bad_values

PARTS = ("all", "backbone", "run")


class Start(NamedTuple):
    """Where a run begins.

    Attributes:
      student, teacher: params; what was loaded is on the host.
      centers: {"view": f32[k], "region": f32[k]}, those that are not new.
      epochs: that the run counts as behind it.
      report: what was loaded and what was not, in a few words.
    """

    student: dict[str, Any]
    teacher: dict[str, Any]
    centers: dict[str, Any]
    epochs: float
    report: str


def init_from(
    params: Mapping[str, Any], init_from: str, init_parts: str, init_step: int | None = None
) -> Start:
    """What a run begins with, in place of random params.

    With "all" or "backbone" it begins anew, student and teacher both at the one network that a
    checkpoint is evaluated by: of a run the teacher, of a converted checkpoint or an export the one
    that it was made for (`--key`).

    With "run" it goes on where another run was, as the published code does from a checkpoint of
    matching views alone: student, teacher, centers and the epoch are the checkpoint's, so that
    schedules go on; a head that it lacks is new, and so are the optimiser's moments (the public
    code cannot restore them either where there are more params than before).

    Args:
      params: {"backbone", "view_head", "region_head"} (the last may be missing), as initialised.
      init_from: workdir, converted checkpoint or export.
      init_parts: "all", "backbone" to leave the heads as they are, or "run".
      init_step: of the checkpoint; None is the newest that is not damaged.

    Raises:
      UserError: `init_from` holds no (such) model, lacks a tensor of what is taken, has it in
        another shape or with `bad_values`, all such tensors are listed; or it lacks one of a run's
        networks, or does not tell its epoch.
    """
    if init_parts not in PARTS:
        raise UserError(
            f"it must be one of {', '.join(PARTS)}", argument="init_parts", value=init_parts
        )
    with renamed(workdir="init_from", step="init_step"):
        loaded = load_network(init_from, init_step)
    wanted = ["backbone"] if init_parts == "backbone" else list(params)
    if init_parts == "run":
        wanted = [part for part in params if part in loaded.network()]
        networks = {"student": loaded.student, "teacher": loaded.teacher}
        if lacking := [name for name, network in networks.items() if network is None]:
            raise UserError(
                f"{init_from} was exported without the {lacking[0]}; init_parts = 'all' or "
                "'backbone' begins anew",
                argument="init_parts", value="run",
            )  # fmt: skip
    else:
        networks = {"network": loaded.network()}

    lines = []
    for name, network in networks.items():
        lines += _misfits(params, network, wanted, f"{name} " if len(networks) > 1 else "")
    if lines:
        raise UserError(
            f"it does not fit this config's {' and '.join(wanted)} (init_parts = 'backbone' leaves "
            "the heads random, `esvit convert --window` resizes bias tables):\n  "
            + "\n  ".join(lines),
            argument="init_from", value=init_from,
        )  # fmt: skip
    taken = {
        name: {**params, **{part: jax.tree.map(np.asarray, network[part]) for part in wanted}}
        for name, network in networks.items()
    }
    count = len(jax.tree.leaves({part: params[part] for part in wanted}))
    report = f"loaded {', '.join(wanted)} ({count} tensors) from {init_from}, step {loaded.step}"
    if random := [part for part in params if part not in wanted]:
        report += f"; random: {', '.join(random)}"
    if unused := [part for part in loaded.network() if part not in wanted]:
        report += f"; not used: {', '.join(unused)}"
    if init_parts != "run":
        return Start(taken["network"], taken["network"], {}, 0.0, report)
    epochs = _epochs(loaded, init_from)
    heads = [name for name in loaded.centers if f"{name}_head" in wanted]
    centers = {name: np.asarray(loaded.centers[name]) for name in heads}
    report += f"; goes on at epoch {epochs:.4g}, with new moments"
    return Start(taken["student"], taken["teacher"], centers, epochs, report)


def _misfits(
    params: Mapping[str, Any], network: Mapping[str, Any], wanted: list[str], prefix: str
) -> list[str]:
    """What hinders that parts of a network take the place of params, a line each."""
    ours: dict[str, Any]
    theirs: dict[str, Any]
    ours, theirs = (
        traverse_util.flatten_dict({part: x[part] for part in wanted if part in x}, sep="/")
        for x in (params, network)
    )
    lines = [f"missing: {prefix}{name}" for name in ours if name not in theirs]
    lines += [
        f"wrong shape: {prefix}{name} is {list(theirs[name].shape)}, not {list(x.shape)}"
        for name, x in ours.items()
        if name in theirs and theirs[name].shape != x.shape
    ]
    lines += [f"unknown: {prefix}{name}" for name in theirs if name not in ours]
    used = {name: theirs[name] for name in ours if name in theirs}
    return lines + [f"{prefix}{name}: {words}" for name, words in bad_values(used).items()]


def _epochs(loaded: LoadedModel, init_from: str) -> float:
    """Epochs of training behind a checkpoint.

    Raises:
      UserError: it does not say.
    """
    if "steps_per_epoch" in loaded.origin:
        return loaded.step / loaded.origin["steps_per_epoch"]
    if (epoch := loaded.origin.get("epoch")) is not None:
        return float(epoch)
    raise UserError(
        f"{init_from} does not tell the epoch to go on at; init_parts = 'all' begins anew",
        argument="init_parts", value="run",
    )  # fmt: skip
