"""How what is written for one device runs on all of them, in all processes.

Steps are written for one device with collectives over the axis `steps.AXIS`; `on_all_devices` runs
them on all. Batches are numpy arrays [local devices, b, ...]; states are replicated.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar, runtime_checkable

import jax
import numpy as np
from einops import rearrange
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Lowered, Wrapped
from jaxtyping import PyTree
from orbax.checkpoint.utils import fully_replicated_host_local_array_to_global_array

from esvit_jax.steps import AXIS

Result = TypeVar("Result", covariant=True)


@runtime_checkable
class OnAllDevices(Protocol[Result]):
    """A step on all devices, of (replicated, [local devices, b, ...])."""

    def __call__(self, replicated: PyTree, batch: PyTree, /) -> Result: ...

    def lower(self, replicated: PyTree, batch: PyTree, /) -> Lowered:
        """To be compiled ahead of time; shapes do in place of arrays."""
        ...


def on_all_devices(
    step: Callable[..., Result],
    mode: str,
    *,
    donate: bool = False,
    devices: Sequence[object] | None = None,
) -> OnAllDevices[Result]:
    """Runs step(replicated, batch) -> replicated on all devices.

    Args:
      step: pure, for one device; its second argument are arrays [b, ...].
      mode: "pmap", or "shard_map" (jit of shard_map over a one-axis mesh); both give the same.
      donate: reuse the first argument's memory for the results.
      devices: other than all there are.

    Returns:
      See `OnAllDevices`.
    """
    donated = (0,) if donate else ()
    if mode == "pmap":
        return jax.pmap(
            step,
            axis_name=AXIS,
            in_axes=(None, 0),
            out_axes=None,
            donate_argnums=donated,
            devices=devices,
        )
    mesh = _mesh(devices)

    def on_device(replicated, batch):
        return step(replicated, jax.tree.map(lambda x: x[0], batch))

    mapped = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(AXIS)),
        out_specs=PartitionSpec(),
        # With the check on, gradients of replicated params are summed a second time.
        check_vma=False,
    )
    jitted = jax.jit(mapped, donate_argnums=donated)
    if jax.process_count() == 1:
        return jitted
    return _FromAllProcesses(jitted, NamedSharding(mesh, PartitionSpec(AXIS)))


@dataclasses.dataclass(frozen=True)
class _FromAllProcesses:
    """Puts together the batches of all processes first."""

    jitted: Wrapped
    sharding: NamedSharding

    def __call__(self, replicated, batch, /):
        return self.jitted(replicated, self._together(batch))

    def lower(self, replicated, batch, /) -> Lowered:
        return self.jitted.lower(replicated, self._together(batch))

    def _together(self, batch: PyTree) -> PyTree:
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(self.sharding, x), batch
        )


def _mesh(devices: Sequence[object] | None = None) -> Mesh:
    return Mesh(np.asarray(devices or jax.devices()), (AXIS,))


def shard(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """This process's arrays [images, ...] as [local devices, b, ...]; drops what is no array."""
    count = jax.local_device_count()
    return {
        name: rearrange(x, "(d b) ... -> d b ...", d=count)
        for name, x in batch.items()
        if isinstance(x, np.ndarray)
    }


def replicated_sharding() -> NamedSharding:
    """Every device holds the whole array: how states are restored."""
    return NamedSharding(_mesh(), PartitionSpec())


def replicate(state: PyTree, mode: str) -> PyTree:
    """The state as a step returns it, so that its first call is compiled like all others."""
    if jax.process_count() == 1:
        return jax.device_put(state, replicated_sharding())
    state = jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), state)
    if mode == "pmap":
        return jax.device_put(state, NamedSharding(_mesh(jax.local_devices()), PartitionSpec()))
    sharding = replicated_sharding()
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), state)


def to_global(state: PyTree) -> PyTree:
    """The state as arrays over all processes, as checkpoints need them."""
    if jax.process_count() == 1 or not all(x.is_fully_addressable for x in jax.tree.leaves(state)):
        return state
    return jax.tree.map(fully_replicated_host_local_array_to_global_array, state)


def start_distributed() -> None:
    """Connects the processes of a run over several hosts, before anything else uses jax.

    TPU pods, Slurm, Open MPI and Kubernetes are recognised by jax; elsewhere
    JAX_COORDINATOR_ADDRESS names the first host, and launchers set the rest.
    """
    jax.distributed.initialize()
