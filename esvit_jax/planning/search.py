"""The largest batch that fits a chip, found with few compilations."""

from collections.abc import Callable
from typing import NamedTuple

from esvit_jax.planning.plan import Plan

BATCH_STEP = 8  # the search tries multiples of it: a TPU's registers have 8 rows


# (images a chip, remat, accum_steps) -> the plan of that variation of a config.
Attempt = Callable[[int, str, int], Plan]


class Found(NamedTuple):
    """What `search` found for one `config.remat`; None where nothing fits.

    Attributes:
      remat: see `config.remat`.
      largest: the plan of the largest batch without accumulation, of up to four times the
        config's batch.
      recipe: the plan of the config's batch, with the fewest `accum_steps` that make it fit.
    """

    remat: str
    largest: Plan | None
    recipe: Plan | None


def search(wanted: int, attempt: Attempt) -> list[Found]:
    """The largest batch a chip for each `config.remat`, and what the config's own batch takes.

    Args:
      wanted: images a chip of the config itself.
      attempt: see `Attempt`.
    """
    found = []
    for remat in ("none", "dots", "block"):
        largest = largest_batch(lambda batch, r=remat: attempt(batch, r, 1), limit=4 * wanted)
        recipe = None
        if largest:
            parts = (a for a in range(1, wanted + 1) if wanted % a == 0)
            tries = (
                attempt(wanted, remat, a) for a in parts if wanted // a <= largest.per_chip_batch
            )
            recipe = next((result for result in tries if result.fits), None)
        found.append(Found(remat, largest, recipe))
    return found


def largest_batch(attempt: Callable[[int], Plan], limit: int) -> Plan | None:
    """The plan of the largest multiple of BATCH_STEP images a chip, up to `limit`, that fits.

    Memory is close to a line in the batch: two small batches say where to look, and from there it
    goes step by step to the last one that fits. None if not even BATCH_STEP images do.
    """
    last = max(1, limit // BATCH_STEP)
    plans: dict[int, Plan] = {}  # by steps

    def fits(steps: int) -> bool:
        # The ends need no compilation: nothing fits, and more than the limit is not asked.
        if not 0 < steps <= last:
            return steps == 0
        if steps not in plans:
            plans[steps] = attempt(steps * BATCH_STEP)
        return plans[steps].fits

    steps = 1
    if last > 2 and fits(1):
        fits(2)
        one, two = plans[1], plans[2]
        slope = max(1, two.peak_bytes - one.peak_bytes)
        steps += int((one.hbm_bytes - one.peak_bytes) / slope)
        steps = max(1, min(steps, last))
    while fits(steps):
        steps += 1
    while not fits(steps):
        steps -= 1
    return plans[steps] if steps else None
