"""What the compiler's estimates are worth: those of operations whose least time is known.

python -m esvit_jax.planning.calibrate [--topology=v5e:2x4]
"""

import argparse
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.table import Table

from esvit_jax.planning import cycles
from esvit_jax.planning.chips import GIB, Chip
from esvit_jax.planning.hlo import Module
from esvit_jax.planning.topology import Topology, parse_topology

if TYPE_CHECKING:
    import jax

SIDE = 8192  # of the factors of the product


class Probe(NamedTuple):
    """An operation, and what a chip needs for it at least.

    Attributes:
      name: what it is.
      function: of the arguments.
      shapes: of the arguments.
      dtype: of the arguments.
      flops: of matrix products.
      bytes: read and written.
    """

    name: str
    function: Callable[..., "jax.Array"]
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    flops: int
    bytes: int

    def least_seconds(self, chip: Chip) -> float:
        """On one of the chip's cores."""
        seconds = max(self.flops / chip.peak_flops, self.bytes / chip.bandwidth)
        return chip.devices * seconds


def probes() -> list[Probe]:
    """A product, sums of arrays, a copy that turns the axes around, and a reduction."""
    import jax.numpy as jnp

    square, big = (SIDE, SIDE), (GIB // 4 // 1024, 1024)  # `big` is 1 GiB in float32
    return [
        Probe(f"product, {SIDE}³", jnp.matmul, (square,) * 2, "bfloat16", 2 * SIDE**3, 6 * SIDE**2),
        Probe("1 GiB plus 1", lambda x: x + 1, (big,), "float32", 0, 2 * GIB),
        Probe("sum of 1 GiB and 1 GiB", jnp.add, (big,) * 2, "float32", 0, 3 * GIB),
        Probe("transpose of 1 GiB", jnp.transpose, (big,), "float32", 0, 2 * GIB),
        Probe("row sums of 1 GiB", lambda x: x.sum(-1), (big,), "float32", 0, GIB),
    ]


def estimate_seconds(probe: Probe, topology: Topology, chip: Chip) -> float:
    """What the compiler expects; the process must have the topology's environment."""
    import jax

    sharding = jax.sharding.SingleDeviceSharding(topology.devices()[0])
    arguments = [
        jax.ShapeDtypeStruct(shape, probe.dtype, sharding=sharding) for shape in probe.shapes
    ]
    text = jax.jit(probe.function).lower(*arguments).compile().as_text() or ""
    return sum(x.times * x.cycles for x in cycles.costs(Module(text), chip, 1)) / chip.clock


def main() -> None:
    """Prints a row for each probe."""
    parser = argparse.ArgumentParser(description="Estimates beside least times.")
    parser.add_argument("--topology", default="v5e:2x4", help="of TPUs, such as v5e:2x4")
    topology = parse_topology(parser.parse_args().topology)
    if topology.chip is None:
        parser.error("--topology=cpu has no estimates; name one of TPUs, such as v5e:2x4")
    os.environ.update(topology.environment())  # before jax looks for devices
    table = Table("operation", title=f"a core of {topology.name}", title_justify="left")
    for heading in ("least, ms", "estimated, ms", "ratio"):
        table.add_column(heading, justify="right")
    for probe in probes():
        least = probe.least_seconds(topology.chip)
        estimate = estimate_seconds(probe, topology, topology.chip)
        table.add_row(
            probe.name, f"{1e3 * least:.2f}", f"{1e3 * estimate:.2f}", f"{estimate / least:.2f}"
        )
    Console().print(table)


if __name__ == "__main__":
    main()
