"""Steps that are not finite: reported, and too many in a row end the run with all that shows why.

`esvit replay-bad-step` takes the step again that is left in workdir/bad_step.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import NamedTuple

import jax
import numpy as np
from etils import epath

from esvit_jax.checkpoint import Checkpoints
from esvit_jax.config import ConfigDict
from esvit_jax.config_file import write_config
from esvit_jax.errors import RunError
from esvit_jax.state import TrainState

Batch = dict[str, np.ndarray]


class TriedStep(NamedTuple):
    """A step that was dispatched, and whose outcome nobody has looked at.

    Attributes:
      step: steps before it.
      scalars: of the devices.
      batch: on the host.
    """

    step: int
    scalars: Mapping[str, jax.Array]
    batch: Batch


def stop_if_bad(
    config: ConfigDict,
    workdir: epath.Path,
    checkpoints: Checkpoints,
    state: TrainState,
    tried: TriedStep,
    say: Callable[[str], None],
) -> None:
    """Waits for a step, reports it if it was skipped, and ends a run of too many of them.

    Args:
      config, workdir, checkpoints: of the run.
      state: after its last step.
      tried: the step.
      say: where to report.

    Raises:
      RunError: `config.max_bad_steps` steps in a row were not finite. The state and the step's
        images lie in workdir/bad_step; views follow from config.seed and the step.
    """
    bad_steps = int(tried.scalars["bad_steps"])
    if not bad_steps:
        return
    scalars = {name: float(value) for name, value in tried.scalars.items()}
    say(f"step {tried.step + 1} is not finite and was skipped (loss {scalars['loss']})")
    if bad_steps < config.max_bad_steps:
        return
    directory = workdir / "bad_step"
    directory.mkdir(exist_ok=True)
    if jax.process_index() == 0:
        with (directory / "batch.npz").open("wb") as file:
            np.savez(file, allow_pickle=False, **tried.batch)
        numbers = {"step": tried.step} | scalars
        (directory / "scalars.json").write_text(json.dumps(numbers, indent=1))
        write_config(directory, config, {})
    with closing(Checkpoints(str(directory))) as dump:
        dump.save(tried.step, state, force=True)
    newest = checkpoints.latest_step()
    keep = f"; config.init_from={workdir} keeps what was learned up to step {newest}"
    raise RunError(
        f"the run diverged: {bad_steps} losses in a row were not finite (config.max_bad_steps), "
        f"the last one at step {tried.step + 1}; the images and the state are in {directory}. "
        "Start a new workdir with a lower config.optimizer.learning_rate or "
        "config.optimizer.clip_norm, or with config.dtype=float32" + (keep if newest else "")
    )
