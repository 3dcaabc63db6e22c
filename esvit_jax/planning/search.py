"""`esvit plan`: what a run needs on a machine that is not here, by compiling its training step.

The step is compiled in a process of its own (`measure`), whose environment keeps libtpu from
looking for a TPU. From what it costs follows a floor: no step of this program is faster than its
bytes at the chip's bandwidth, or its matrix products at the chip's peak. How much slower it is,
only the chip can tell.
"""

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from esvit_jax.config import ConfigDict, flatten, unflatten
from esvit_jax.errors import UserError
from esvit_jax.planning import measure

IMAGENET_IMAGES = 1_281_167  # of the training split of ImageNet-1K
BATCH_STEP = 8  # the search tries multiples of it: a TPU's registers have 8 rows
CHILD = "from esvit_jax.planning import search; search.run_order()"


def plan(
    config: ConfigDict,
    topology: str,
    *,
    num_images: int = IMAGENET_IMAGES,
    batch_per_chip: int | None = None,
    quick: bool = False,
) -> dict[str, Any]:
    """Compiles the training step for a topology, in a process of its own, and measures it.

    Args:
      config: see `config.default_config`; its batch is spread over all chips.
      topology: "v5e:2x4" and the like, or "cpu" for this machine.
      num_images: in the training split.
      batch_per_chip: images, in place of config.batch_size / chips.
      quick: see `measure.measure`.

    Returns:
      See `measure.measure`.

    Raises:
      UserError: an unknown topology, no libtpu, or a config that cannot work on so many chips.
      RuntimeError: the compiler failed.
    """
    measure.check_topology(topology)
    if batch_per_chip is not None and batch_per_chip < 1:
        raise UserError(f"--batch_per_chip={batch_per_chip}: it must be at least 1")
    order = {
        "config": flatten(config), "topology": topology, "num_images": num_images,
        "batch_per_chip": batch_per_chip, "quick": quick,
    }  # fmt: skip
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD],
        input=json.dumps(order),
        env=os.environ | measure.environment(topology),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if refusal := re.search(r"Check failed: .*", child.stderr) if child.returncode < 0 else None:
        raise UserError(f"--topology={topology}: libtpu gave up: {refusal[0]}")
    if child.returncode:
        raise RuntimeError(f"compiling for {topology} failed:\n{child.stderr}")
    answer = json.loads(child.stdout.splitlines()[-1])
    if "error" in answer:
        raise UserError(answer["error"])
    return answer


def run_order() -> None:
    """The process of its own: reads the order from standard input, prints the answer."""
    order = json.load(sys.stdin)
    try:
        answer = measure.measure(unflatten(order.pop("config")), **order)
    except UserError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))


def search(facts: dict[str, Any], attempt: Callable[..., dict[str, Any]]) -> list[dict[str, Any]]:
    """The largest batch a chip for each `config.remat`, and what the config's own batch takes.

    Args:
      facts: the plan of the config itself.
      attempt: (images a chip, remat=, accum_steps=) -> its plan.

    Returns:
      For each remat two plans, None where there is none: `largest`, without accumulation and up
      to four times the config's batch, and `recipe`, the config's batch with the fewest
      `accum_steps` that make it fit.
    """
    wanted, found = facts["per_chip_batch"], []
    for remat in ("none", "dots", "block"):
        largest = largest_batch(
            functools.partial(attempt, remat=remat, accum_steps=1), limit=4 * wanted
        )
        recipe = None
        if largest:
            parts = (a for a in range(1, wanted + 1) if wanted % a == 0)
            tries = (
                attempt(wanted, remat=remat, accum_steps=a)
                for a in parts
                if wanted // a <= largest["per_chip_batch"]
            )
            recipe = next((result for result in tries if result["fits"]), None)
        found.append({"remat": remat, "largest": largest, "recipe": recipe})
    return found


def largest_batch(attempt: Callable[[int], dict[str, Any]], limit: int) -> dict[str, Any] | None:
    """The plan of the largest multiple of BATCH_STEP images a chip, up to `limit`, that fits.

    Memory is close to a line in the batch: two small batches say where to look, and from there it
    goes step by step to the last one that fits. None if not even BATCH_STEP images do.
    """
    last = max(1, limit // BATCH_STEP)
    # By steps. The ends need no compilation: nothing fits, and more than the limit is not asked.
    plans = {0: {"fits": True}, last + 1: {"fits": False}}

    def fits(steps: int) -> bool:
        if steps not in plans:
            plans[steps] = attempt(steps * BATCH_STEP)
        return plans[steps]["fits"]

    steps = 1
    if last > 2 and fits(1):
        fits(2)
        one, two = plans[1], plans[2]
        slope = max(1, two["peak_bytes"] - one["peak_bytes"])
        steps += int((one["hbm_bytes"] - one["peak_bytes"]) / slope)
        steps = max(1, min(steps, last))
    while fits(steps):
        steps += 1
    while not fits(steps):
        steps -= 1
    return plans[steps] if steps else None
