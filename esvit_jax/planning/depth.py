"""The plan of a deep network from those of two that are shallower in one stage.

A stage's blocks are alike (Swin's come in pairs, with windows shifted and not), so that every two
more of them cost the same again; and a TPU's compiler takes time and memory with every one of them.
How well this agrees with compiling the whole is in docs/measurements.md.
"""

import dataclasses
from typing import Any, TypeVar

from esvit_jax.config import ConfigDict, flatten, resolve, unflatten
from esvit_jax.errors import UserError
from esvit_jax.models import create_backbone
from esvit_jax.planning.breakdown import Part
from esvit_jax.planning.estimate import Expected, Floor, expected, floor
from esvit_jax.planning.plan import Plan, plan
from esvit_jax.planning.topology import parse_topology

Number = TypeVar("Number", int, float)
# What grows with the blocks of a stage.
GROWING = (
    "parameter_bytes", "optimizer_bytes", "teacher_bytes", "argument_bytes", "temp_bytes",
    "peak_bytes", "flops", "bytes_accessed", "collective_bytes", "collective_seconds",
    "estimated_cycles",
)  # fmt: skip


def plan_by_depth(config: ConfigDict, topology: str, *, num_images: int, **others: Any) -> Plan:
    """`plan` by the differences of two networks, whose deepest stage has 2 and 4 blocks (3 and 5).

    Args:
      config, topology, num_images: see `plan`.
      **others: of the arguments of `plan`: batch_per_chip, quick, console.

    Returns:
      See `Plan`; its `compiled_depths` are those of the two networks.

    Raises:
      UserError: no stage has more than 5 blocks; what `plan` raises.
    """
    backbone: Any = create_backbone(**config.backbone)
    depths = [int(depth) for depth in backbone.depths]
    stage = depths.index(max(depths))
    low = 2 + depths[stage] % 2
    if depths[stage] <= low + 2:
        raise UserError(
            "no stage has more than 5 blocks to be planned from fewer; leave --shallow out",
            argument="config.backbone.depths", value=tuple(depths),
        )  # fmt: skip
    shallow = []
    for depth in (low, low + 2):
        of_stage = (*depths[:stage], depth, *depths[stage + 1 :])
        changed = unflatten(flatten(config) | {"backbone.depths": of_stage})
        shallow.append((of_stage, plan(changed, topology, num_images=num_images, **others)))
    (first_depths, first), (second_depths, second) = shallow
    result = extrapolated(first, second, (depths[stage] - low) // 2)
    result = dataclasses.replace(result, compiled_depths=[list(first_depths), list(second_depths)])
    chip = parse_topology(topology).chip
    if chip is None or result.bytes_accessed is None:
        return result
    config = unflatten(flatten(config) | {"batch_size": result.per_chip_batch * result.chips})
    numbers = resolve(config, num_images=num_images, num_devices=result.chips * chip.devices)
    run = {"batch_size": config.batch_size, "total_steps": numbers.total_steps}
    least, most = floor(chip, result.bytes_accessed, result.flops, **run), Expected()
    if result.estimated_cycles is not None:
        most = expected(chip, result.estimated_cycles, result.flops, **run)
    return dataclasses.replace(result, **least._asdict(), **most._asdict())


def extrapolated(first: Plan, second: Plan, times: int) -> Plan:
    """The plan that is as far again from `second` as that is from `first`, `times` from first.

    What follows from others (floors, pace, hours) is None; what either does not know is None.
    """

    def farther(a: Number, b: Number) -> Number:
        return a + times * (b - a)

    pairs = {name: (getattr(first, name), getattr(second, name)) for name in GROWING}
    grown = {name: None if None in pair else farther(*pair) for name, pair in pairs.items()}
    parts = None
    if first.breakdown is not None and second.breakdown is not None:
        parts = [
            Part(a.part, farther(a.cycles, b.cycles), farther(a.bytes, b.bytes))
            for a, b in zip(first.breakdown, second.breakdown, strict=True)
        ]
    peak = farther(first.peak_bytes, second.peak_bytes)
    return dataclasses.replace(
        second,
        **{**Floor()._asdict(), **Expected()._asdict(), **grown},
        fits=second.fits and peak <= second.hbm_bytes,
        breakdown=parts,
        costliest=None,
        compile_seconds=first.compile_seconds + second.compile_seconds,
    )
