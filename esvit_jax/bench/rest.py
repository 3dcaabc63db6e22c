"""What a TPU that is not here takes for the rest of Swin-T's step: all but its blocks' attention.

python -m esvit_jax.bench.rest [--topology=v5e:2x4] [--prototype_chunk=4096]

Each part is compiled by itself, forward and backward in bfloat16, for 32 images; see
`bench.block` for whole blocks.
"""

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from esvit_jax.errors import UserError
from esvit_jax.models.layers import Linear, Mlp
from esvit_jax.models.swin import PatchMerging
from esvit_jax.planning import cycles
from esvit_jax.planning.chips import Chip
from esvit_jax.planning.hlo import Module
from esvit_jax.planning.topology import parse_topology
from esvit_jax.prototypes import expected_prototypes, log_normalizer

GLOBAL, LOCAL = 64, 256  # views of 32 images
REGIONS = GLOBAL * 49, LOCAL * 9  # that they have
PROTOTYPES, BOTTLENECK = 65536, 256


class Part(NamedTuple):
    """Something of a step to compile.

    Attributes:
      name: of it.
      function: of the arguments.
      arguments: shapes and dtypes.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


class PartCost(NamedTuple):
    """Of one run on one of a chip's cores.

    Attributes:
      cycles: that the compiler expects.
      bytes_accessed: moved to and from main memory.
      temp_bytes: of temporaries.
    """

    cycles: int
    bytes_accessed: int
    temp_bytes: int


def parts(prototype_chunk: int) -> list[Part]:
    """A product with bias, an MLP, patch merging, and the passes over prototypes."""
    bfloat16, float32 = jnp.bfloat16, jnp.float32
    rows = jax.ShapeDtypeStruct((GLOBAL * 56 * 56, 96), bfloat16)
    maps = jax.ShapeDtypeStruct((GLOBAL, 56, 56, 96), bfloat16)
    student = jax.ShapeDtypeStruct((sum(REGIONS), BOTTLENECK), float32)
    teacher = jax.ShapeDtypeStruct((REGIONS[0], BOTTLENECK), float32)
    vectors = jax.ShapeDtypeStruct((PROTOTYPES, BOTTLENECK), float32)
    center = jax.ShapeDtypeStruct((PROTOTYPES,), float32)

    def losses(student, teacher, own, others, center):
        def total(student, own):
            normalizers, _ = log_normalizer(student, own, 0.1, prototype_chunk, bfloat16)
            expected, entropy = expected_prototypes(
                teacher, others, own, center, 0.04, prototype_chunk, bfloat16
            )
            return normalizers.sum() + jnp.sum(expected**2), entropy.sum()

        return jax.value_and_grad(total, (0, 1), has_aux=True)(student, own)

    return [
        _of_module("query, key, value: stage 1", Linear(3 * 96, dtype=bfloat16), rows),
        _of_module("MLP: stage 1", Mlp(4 * 96, bfloat16), rows),
        _of_module("patch merging: stage 1", PatchMerging(bfloat16), maps),
        Part("prototypes: regions", losses, (student, teacher, vectors, vectors, center)),
    ]


def _of_module(name: str, module: Any, x: jax.ShapeDtypeStruct) -> Part:
    """The output and all gradients, of what another operation makes."""
    params = jax.eval_shape(module.init, jax.random.key(0), x)
    out = jax.eval_shape(module.apply, params, x)

    def run(params, x, gradient):
        value, backward = jax.vjp(module.apply, params, 2 * x)
        return value, backward(gradient)

    return Part(name, run, (params, x, out))


def part_cost(part: Part, chip: Chip, device: Any) -> PartCost:
    """Compiles a part for a device; the process must have the topology's environment."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), part.arguments
    )
    compiled = jax.jit(part.function).lower(*arguments).compile()
    memory: Any = compiled.memory_analysis()
    costs = list(cycles.costs(Module(compiled.as_text() or ""), chip, 1))
    return PartCost(
        cycles=sum(x.times * x.cycles for x in costs),
        bytes_accessed=sum(x.times * x.bytes for x in costs),
        temp_bytes=memory.temp_size_in_bytes,
    )


def main() -> None:
    """Prints a table with a row for each part.

    Raises:
      UserError: a topology that is not of TPUs.
    """
    parser = argparse.ArgumentParser(description="Costs of the rest of Swin's step on a TPU.")
    parser.add_argument("--topology", default="v5e:2x4", help="such as v5e:2x4")
    parser.add_argument("--prototype_chunk", type=int, default=4096, help="as in config.loss")
    arguments = parser.parse_args()
    topology = parse_topology(arguments.topology)
    if topology.chip is None:
        message = "it has no estimates; name one of TPUs, such as v5e:2x4"
        raise UserError(message, argument="--topology", value=topology.name)
    os.environ.update(topology.environment())  # before jax looks for devices
    device, console = topology.devices()[0], Console()
    table = Table(
        "part", "estimated Mcycles", "moved, GB", "temporaries, GB", title=f"on {topology.name}"
    )
    for part in parts(arguments.prototype_chunk):
        console.print(f"compiling {part.name}", highlight=False)
        cost = part_cost(part, topology.chip, device)
        table.add_row(
            part.name, f"{cost.cycles / 1e6:.2f}", f"{cost.bytes_accessed / 1e9:.2f}",
            f"{cost.temp_bytes / 1e9:.2f}",
        )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
