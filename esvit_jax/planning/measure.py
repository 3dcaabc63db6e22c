"""What one training step costs on a described machine: memory, operations, bytes, least time.

The step is compiled for a TPU by the compiler in libtpu, which needs no TPU. Bytes come from the
compiled program (`hlo`), floating-point operations from the traced step, so that both count every
turn of a loop.
"""

import importlib.metadata
import importlib.util
import math
import os
import re
import time
from typing import Any

import jax
import numpy as np

from esvit_jax import parallel
from esvit_jax.config import ConfigDict, resolve
from esvit_jax.errors import UserError
from esvit_jax.planning import traffic
from esvit_jax.planning.chips import CHIPS
from esvit_jax.recipe import build
from esvit_jax.state import create_state, init_params
from esvit_jax.steps import AXIS


def check_topology(topology: str) -> None:
    """Refuses what is no topology, and a TPU's without libtpu.

    Raises:
      UserError: says what is known, or what to install.
    """
    if topology == "cpu":
        return
    generation, _, shape = topology.partition(":")
    if generation not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", shape):
        raise UserError(
            f"--topology={topology} is unknown; known are cpu and {', '.join(CHIPS)} with the "
            "number of chips along each axis, such as v5e:2x4, v4:2x2x1 or v6e:16x16"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology={topology} needs the TPU compiler; install it with "
            'pip install "esvit_jax[tpu]" (or the libtpu that jax[tpu] names)'
        )


def _chip_and_shape(topology: str) -> tuple[Any, list[int]]:
    generation, _, shape = topology.partition(":")
    return CHIPS[generation], [int(size) for size in shape.split("x")]


def environment(topology: str) -> dict[str, str]:
    """Variables of a process that compiles for a topology: libtpu is not to look for a TPU."""
    if topology == "cpu":
        return {"JAX_PLATFORMS": "cpu"}
    chip, shape = _chip_and_shape(topology)
    return {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": chip.accelerator_type.format(math.prod(shape) * chip.cores_in_type),
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        # Nothing is run on a TPU, so one that is in use here need not be waited for.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }


def topology_devices(topology: str) -> tuple[list[Any], int]:
    """The devices of a topology, and how many chips they make up.

    v2, v3 and v7x have two devices a chip, one a core.

    Raises:
      UserError: libtpu cannot make out the topology.
    """
    if topology == "cpu":
        return jax.devices(), jax.device_count()
    from jax.experimental import topologies

    chip, shape = _chip_and_shape(topology)
    name = f"{chip.topology_name}:{'x'.join(map(str, shape))}"
    bounds = [min(2, size) for size in shape] + [1] * (3 - len(shape))
    try:
        description = topologies.get_topology_desc(
            name, "tpu", chip_config_name=chip.config_name, chips_per_host_bounds=bounds
        )
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--topology={topology}: {' '.join(str(error).split())}") from error
    return list(description.devices), math.prod(shape)


def measure(
    config: ConfigDict,
    topology: str,
    num_images: int,
    batch_per_chip: int | None = None,
    quick: bool = False,
) -> dict[str, Any]:
    """Traces and compiles the training step; the process must have the topology's `environment`.

    Args:
      config, topology, num_images, batch_per_chip: see `plan.plan`.
      quick: tell the TPU compiler to try less hard. Swin-T's teacher compiles in half the time
        then, and takes 15 % more memory: what fits a quick plan fits.

    Returns:
      Numbers by name, ready for JSON, a chip and step where not said otherwise: `topology`,
      `chips`, `per_chip_batch`, `remat`, `accum_steps`, `quick`, `parameter_bytes`,
      `optimizer_bytes`, `teacher_bytes`, `argument_bytes` (state and batch with the padding of
      their layout), `temp_bytes`, `peak_bytes` (all that is held at once), `hbm_bytes` (the
      chip's memory), `fits`, `flops` (of matrix products), `bytes_accessed` (to and from that
      memory), `floor_seconds`, `floor_images_per_second` (of all chips), `floor_hours` (of the
      whole run), `compile_seconds`, `versions`. None is what is not known: a step that does not
      fit has no program to measure, and this machine's CPU no bandwidth to divide by.

    Raises:
      UserError: the config cannot work on so many chips.
    """
    devices, chips = topology_devices(topology)
    if batch_per_chip is not None:
        config.batch_size = batch_per_chip * chips
    numbers = resolve(config, num_images=num_images, num_devices=len(devices))
    recipe = build(config, numbers)
    step = recipe.step
    state = jax.eval_shape(
        lambda key: create_state(recipe.model, recipe.optimizer, init_params(recipe.model, key)),
        jax.random.key(0),
    )
    batch = batch_shapes(config, len(devices), numbers.images_per_device)
    lifted: Any = parallel.lift(step, config.parallel, donate=True, devices=devices)
    start = time.perf_counter()
    options = {"exec_time_optimization_effort": -1.0} if quick and topology != "cpu" else {}
    program = compile_program(lifted.lower(state, batch), options)
    seconds = time.perf_counter() - start

    per_device = program | {
        "parameter_bytes": tree_bytes(state.params),
        "optimizer_bytes": tree_bytes(state.opt_state[:-1]),
        "teacher_bytes": tree_bytes(state.teacher),
        "flops": step_flops(step, state, batch),
    }
    cores = len(devices) // chips
    per_chip: dict[str, Any] = {
        name: None if x is None else cores * x for name, x in per_device.items()
    }
    hbm = host_memory() // chips if topology == "cpu" else _chip_and_shape(topology)[0].memory
    facts = {
        "topology": topology,
        "chips": chips,
        "per_chip_batch": config.batch_size // chips,
        "remat": config.remat,
        "accum_steps": config.accum_steps,
        "quick": quick,
        **per_chip,
        "hbm_bytes": hbm,
        "fits": program["bytes_accessed"] is not None and per_chip["peak_bytes"] <= hbm,
    }
    floors = floor(facts, config.batch_size, numbers.total_steps)
    return facts | floors | {"compile_seconds": seconds, "versions": versions()}


def batch_shapes(config: ConfigDict, devices: int, images: int) -> dict[str, Any]:
    """What a step gets from the host, as shapes: `images` for each device."""
    side = config.data.canvas_size
    return {
        "canvas": jax.ShapeDtypeStruct((devices, images, side, side, 3), np.uint8),
        "size": jax.ShapeDtypeStruct((devices, images, 2), np.int32),
    }


def compile_program(lowered: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Memory and traffic of one device's program; what is known of one that does not fit."""
    try:
        compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        used = used_memory(str(error))
        if used is None:
            raise
        return dict.fromkeys(("argument_bytes", "temp_bytes", "bytes_accessed")) | {
            "peak_bytes": used
        }
    memory = compiled.memory_analysis()
    new_results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    sizes = {
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
    }
    return sizes | {
        "peak_bytes": sum(sizes.values()) + new_results + memory.generated_code_size_in_bytes,
        "bytes_accessed": traffic.bytes_accessed(compiled.as_text()),
    }


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


def step_flops(step: Any, state: Any, batch: dict[str, Any]) -> int:
    """`matmul_flops` of a training step on one of the devices that `batch` is laid out for."""
    devices = batch["size"].shape[0]
    share = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)
    return matmul_flops(jax.make_jaxpr(step, axis_env=[(AXIS, devices)])(state, share).jaxpr)


def matmul_flops(jaxpr: Any) -> int:
    """Operations of all matrix products and convolutions, a multiply-add being two.

    Read from the traced function, which has the length of each loop; what a backward pass
    computes again (`config.remat`) is in it. Of a conditional's branches the largest counts.
    """
    total = 0
    for equation in jaxpr.eqns:
        params, name = equation.params, equation.primitive.name
        inner = [
            matmul_flops(getattr(part, "jaxpr", part))
            for value in params.values()
            for part in (value if isinstance(value, list | tuple) else [value])
            if hasattr(getattr(part, "jaxpr", part), "eqns")
        ]
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * equation.outvars[0].aval.size * depth
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval
            outputs = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
            total += 2 * equation.outvars[0].aval.size * (kernel.size // outputs)
        elif name == "scan":
            total += params["length"] * sum(inner)
        else:
            total += max(inner, default=0) if name == "cond" else sum(inner)
    return total


def floor(facts: dict[str, Any], batch_size: int, total_steps: int) -> dict[str, float | None]:
    """The least time that bandwidth and arithmetic allow, and what follows from it."""
    if facts["topology"] == "cpu" or facts["bytes_accessed"] is None:
        return dict.fromkeys(("floor_seconds", "floor_images_per_second", "floor_hours"))
    chip, _ = _chip_and_shape(facts["topology"])
    seconds = max(facts["bytes_accessed"] / chip.bandwidth, facts["flops"] / chip.peak_flops)
    return {
        "floor_seconds": seconds,
        "floor_images_per_second": batch_size / seconds,
        "floor_hours": total_steps * seconds / 3600,
    }


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays, without the padding of a layout."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def host_memory() -> int:
    """Bytes of this machine's main memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def versions() -> dict[str, str]:
    """Of what compiled the step."""
    names = ["jax", "jaxlib"] + ["libtpu"] * (importlib.util.find_spec("libtpu") is not None)
    return {name: importlib.metadata.version(name) for name in names}
