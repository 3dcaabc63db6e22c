"""What one Swin block costs on a TPU that is not here, forward and backward.

python -m esvit_jax.bench.block [--topology=v5e:2x4] [--logits_dtype=float32|bfloat16]

The whole step takes the TPU compiler many minutes; what a change to a block does shows here in
a few.
"""

import argparse
import functools
import math
import os
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from esvit_jax.errors import UserError
from esvit_jax.planning import cycles
from esvit_jax.planning.hlo import Module
from esvit_jax.planning.topology import Topology, parse_topology


class Block(NamedTuple):
    """A block of windows of 7 x 7 and the maps that pass through it.

    Attributes:
      maps: views times images.
      side: tokens along a map's side.
      dim: features.
      heads: of attention.
      shift: tokens that windows are shifted by.
    """

    maps: int
    side: int
    dim: int
    heads: int
    shift: int


class BlockCost(NamedTuple):
    """Forward and backward on one of a chip's cores.

    Attributes:
      cycles: that the compiler's cost model expects.
      bytes_accessed: moved to and from main memory.
      temp_bytes: of temporaries.
    """

    cycles: int
    bytes_accessed: int
    temp_bytes: int


# 32 images: Swin-T's stages 1 and 3 of global views, and all four of local ones.
BLOCKS = (
    Block(64, 56, 96, 3, 3),
    Block(64, 14, 384, 12, 3),
    Block(256, 24, 96, 3, 3),
    Block(256, 12, 192, 6, 3),
    Block(256, 6, 384, 12, 3),
    Block(256, 3, 768, 24, 0),
)


def block_cost(block: Block, topology: Topology, logits_dtype: str) -> BlockCost:
    """Compiles a block in bfloat16; the process must have the topology's environment.

    Args:
      block: which.
      topology: of TPUs; one of its devices is compiled for.
      logits_dtype: of the attention logits.

    Raises:
      UserError: a topology that is not of TPUs.
    """
    if topology.chip is None:
        message = "it has no estimates; name one of TPUs, such as v5e:2x4"
        raise UserError(message, argument="topology", value=topology.name)
    import jax
    import jax.numpy as jnp

    from esvit_jax.models.swin import SwinBlock

    sharding = jax.sharding.SingleDeviceSharding(topology.devices()[0])
    key = jax.random.key(0)
    module = SwinBlock(
        num_heads=block.heads, window_size=7, shift=block.shift, mlp_ratio=4.0,
        drop_path_rate=0.1, dtype=jnp.bfloat16, logits_dtype=jnp.dtype(logits_dtype),
    )  # fmt: skip
    shape = block.maps, block.side, block.side

    def run(params, rows, gradient):
        def forward(params, rows):
            drawn = jax.random.uniform(key, (2, block.maps))
            return module.apply(params, rows, shape, drawn)[0]

        out, backward = jax.vjp(forward, params, rows)
        return out, backward(gradient)

    def placed(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    rows = placed(jax.ShapeDtypeStruct((math.prod(shape), block.dim), jnp.bfloat16))
    init = functools.partial(module.init, key, shape=shape)
    params = jax.tree.map(placed, jax.eval_shape(init, rows))
    compiled = jax.jit(run).lower(params, rows, rows).compile()
    memory: Any = compiled.memory_analysis()
    costs = list(cycles.costs(Module(compiled.as_text() or ""), topology.chip, 1))
    return BlockCost(
        cycles=sum(x.times * x.cycles for x in costs),
        bytes_accessed=sum(x.times * x.bytes for x in costs),
        temp_bytes=memory.temp_size_in_bytes,
    )


def main() -> None:
    """Prints a table with a row for each of BLOCKS."""
    parser = argparse.ArgumentParser(description="Costs of Swin's blocks on a TPU.")
    parser.add_argument("--topology", default="v5e:2x4", help="such as v5e:2x4")
    parser.add_argument("--logits_dtype", default="float32", help="float32 or bfloat16")
    arguments = parser.parse_args()
    topology = parse_topology(arguments.topology)
    os.environ.update(topology.environment())  # before jax looks for devices
    console = Console()
    table = Table(
        "maps", "tokens", "features", "heads", "shift",
        "estimated Mcycles", "moved, GB", "temporaries, GB",
        title=f"blocks on {topology.name}, logits in {arguments.logits_dtype}",
    )  # fmt: skip
    for block in BLOCKS:
        with console.status(f"compiling for {topology.name}"):
            cost = block_cost(block, topology, arguments.logits_dtype)
        table.add_row(
            str(block.maps), f"{block.side} x {block.side}",
            *(str(x) for x in (block.dim, block.heads, block.shift)),
            f"{cost.cycles / 1e6:.2f}", f"{cost.bytes_accessed / 1e9:.2f}",
            f"{cost.temp_bytes / 1e9:.2f}",
        )  # fmt: skip
        if not console.is_interactive:
            console.print(f"{block}: {cost}", highlight=False, soft_wrap=True)
    console.print(table)


if __name__ == "__main__":
    main()
