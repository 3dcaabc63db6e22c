"""What the two codes of a CvT's depthwise convolution cost, forward and backward.

python -m esvit_jax.bench.depthwise [--topology=v5e:2x4]

Without a topology both run here, and the processor's time is taken, which others at work on the
machine do not lengthen; with one, the TPU compiler's cost model estimates them, between the norms
that stand before and behind them in a CvT.
"""

import argparse
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from esvit_jax.errors import UserError
from esvit_jax.planning import cycles
from esvit_jax.planning.hlo import Module
from esvit_jax.planning.topology import Topology, parse_topology


class Maps(NamedTuple):
    """Maps that a convolution takes: how many, tokens along a side, features."""

    maps: int
    side: int
    dim: int


# CvT-T's stages 1 to 4 of global views: 8 here, and 64 of 32 images.
STAGES = ((56, 64), (28, 192), (14, 384), (7, 768))
SECONDS = 2.0  # for each timing, of which the least is taken


def codes() -> dict[str, Callable[..., Any]]:
    """By name, as the table has it."""
    from esvit_jax.models.depthwise import by_groups, by_shifts

    return {"by groups": by_groups, "by shifts": by_shifts}


def processor_seconds(function: Callable[..., Any], maps: Maps, dtype: str) -> float:
    """The least that forward and backward took on this machine."""
    import jax

    x, kernel, gradient = (
        jax.random.normal(jax.random.key(i), shape, dtype)
        for i, shape in enumerate([_shape(maps), (3, 3, 1, maps.dim), _shape(maps)])
    )

    @jax.jit
    def run(x, kernel, gradient):
        out, backward = jax.vjp(function, x, kernel)
        return out, backward(gradient)

    jax.block_until_ready(run(x, kernel, gradient))
    times, end = [], time.monotonic() + SECONDS
    while time.monotonic() < end:
        start = time.process_time()
        jax.block_until_ready(run(x, kernel, gradient))
        times.append(time.process_time() - start)
    return min(times)


def estimated_cycles(function: Callable[..., Any], maps: Maps, topology: Topology) -> int:
    """In bfloat16, with the norms; the process must have the topology's environment.

    Raises:
      UserError: a topology that is not of TPUs.
    """
    if topology.chip is None:
        message = "it has no estimates; name one of TPUs, such as v5e:2x4"
        raise UserError(message, argument="topology", value=topology.name)
    import jax
    import jax.numpy as jnp

    def normed(x, axes):
        x = x.astype(jnp.float32)
        x -= jnp.mean(x, axes, keepdims=True)
        return x * jax.lax.rsqrt(jnp.mean(x * x, axes, keepdims=True) + 1e-5)

    def run(x, kernel, gradient):
        def forward(x, kernel):
            y = function(normed(x, -1).astype(x.dtype), kernel.astype(x.dtype))
            return normed(y, (0, 1, 2)).astype(x.dtype)

        out, backward = jax.vjp(forward, x, kernel)
        return out, backward(gradient)

    sharding = jax.sharding.SingleDeviceSharding(topology.devices()[0])
    x = jax.ShapeDtypeStruct(_shape(maps), jnp.bfloat16, sharding=sharding)
    kernel = jax.ShapeDtypeStruct((3, 3, 1, maps.dim), jnp.float32, sharding=sharding)
    compiled = jax.jit(run).lower(x, kernel, x).compile()
    costs = cycles.costs(Module(compiled.as_text() or ""), topology.chip, 1)
    return sum(x.times * x.cycles for x in costs)


def _shape(maps: Maps) -> tuple[int, int, int, int]:
    return maps.maps, maps.side, maps.side, maps.dim


def main() -> None:
    """Prints a table with a row for each stage."""
    parser = argparse.ArgumentParser(description="Costs of CvT's depthwise convolution.")
    parser.add_argument("--topology", help="such as v5e:2x4; left out, this machine's CPU")
    arguments = parser.parse_args()
    import jax

    topology = parse_topology(arguments.topology or "cpu")
    os.environ.update(topology.environment())  # before jax looks for devices
    jax.config.update("jax_platforms", "cpu")
    dtypes = ["bfloat16"] if arguments.topology else ["float32", "bfloat16"]
    unit = "estimated Mcycles" if arguments.topology else "processor's ms"
    table = Table("maps", "tokens", "features", "dtype", *(f"{x}, {unit}" for x in codes()))
    for dtype in dtypes:
        for side, dim in STAGES:
            maps = Maps(64 if arguments.topology else 8, side, dim)
            costs = [
                estimated_cycles(function, maps, topology) / 1e6
                if arguments.topology
                else processor_seconds(function, maps, dtype) * 1e3
                for function in codes().values()
            ]
            table.add_row(
                str(maps.maps), f"{side} x {side}", str(dim), dtype, *(f"{x:.2f}" for x in costs)
            )
    Console().print(table)


if __name__ == "__main__":
    main()
