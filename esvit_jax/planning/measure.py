"""Compiles and measures one training step, in a process that has its topology's environment.

Bytes and cycles come from the compiled program (`traffic`, `cycles`), floating-point operations
from the traced step (`flops`), so that all count every turn of a loop.
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.stages import Lowered

from esvit_jax import parallel
from esvit_jax.config import ConfigDict, resolve, unflatten
from esvit_jax.errors import UserError
from esvit_jax.models.kernels import compiling_for
from esvit_jax.planning import cycles
from esvit_jax.planning.breakdown import Costliest, Part, breakdown, costliest
from esvit_jax.planning.estimate import Expected, Floor, expected, floor
from esvit_jax.planning.flops import step_flops
from esvit_jax.planning.hlo import Module
from esvit_jax.planning.plan import Plan
from esvit_jax.planning.topology import Topology, parse_topology
from esvit_jax.planning.traffic import Traffic
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
        answer = measure(unflatten(order.pop("config")), **order).as_json()
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
    top: int = 0,
    dump_hlo: str | None = None,
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
    step: Any = parallel.on_all_devices(recipe.step, config.parallel, donate=True, devices=devices)
    if quick and machine.chip:
        jax.config.update("jax_exec_time_optimization_effort", -1.0)
    start = time.perf_counter()
    with compiling_for(devices[0].device_kind):  # and not for the CPU that traces it
        lowered = step.lower(state, batch)
    program = compile_program(lowered)
    seconds = time.perf_counter() - start

    cores, memory = len(devices) // chips, machine.memory
    peak, operations = cores * program.peak_bytes, cores * step_flops(recipe.step, state, batch)
    run = {"batch_size": config.batch_size, "total_steps": numbers.total_steps}
    account = Account()
    if program.text and not (quick and machine.chip):
        account = take_account(program.text, machine, operations, top, **run)

    def held(tree: Any) -> int:  # of a chip
        parts = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                parallel.held_shape(x.shape, config.parallel, devices), x.dtype
            ),
            tree,
        )
        return cores * tree_bytes(parts)

    result = Plan(
        topology=topology,
        chips=chips,
        per_chip_batch=config.batch_size // chips,
        parallel=config.parallel,
        remat=config.remat,
        accum_steps=config.accum_steps,
        quick=quick,
        parameter_bytes=held(state.params),
        optimizer_bytes=held(state.opt_state[:-1]),
        teacher_bytes=held(state.teacher),
        argument_bytes=_times(cores, program.argument_bytes),
        temp_bytes=_times(cores, program.temp_bytes),
        peak_bytes=peak,
        hbm_bytes=memory,
        fits=program.fits and peak <= memory,
        flops=operations,
        **account.fields(),
        compile_seconds=seconds,
        versions=versions(),
    )
    if dump_hlo and program.text:
        keep_program(dump_hlo, program.text, result, run)
    return result


class Account(NamedTuple):
    """What the text of a program says beyond its memory; None is what it does not."""

    bytes_accessed: int | None = None
    collective_bytes: int | None = None
    collective_seconds: float | None = None
    floor: Floor = Floor()
    expected: Expected = Expected()
    breakdown: list[Part] | None = None
    costliest: list[Costliest] | None = None

    def fields(self) -> dict[str, Any]:
        """Those of a `Plan`."""
        fields = self._asdict()
        return {**fields.pop("floor")._asdict(), **fields.pop("expected")._asdict(), **fields}


def take_account(
    text: str, machine: Topology, operations: int, top: int, *, batch_size: int, total_steps: int
) -> Account:
    """Bytes, floors and estimates of a compiled step.

    Args:
      text: its optimised HLO.
      machine: that it is compiled for; of a CPU's program only the bytes are counted.
      operations: of its matrix products, on all cores of a chip.
      top: how many of the costliest instructions to name.
      batch_size, total_steps: of the run.
    """
    module = Module(text)
    chip, run = machine.chip, {"batch_size": batch_size, "total_steps": total_steps}
    if chip is None:
        return Account(bytes_accessed=Traffic(module).total())
    costs = list(cycles.costs(module, chip, machine.chips))
    moved = chip.devices * sum(x.times * x.bytes for x in costs)
    sent = cycles.collective_bytes(module, machine.chips)
    rows = [row._replace(bytes=chip.devices * row.bytes) for row in breakdown(costs, module)]
    return Account(
        bytes_accessed=moved,
        collective_bytes=sent,
        collective_seconds=sent / chip.link_bandwidth,
        floor=floor(chip, moved, operations, **run),
        expected=expected(chip, sum(x.times * x.cycles for x in costs), operations, **run),
        breakdown=rows,
        costliest=costliest(costs, module, top),
    )


def keep_program(path: str, text: str, plan: Plan, run: dict[str, int]) -> None:
    """Writes a program, and before it as a comment what `account_again` needs besides."""
    header = json.dumps({"plan": plan.as_json(), "run": run})
    unfinished = Path(f"{path}.part")
    unfinished.write_text(f"// {header}\n{text}")
    unfinished.replace(path)


def account_again(path: str | os.PathLike[str], top: int = 0) -> Plan:
    """The plan of a program that was kept, by today's accounting; nothing is compiled.

    Args:
      path: see `keep_program`.
      top: how many of the costliest instructions to name.

    Raises:
      UserError: the file cannot be read, or holds no such program; a negative `top`.
    """
    if top < 0:
        raise UserError("it must be at least 0", argument="top", value=top)
    try:
        header, _, text = Path(path).read_text().partition("\n")
        kept = json.loads(header.removeprefix("// "))
        plan = Plan.from_json(kept["plan"])
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        message = "there is no program in it that `esvit plan --dump_hlo` kept"
        raise UserError(message, argument="path", value=os.fspath(path)) from error
    if plan.quick:
        return plan
    machine = parse_topology(plan.topology)
    account = take_account(text, machine, plan.flops, top, **kept["run"])
    return dataclasses.replace(plan, **account.fields())


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
