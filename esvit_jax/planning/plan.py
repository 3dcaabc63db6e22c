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

from rich.console import Console

from esvit_jax.config import ConfigDict, flatten
from esvit_jax.errors import UserError
from esvit_jax.planning.topology import parse_topology

IMAGENET_IMAGES = 1_281_167  # of the training split of ImageNet-1K
CHILD = "from esvit_jax.planning import measure; measure.answer_order()"
SIGN_OF_LIFE = 15.0  # seconds between two lines outside a terminal


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step costs: a chip and step, where not said otherwise.

    None is what is not known: a step that does not fit has no program to measure, and this
    machine's CPU no bandwidth to divide by.

    Attributes:
      topology: its name.
      chips: of the topology.
      per_chip_batch: images.
      remat, accum_steps: of the config.
      quick: whether the compiler was told to try less hard.
      parameter_bytes: of the student.
      optimizer_bytes: of the optimiser's state without the teacher.
      teacher_bytes: of the teacher's parameters.
      argument_bytes: of state and batch with the padding of their layout.
      temp_bytes: of all that lives within the step.
      peak_bytes: of all that is held at once.
      hbm_bytes: of the chip's memory.
      fits: whether the peak is within it.
      flops: of matrix products, a multiply-add being two.
      bytes_accessed: read from and written to that memory.
      floor_seconds: what bandwidth and arithmetic allow at best.
      floor_images_per_second: of all chips, at that pace.
      floor_hours: of the whole run, at that pace.
      compile_seconds: that the compiler took.
      versions: of what compiled the step.
    """

    topology: str
    chips: int
    per_chip_batch: int
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
    floor_seconds: float | None
    floor_images_per_second: float | None
    floor_hours: float | None
    compile_seconds: float
    versions: dict[str, str]


def plan(
    config: ConfigDict,
    topology: str,
    *,
    num_images: int = IMAGENET_IMAGES,
    batch_per_chip: int | None = None,
    quick: bool = False,
    console: Console | None = None,
) -> Plan:
    """Compiles the training step for a topology, in a process of its own, and measures it.

    Nothing runs on the chips, which need not be here; it takes minutes, and says so meanwhile.

    Args:
      config: see `config.default_config`; its batch is spread over all chips.
      topology: "v5e:2x4" and the like, or "cpu" for this machine.
      num_images: in the training split.
      batch_per_chip: images, in place of config.batch_size / chips.
      quick: tell the TPU compiler to try less hard. Swin-T's teacher compiles in half the time
        then, and takes 15 % more memory: what fits a quick plan fits.
      console: where to show progress; None is standard output.

    Returns:
      See `Plan`.

    Raises:
      UserError: an unknown topology, no libtpu, or a config that cannot work on so many chips.
      RuntimeError: the compiler failed.
    """
    environment = parse_topology(topology).environment()
    for name, value in (("batch_per_chip", batch_per_chip), ("num_images", num_images)):
        if value is not None and value < 1:
            raise UserError("it must be at least 1", argument=name, value=value)
    order = {
        "config": flatten(config), "topology": topology, "num_images": num_images,
        "batch_per_chip": batch_per_chip, "quick": quick,
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
    return Plan(**answer)


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
