"""How the processes of a run find each other, before anything touches a device."""

import math
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax

from esvit_jax.errors import RUN_ERROR, UserError

# Seconds without a sign of life after which a process counts as dead, and in which all must come.
HEARTBEAT_SECONDS, CONNECT_SECONDS = 30, 300


def connect(
    coordinator: str | None = None,
    process_id: int | None = None,
    num_processes: int | None = None,
    *,
    heartbeat_seconds: int = HEARTBEAT_SECONDS,
    connect_seconds: int = CONNECT_SECONDS,
) -> None:
    """Connects the processes of a run; of one process, nothing.

    What is None is taken from JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID and JAX_NUM_PROCESSES, and
    else from what jax detects: a Cloud TPU, GKE, Slurm, Open MPI.

    Args:
      coordinator: host:port, where process 0 listens and which all the others reach.
      process_id: of this process, 0 … num_processes - 1.
      num_processes: over all hosts.
      heartbeat_seconds: without a sign of life, after which a process counts as dead; jax ends all
        others then, with SIGABRT.
      connect_seconds: in which all must have come; else this process ends with status 3.

    Raises:
      UserError: a value cannot be, or some are missing and nothing is detected.
    """
    given: dict[str, Any] = {
        "coordinator": _from_environment(coordinator, "JAX_COORDINATOR_ADDRESS", str),
        "process_id": _from_environment(process_id, "JAX_PROCESS_ID", int),
        "num_processes": _from_environment(num_processes, "JAX_NUM_PROCESSES", int),
    }
    _check_processes(**given)
    if given["num_processes"] == 1:
        return
    # Without it SIGTERM would be jax's; all agree on where to stop by `parallel.Anywhere`.
    jax.config.update("jax_enable_preemption_service", False)
    with _ending_after(connect_seconds, f"other processes did not come in {connect_seconds} s"):
        try:
            jax.distributed.initialize(
                given["coordinator"],
                num_processes=given["num_processes"],
                process_id=given["process_id"],
                initialization_timeout=connect_seconds + 60,  # of itself it would abort
                heartbeat_timeout_seconds=heartbeat_seconds,
            )
        except ValueError as error:  # jax has detected nothing
            missing = [f"--{name}" for name, value in given.items() if value is None]
            raise UserError(
                f"no cluster is detected here; give {' and '.join(missing)}, or start one process"
            ) from error
    if _alone_on_its_host() and "JAX_LOCAL_DEVICE_IDS" not in os.environ:
        # jax gives every task of Slurm or Open MPI one GPU, even one that has the host to itself.
        jax.config.update("jax_cuda_visible_devices", "all")


def _from_environment(value: Any, name: str, kind: Callable[[str], Any]) -> Any:
    text = os.environ.get(name)
    if value is not None or not text:
        return value
    try:
        return kind(text)
    except ValueError as error:
        raise UserError("it must be a whole number", argument=name, value=text) from error


def _check_processes(
    coordinator: str | None, process_id: int | None, num_processes: int | None
) -> None:
    if coordinator is not None and not re.fullmatch(r".+:\d+", coordinator):
        raise UserError(
            "it must be host:port, such as 10.0.0.2:8476", argument="coordinator", value=coordinator
        )
    if num_processes is not None and num_processes < 1:
        raise UserError("it must be at least 1", argument="num_processes", value=num_processes)
    last = math.inf if num_processes is None else num_processes - 1
    if process_id is not None and not 0 <= process_id <= last:
        raise UserError(
            f"{num_processes or 'the'} processes are counted from 0"
            + (f" to {last}" if num_processes else ""),
            argument="process_id", value=process_id,
        )  # fmt: skip


@contextmanager
def _ending_after(seconds: int, why: str) -> Iterator[None]:
    """Ends this process with one line if the block, which has the main thread, takes longer."""

    def end() -> None:
        print(f"esvit: {why}; all are started alike, with the same number", file=sys.stderr)
        sys.stderr.flush()
        os._exit(RUN_ERROR)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _alone_on_its_host() -> bool:
    """Whether Slurm or Open MPI has started one process on each host."""
    environment = os.environ
    tasks, nodes = environment.get("SLURM_STEP_NUM_TASKS"), environment.get("SLURM_STEP_NUM_NODES")
    slurm = tasks is not None and tasks == nodes
    return slurm or environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
