"""`config.init_from`: training that starts from a network that is there already."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from esvit_jax import checkpoint
from esvit_jax.errors import UserError


def init_from(params: Mapping[str, Any], path: str, parts: str) -> tuple[dict[str, Any], str]:
    """Replaces params by those of a run or a converted checkpoint.

    Of a run the newest checkpoint's teacher is taken; of a converted checkpoint the network that
    it was converted for (`--key`).

    Args:
      params: {"backbone", "view_head", "region_head"} (the last may be missing), as initialised.
      path: workdir or converted checkpoint.
      parts: "all", or "backbone" to leave the heads as they are.

    Returns:
      The new params, and what was loaded and what was not, in a few words.

    Raises:
      UserError: `path` holds no model, lacks a tensor of `parts`, or has it in another shape; all
        such tensors are listed.
    """
    loaded = checkpoint.load_model(path)
    wanted = ["backbone"] if parts == "backbone" else list(params)
    ours: dict[str, Any] = traverse_util.flatten_dict(
        {part: params[part] for part in wanted}, sep="/"
    )
    theirs: dict[str, Any] = traverse_util.flatten_dict(dict(loaded.network()), sep="/")

    lines = [f"missing: {name}" for name in ours if name not in theirs]
    lines += [
        f"wrong shape: {name} is {list(theirs[name].shape)}, not {list(x.shape)}"
        for name, x in ours.items()
        if name in theirs and theirs[name].shape != x.shape
    ]
    lines += [
        f"unknown: {name}" for name in theirs if name not in ours and name.split("/")[0] in wanted
    ]
    if lines:
        raise UserError(
            f"config.init_from = {path!r} does not fit this config's {' and '.join(wanted)} "
            "(config.init_parts = 'backbone' leaves the heads random, `esvit convert --window` "
            "resizes bias tables):\n  " + "\n  ".join(lines)
        )
    # Through the host: the loaded arrays lie on all devices, the others on one.
    new = {name: jnp.asarray(np.asarray(theirs[name])) for name in ours}
    report = f"loaded {', '.join(wanted)} ({len(new)} tensors) from {path}, step {loaded.step}"
    if random := [part for part in params if part not in wanted]:
        report += f"; random: {', '.join(random)}"
    if unused := [part for part in loaded.network() if part not in wanted]:
        report += f"; not used: {', '.join(unused)}"
    return {**params, **traverse_util.unflatten_dict(new, sep="/")}, report
