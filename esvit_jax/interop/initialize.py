"""`config.init_from`: training that starts from a network that is there already."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from esvit_jax import checkpoint
from esvit_jax.errors import UserError, renamed
from esvit_jax.interop.infer import not_finite


def init_from(
    params: Mapping[str, Any], init_from: str, init_parts: str
) -> tuple[dict[str, Any], str]:
    """Replaces params by those of a run or a converted checkpoint.

    Of a run the newest checkpoint's teacher is taken; of a converted checkpoint the network that
    it was converted for (`--key`).

    Args:
      params: {"backbone", "view_head", "region_head"} (the last may be missing), as initialised.
      init_from: workdir or converted checkpoint.
      init_parts: "all", or "backbone" to leave the heads as they are.

    Returns:
      The new params, those that were loaded on the host; and what was loaded and what was not, in a
      few words.

    Raises:
      UserError: `init_from` holds no model, lacks a tensor of `init_parts`, or has it in another
        shape or with values that are not finite; all such tensors are listed.
    """
    if init_parts not in ("all", "backbone"):
        raise UserError("it must be 'all' or 'backbone'", argument="init_parts", value=init_parts)
    with renamed(workdir="init_from"):
        loaded = checkpoint.load_model(init_from)
    wanted = ["backbone"] if init_parts == "backbone" else list(params)
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
    used = {name: theirs[name] for name in ours if name in theirs}
    lines += [f"{name}: {words}" for name, words in not_finite(used).items()]
    if lines:
        raise UserError(
            f"it does not fit this config's {' and '.join(wanted)} (init_parts = 'backbone' leaves "
            "the heads random, `esvit convert --window` resizes bias tables):\n  "
            + "\n  ".join(lines),
            argument="init_from", value=init_from,
        )  # fmt: skip
    new = {name: np.asarray(theirs[name]) for name in ours}
    report = f"loaded {', '.join(wanted)} ({len(new)} tensors) from {init_from}, step {loaded.step}"
    if random := [part for part in params if part not in wanted]:
        report += f"; random: {', '.join(random)}"
    if unused := [part for part in loaded.network() if part not in wanted]:
        report += f"; not used: {', '.join(unused)}"
    return {**params, **traverse_util.unflatten_dict(new, sep="/")}, report
