"""What a run needs on a machine that is not here: the public function, and what it returns.

The step is compiled for a TPU by the compiler in libtpu, which needs no TPU, in a process of its
own (`measure`), whose environment keeps libtpu from looking for one.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from typing import Any

from rich.console import Console

from esvit_jax.config import ConfigDict, flatten
from esvit_jax.config.published import IMAGENET_IMAGES
from esvit_jax.errors import UserError
from esvit_jax.planning.breakdown import Costliest, Part
from esvit_jax.planning.topology import parse_topology

CHILD = "from esvit_jax.planning import measure; measure.answer_order()"
SIGN_OF_LIFE = 15.0  # seconds between two lines outside a terminal


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step costs: a chip and step, where not said otherwise.

    None is what is not known: a step that does not fit has no program to measure, a quick plan's
    program is not the one that would run, and this machine's CPU has no bandwidth to divide by.

    Attributes:
      topology: its name.
      chips: of the topology.
      per_chip_batch: images.
      parallel, remat, accum_steps: of the config.
      quick: whether the compiler was told to try less hard.
      parameter_bytes: of the student; with "fsdp", here and in the next two, a chip's part.
      optimizer_bytes: of the optimiser's state without the teacher.
      teacher_bytes: of the teacher's parameters.
      argument_bytes: of state and batch with the padding of their layout.
      temp_bytes: of all that lives within the step.
      peak_bytes: of all that is held at once.
      hbm_bytes: of the chip's memory.
      fits: whether the peak is within it.
      flops: of matrix products, a multiply-add being two.
      bytes_accessed: read from and written to that memory.
      collective_bytes: over the chip's links.
      collective_seconds: that the links take for them, whether the rest waits for it or not.
      floor_seconds: what bandwidth and arithmetic allow at best.
      floor_images_per_second: of all chips, at that pace.
      floor_hours: of the whole run, at that pace.
      estimated_cycles: that the compiler's cost model expects, of one core.
      estimated_seconds, estimated_images_per_second, estimated_hours: what follows from them.
      estimated_mfu: share of the chip's peak at that pace.
      breakdown: cycles of a core and bytes of the chip by part of the network, all of a step.
      costliest: instructions by cycles, the first the most; as many as were asked for.
      compile_seconds: that the compiler took.
      versions: of what compiled the step.
      compiled_depths: of the two networks that were compiled in place of this one's; see `depth`.
    """

    topology: str
    chips: int
    per_chip_batch: int
    parallel: str
    remat: str
    accum_steps: int
    quick: bool
    parameter_bytes: int
    optimizer_bytes: int
    teacher_bytes: int
    argument_bytes: int | None
    temp_bytes: int | None
    peak_bytes: int
    hbm_bytes: int
    fits: bool
    flops: int
    bytes_accessed: int | None
    collective_bytes: int | None
    collective_seconds: float | None
    floor_seconds: float | None
    floor_images_per_second: float | None
    floor_hours: float | None
    estimated_cycles: int | None
    estimated_seconds: float | None
    estimated_images_per_second: float | None
    estimated_hours: float | None
    estimated_mfu: float | None
    breakdown: list[Part] | None
    costliest: list[Costliest] | None
    compile_seconds: float
    versions: dict[str, str]
    compiled_depths: list[list[int]] | None = None

    def as_json(self) -> dict[str, Any]:
        """Its fields as JSON knows them; rows of tables are objects."""
        fields = dataclasses.asdict(self)
        for name in ("breakdown", "costliest"):
            if fields[name] is not None:
                fields[name] = [row._asdict() for row in fields[name]]
        return fields

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Plan":
        """The plan that `as_json` wrote."""
        fields = dict(fields)
        for name, row in (("breakdown", Part), ("costliest", Costliest)):
            if fields[name] is not None:
                fields[name] = [row(**values) for values in fields[name]]
        return cls(**fields)


def plan(
    config: ConfigDict,
    topology: str,
    *,
    num_images: int = IMAGENET_IMAGES,
    batch_per_chip: int | None = None,
    quick: bool = False,
    top: int = 0,
    dump_hlo: str | os.PathLike[str] | None = None,
    console: Console | None = None,
) -> Plan:
    """Compiles the training step for a topology, in a process of its own, and measures it.

    Nothing runs on the chips, which need not be here; it takes minutes, and says so meanwhile.

    Args:
      config: see `config.default_config`; its batch is spread over all chips.
      topology: "v5e:2x4" and the like, or "cpu" for this machine.
      num_images: in the training split.
      batch_per_chip: images, in place of config.batch_size / chips.
      quick: tell the TPU compiler to try less hard. What fits a quick plan fits, but that is all it
        says: the program is another one, with 1.7 times the bytes and 3.4 times the cycles for
        Swin-T.
      top: how many of the costliest instructions to name.
      dump_hlo: file to keep the compiled program in, for `measure.account_again`.
      console: where to show progress; None is standard output.

    Returns:
      See `Plan`.

    Raises:
      UserError: an unknown topology, no libtpu, a config that cannot work on so many chips, or a
        file that cannot be written.
      RuntimeError: the compiler failed.
    """
    environment = parse_topology(topology).environment()
    least = (("batch_per_chip", batch_per_chip, 1), ("num_images", num_images, 1), ("top", top, 0))
    for name, value, lowest in least:
        if value is not None and value < lowest:
            raise UserError(f"it must be at least {lowest}", argument=name, value=value)
    if dump_hlo is not None and not os.access(os.path.dirname(os.path.abspath(dump_hlo)), os.W_OK):
        message = "its folder does not exist or cannot be written to"
        raise UserError(message, argument="dump_hlo", value=os.fspath(dump_hlo))
    order = {
        "config": flatten(config), "topology": topology, "num_images": num_images,
        "batch_per_chip": batch_per_chip, "quick": quick, "top": top,
        "dump_hlo": dump_hlo and os.path.abspath(dump_hlo),
    }  # fmt: skip
    child = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", CHILD],
        env=os.environ | environment,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    output, errors = _wait(child, json.dumps(order), f"compiling for {topology}", console)
    if refusal := re.search(r"Check failed: .*", errors) if child.returncode < 0 else None:
        raise UserError(f"libtpu gave up: {refusal[0]}", argument="topology", value=topology)
    if child.returncode:
        raise RuntimeError(f"compiling for {topology} failed:\n{errors}")
    answer = json.loads(output.splitlines()[-1])
    if "error" in answer:
        raise UserError(**answer["error"])
    return Plan.from_json(answer)


def _wait(
    child: subprocess.Popen[str], order: str, task: str, console: Console | None
) -> tuple[str, str]:
    """What a process printed in answer to an order; shows that it is at work until then."""
    console = console or Console()
    start, interval = time.monotonic(), 1.0 if console.is_interactive else SIGN_OF_LIFE
    unsent: str | None = order
    try:
        with console.status(task) as status:  # nothing outside a terminal
            while True:
                try:
                    return child.communicate(unsent, timeout=interval)
                except subprocess.TimeoutExpired:
                    unsent = None
                    message = f"{task}, {time.monotonic() - start:.0f} s"
                    status.update(message)
                    if not console.is_interactive:
                        console.print(message, markup=False, highlight=False)
    finally:
        child.kill()  # an interrupt would wait for the compiler; one that has ended stays ended
