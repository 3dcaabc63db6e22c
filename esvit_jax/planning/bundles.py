"""What the compiler schedules for a kernel of window attention: bundles of instructions.

A core issues a bundle a cycle, so that bundles are the cycles of a program that waits for nothing
but itself. libtpu writes them down if the environment asks for it; a kernel compiles in seconds,
and no TPU is needed.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from esvit_jax.models.kernels.chunk_layout import ChunkLayout
from esvit_jax.models.kernels.layout import Layout
from esvit_jax.models.kernels.metadata import Call, ChunkCall
from esvit_jax.planning.topology import Topology, parse_topology

CHILD = "from esvit_jax.planning import bundles; bundles.answer_order()"
# A line of the file: address, label, depth of the loop ("" of an empty bundle), instructions.
BUNDLE = re.compile(r"^\s*0x[0-9a-f]+\s+([A-Z ]*):\s*(>*)\s*\{(.*)$", re.MULTILINE)
EXIT_TEST = re.compile(r"scmp\.ge\.\S+ %\w+, (\d+)\s+/\* loop exit test")
SPILL = re.compile(r"= vst \[vmem:\[#allocation\d+_spill\]")
USED = re.compile(r'"used_scoped_memory_configs":\[\{"memory_space":"1",[^}]*"size":"(\d+)"')


class Loop(NamedTuple):
    """One that has no other in it.

    Attributes:
      bundles: of its body.
      spills: stores of registers that its body lacks.
      turns: how often a program passes through; None if the program computes it.
    """

    bundles: int
    spills: int
    turns: int | None


class Schedule(NamedTuple):
    """A kernel's bundles: what each of its programs passes through once, and loops."""

    once: int
    loops: tuple[Loop, ...]

    @property
    def windows(self) -> Loop:
        """The loop over rows of windows: the program computes how many there are.

        It may compute that also of short ones, which copy the end of the last program if that has
        fewer maps; those are left out.
        """
        computed = (loop for loop in self.loops if loop.turns is None)
        return max(computed, key=lambda loop: loop.bundles)

    @property
    def copies(self) -> int:
        """Bundles of a program without that loop: mostly copies of maps, to float32 and back.

        Of a kernel of chunks, whose loops all turn as often as is known, that is everything.
        """
        return self.once + sum(x.bundles * x.turns for x in self.loops if x.turns is not None)

    def cycles(self, call: Call | ChunkCall) -> int:
        """Of all programs, one after the other."""
        if isinstance(call, ChunkCall):
            return call.programs * self.copies
        return call.programs * self.copies + call.turns * self.windows.bundles


def read_schedule(text: str) -> Schedule:
    """The schedule in what libtpu calls `…-final_bundles.txt`.

    The outermost loop there is over programs; what branches leave out counts too. Some bundles of
    an inner loop also begin what comes after it, and are marked as of the outer one: a loop lasts
    to the last bundle that is marked as its own.
    """
    bundles = BUNDLE.findall(text)
    inner = [i for i, (_, depth, _) in enumerate(bundles) if len(depth) > 1]
    starts = [i for i in inner if bundles[i][0].strip() == "LB"]
    loops = []
    for start, behind in zip(starts, [*starts[1:], len(bundles)], strict=True):
        end = max(i for i in inner if i < behind)
        body = "\n".join(instructions for *_, instructions in bundles[start : end + 1])
        bound = EXIT_TEST.search(body)
        turns = int(bound[1]) if bound else None
        loops.append(Loop(end + 1 - start, len(SPILL.findall(body)), turns))
    return Schedule(len(bundles) - sum(loop.bundles for loop in loops), tuple(loops))


class Kernel(NamedTuple):
    """A kernel that was compiled.

    Attributes:
      call: as the kernel itself tells.
      schedule: of its programs.
      memory: bytes of the core's vector memory.
    """

    call: Call | ChunkCall
    schedule: Schedule
    memory: int

    @property
    def cycles(self) -> int:
        """Of one call."""
        return self.schedule.cycles(self.call)


def compile_kernel(
    layout: Layout | ChunkLayout, maps: int, direction: str, topology: Topology
) -> Kernel | None:
    """Compiles a kernel in bfloat16 for one core, in a process of its own.

    Args:
      layout: of the maps.
      maps: how many.
      direction: "forward" or "backward".
      topology: of TPUs.

    Returns None where config.backbone.attention = "auto" would take no kernel.

    Raises:
      RuntimeError: it does not compile.
    """
    of_chunks = isinstance(layout, ChunkLayout)
    order = {"layout": dataclasses.asdict(layout), "of_chunks": of_chunks}
    order |= {"maps": maps, "direction": direction}
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        flags = {"LIBTPU_INIT_ARGS": f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}"}
        child = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", CHILD],
            env=os.environ | topology.environment() | flags,
            input=json.dumps(order | {"topology": topology.name}),
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if child.returncode:
            raise RuntimeError(f"the {direction} kernel does not compile:\n{child.stderr}")
        found = json.loads(child.stdout.splitlines()[-1])
        if not found:
            return None
        name = f"{'chunk_' * of_chunks}{direction}_kernel"
        (path,) = Path(folder).glob(f"*-{name}*-final_bundles.txt")
        schedule = read_schedule(path.read_text())
    call, used = Call.of(found) or ChunkCall.of(found), USED.search(found)
    assert call and used
    return Kernel(call, schedule, int(used[1]))


def answer_order() -> None:
    """What the process does that `compile_kernel` starts: prints the kernel's instruction."""
    print(json.dumps(instruction_of(**json.load(sys.stdin))))


def instruction_of(
    layout: dict[str, Any], of_chunks: bool, maps: int, direction: str, topology: str
) -> str:
    """Attributes of the kernel's instruction, "" if it is not to be had; see `compile_kernel`.

    The process must have the topology's environment.
    """
    import jax
    import jax.numpy as jnp

    from esvit_jax.models import kernels
    from esvit_jax.planning.hlo import Module

    device = parse_topology(topology).devices()[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    laid = ChunkLayout(**layout) if of_chunks else Layout(**layout)

    def shape(*sizes: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

    def attend(*arrays: Any) -> Any:
        run: Any = kernels.attend_chunks if of_chunks else kernels.attend
        return run(*arrays, laid)

    def gradients(d_out: Any, *arrays: Any) -> Any:
        return jax.vjp(attend, *arrays)[1](d_out)

    if isinstance(laid, ChunkLayout):
        rows, lanes, heads = laid.rows, laid.groups * laid.query_lanes, laid.heads
        out = shape(maps, rows, heads * laid.dim, lanes)
        near = shape(maps, rows + 2, heads * laid.dim, lanes + 2 * laid.slot)
        local = shape(heads, laid.cells, 9 * laid.cells, dtype=jnp.float32)
        arrays = [out, near, near, local, shape(heads, laid.num_global, dtype=jnp.float32)]
    else:
        tokens, queries = maps * laid.tokens, laid.lines * laid.columns
        out = shape(tokens, laid.features)
        arrays = [
            shape(tokens, 3 * laid.features),
            shape(1, 3 * laid.features),
            shape(laid.heads, queries, queries + laid.padding_key, dtype=jnp.float32),
        ]
    with kernels.compiling_for(device.device_kind):
        if not kernels.chosen("auto", laid, maps, jnp.bfloat16):
            return ""
        if direction == "forward":
            lowered = jax.jit(attend).lower(*arrays)
        else:
            lowered = jax.jit(gradients).lower(out, *arrays)
    module = Module(lowered.compile().as_text() or "")
    entry = module.computations[module.entry].instructions.values()
    calls = (x for x in entry if x.opcode == "custom-call")
    (found,) = (x for x in calls if Call.of(x.attributes) or ChunkCall.of(x.attributes))
    return found.attributes
