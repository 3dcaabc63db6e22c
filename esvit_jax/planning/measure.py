"""Compiles and measures one training step, in a process that has its topology's environment.

Bytes come from the compiled program (`traffic`), floating-point operations from the traced step
(`flops`), so that both count every turn of a loop.
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
import re
import sys
import time
from typing import Any

import jax
import numpy as np
from jax.stages import Lowered

from esvit_jax import parallel
from esvit_jax.config import ConfigDict, resolve, unflatten
from esvit_jax.errors import UserError
from esvit_jax.planning import flops, traffic
from esvit_jax.planning.estimate import Floor, floor
from esvit_jax.planning.plan import Plan
from esvit_jax.planning.topology import parse_topology
from esvit_jax.recipe import build
from esvit_jax.state import create_state, init_params


@dataclasses.dataclass(frozen=True)
class Program:
    """One device's compiled step; of one that does not fit only the peak is known."""

    peak_bytes: int
    fits: bool
    argument_bytes: int | None = None
    temp_bytes: int | None = None
    text: str = ""


def answer_order() -> None:
    """What the process does that `plan.plan` starts: reads its order, prints the answer."""
    order = json.load(sys.stdin)
    try:
        plan = measure(unflatten(order.pop("config")), **order)
        answer: dict[str, Any] = dataclasses.asdict(plan)
    except UserError as error:
        value = error.value if isinstance(error.value, int | float | str) else str(error.value)
        answer = {"error": {"message": error.message, "argument": error.argument, "value": value}}
    print(json.dumps(answer))


def measure(
    config: ConfigDict,
    topology: str,
    num_images: int,
    batch_per_chip: int | None = None,
    quick: bool = False,
) -> Plan:
    """Traces and compiles the training step; the process must have the topology's environment.

    Args, returns: see `plan.plan`.

    Raises:
      UserError: the config cannot work on so many chips.
    """
    machine = parse_topology(topology)
    devices, chips = machine.devices(), machine.chips
    if batch_per_chip is not None:
        config.batch_size = batch_per_chip * chips
    numbers = resolve(config, num_images=num_images, num_devices=len(devices))
    recipe = build(config, numbers)
    state = jax.eval_shape(
        lambda key: create_state(recipe.model, recipe.optimizer, init_params(recipe.model, key)),
        jax.random.key(0),
    )
    batch = batch_shapes(config, len(devices), numbers.images_per_device)
    lifted: Any = parallel.lift(recipe.step, config.parallel, donate=True, devices=devices)
    start = time.perf_counter()
    if quick and machine.chip:
        jax.config.update("jax_exec_time_optimization_effort", -1.0)
    program = compile_program(lifted.lower(state, batch))
    seconds = time.perf_counter() - start

    cores = len(devices) // chips
    step_flops = cores * flops.step_flops(recipe.step, state, batch)
    moved = cores * traffic.bytes_accessed(program.text) if program.text else None
    peak, memory = cores * program.peak_bytes, machine.memory
    least = Floor()
    if machine.chip and moved is not None:
        least = floor(
            machine.chip, moved, step_flops,
            batch_size=config.batch_size, total_steps=numbers.total_steps,
        )  # fmt: skip
    return Plan(
        topology=topology,
        chips=chips,
        per_chip_batch=config.batch_size // chips,
        remat=config.remat,
        accum_steps=config.accum_steps,
        quick=quick,
        parameter_bytes=cores * tree_bytes(state.params),
        optimizer_bytes=cores * tree_bytes(state.opt_state[:-1]),
        teacher_bytes=cores * tree_bytes(state.teacher),
        argument_bytes=_times(cores, program.argument_bytes),
        temp_bytes=_times(cores, program.temp_bytes),
        peak_bytes=peak,
        hbm_bytes=memory,
        fits=program.fits and peak <= memory,
        flops=step_flops,
        bytes_accessed=moved,
        **least._asdict(),
        compile_seconds=seconds,
        versions=versions(),
    )


def _times(factor: int, number: int | None) -> int | None:
    return None if number is None else factor * number


def batch_shapes(config: ConfigDict, devices: int, images: int) -> dict[str, jax.ShapeDtypeStruct]:
    """What a step gets from the host, as shapes: `images` for each device."""
    side = config.data.canvas_size
    return {
        "canvas": jax.ShapeDtypeStruct((devices, images, side, side, 3), np.uint8),
        "size": jax.ShapeDtypeStruct((devices, images, 2), np.int32),
    }


def compile_program(lowered: Lowered) -> Program:
    """Memory and text of one device's program; what is known of one that does not fit."""
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        used = used_memory(str(error))
        if used is None:
            raise
        return Program(used, fits=False)
    memory: Any = compiled.memory_analysis()
    new_results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes + new_results
    return Program(
        peak_bytes=peak + memory.generated_code_size_in_bytes,
        fits=True,
        argument_bytes=memory.argument_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        text=compiled.as_text() or "",
    )


def used_memory(message: str) -> int | None:
    """Bytes that a program wanted which the compiler refused as too large; None for other errors.

    >>> used_memory("Ran out of memory in memory space hbm. Used 23.5G of 15.75G hbm.") / 2**30
    23.5
    """
    found = re.search(r"Used ([\d.]+)([KMGT]?) of|\(([\d.]+)([KMGT]?)\) exceeds", message)
    if "Ran out of memory" not in message or not found:
        return None
    amount, unit = found.group(1, 2) if found[1] else found.group(3, 4)
    return int(float(amount) * 1024 ** " KMGT".index(unit or " "))


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree, or shapes of arrays, without the padding of a layout."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def versions() -> dict[str, str]:
    """Of what compiled the step."""
    names = ["jax", "jaxlib"] + ["libtpu"] * (importlib.util.find_spec("libtpu") is not None)
    return {name: importlib.metadata.version(name) for name in names}
