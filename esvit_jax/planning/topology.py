"""Machines to plan for by name: this one's CPU, or TPUs that are not here."""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

from esvit_jax.errors import UserError
from esvit_jax.planning.chips import CHIPS, Chip

SHAPE = re.compile(r"[1-9]\d*(x[1-9]\d*){1,2}")


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips joined to one machine.

    Attributes:
      name: as users write it: "cpu", "v5e:2x4".
      chip: what it is made of; None is this machine's CPU.
      shape: chips along each axis; none for the CPU.
    """

    name: str
    chip: Chip | None = None
    shape: tuple[int, ...] = ()

    @property
    def chips(self) -> int:
        """How many; a CPU counts as one for each of its devices in jax."""
        if self.chip is None:
            import jax

            return jax.device_count()
        return math.prod(self.shape)

    @property
    def memory(self) -> int:
        """Bytes of a chip's main memory, or of this machine's for each of its devices."""
        if self.chip is None:
            return host_memory() // self.chips
        return self.chip.memory

    def environment(self) -> dict[str, str]:
        """Variables of a process that compiles for it: libtpu is not to look for a TPU."""
        if self.chip is None:
            return {"JAX_PLATFORMS": "cpu"}
        cores = self.chips * self.chip.cores_in_type
        return {
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": self.chip.accelerator_type.format(cores),
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_WORKER_ID": "0",
            # Programs for chips that are not here can be kept, but not read back.
            "JAX_ENABLE_COMPILATION_CACHE": "false",
            # Nothing is run on a TPU, so one that is in use here need not be waited for.
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }

    def devices(self) -> list[Any]:
        """Its devices, for a process with its `environment`; v2, v3 and v7x have two a chip.

        Raises:
          UserError: libtpu cannot make out the topology.
        """
        import jax
        from jax.experimental import topologies

        if self.chip is None:
            return jax.devices()
        name = f"{self.chip.topology_name}:{'x'.join(map(str, self.shape))}"
        bounds = [min(2, size) for size in self.shape] + [1] * (3 - len(self.shape))
        try:
            description = topologies.get_topology_desc(
                name, "tpu", chip_config_name=self.chip.config_name, chips_per_host_bounds=bounds
            )
        except jax.errors.JaxRuntimeError as error:
            reason = " ".join(str(error).split())
            raise UserError(reason, argument="topology", value=self.name) from error
        return list(description.devices)


def parse_topology(name: str) -> Topology:
    """The topology of a name; a TPU's needs libtpu.

    Raises:
      UserError: an unknown topology (says which are known), or no libtpu (says what to install).
    """
    if name == "cpu":
        return Topology("cpu")
    generation, _, shape = name.partition(":")
    if generation not in CHIPS or not SHAPE.fullmatch(shape):
        message = (
            f"no such topology; known are cpu and {', '.join(CHIPS)} with the number of chips "
            "along each axis, such as v5e:2x4, v4:2x2x1 or v6e:16x16"
        )
        raise UserError(message, argument="topology", value=name)
    if importlib.util.find_spec("libtpu") is None:
        message = (
            'it needs the TPU compiler: pip install "esvit_jax[tpu]" (or the libtpu that jax[tpu] '
            "names)"
        )
        raise UserError(message, argument="topology", value=name)
    return Topology(name, CHIPS[generation], tuple(int(size) for size in shape.split("x")))


def host_memory() -> int:
    """Bytes of this machine's main memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
