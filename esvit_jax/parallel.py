"""How what is written for one device runs on all of them, in all processes.

Steps are written for one device with collectives over the axis `steps.AXIS`; `on_all_devices` runs
them on all. Batches are numpy arrays [local devices, b, ...]; states are replicated.
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import numpy as np
from einops import rearrange
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Lowered, Wrapped
from jaxtyping import Array, PyTree
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
      mode: "pmap"; "shard_map" (jit of shard_map over a one-axis mesh), which gives the same; or
        "fsdp" (jit of arrays that are spread over the devices), the same but for rounding.
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
    if mode == "fsdp":
        return _OnShards(step, mesh, donated)

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
    if not mesh.is_multi_process:
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


class _OnShards:
    """Params, moments and teacher lie spread over the devices; XLA gathers what it needs, when.

    The step is mapped over an axis of devices' shares, and its collectives are sums over that axis:
    spread, it is the devices, and XLA puts in theirs.
    """

    def __init__(self, step: Callable[..., Result], mesh: Mesh, donated: tuple[int, ...]):
        self._mesh = mesh
        self._batch_sharding = NamedSharding(mesh, PartitionSpec(AXIS))

        def on_shares(state, batch):
            mapped = jax.vmap(step, (None, 0), None, axis_name=AXIS, spmd_axis_name=AXIS)
            return self._constrained(mapped(state, batch), jax.tree.structure(state))

        self._jitted = jax.jit(on_shares, donate_argnums=donated)

    def _constrained(self, results: Any, state: Any) -> Any:
        """What is built like the state is spread like it, all else is everywhere."""
        everywhere = NamedSharding(self._mesh, PartitionSpec())

        def place(result: PyTree) -> PyTree:
            is_state = jax.tree.structure(result) == state
            shardings = jax.tree.map(
                lambda x: shard_sharding(x.shape, self._mesh) if is_state else everywhere, result
            )
            return jax.lax.with_sharding_constraint(result, shardings)

        return tuple(map(place, results)) if isinstance(results, tuple) else place(results)

    def __call__(self, state: PyTree, batch: PyTree, /) -> Any:
        return self._jitted(state, self._together(batch))

    def lower(self, state: PyTree, batch: PyTree, /) -> Lowered:
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=shard_sharding(x.shape, self._mesh)
            ),
            state,
        )
        return self._jitted.lower(shapes, self._together(batch))

    def _together(self, batch: PyTree) -> PyTree:
        def together(x):
            if isinstance(x, jax.ShapeDtypeStruct):
                return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._batch_sharding)
            return jax.make_array_from_process_local_data(self._batch_sharding, np.asarray(x))

        return jax.tree.map(together, batch)


def on_own_rows(
    step: Callable[[PyTree, PyTree], PyTree], *, gathers: bool = False
) -> Callable[[PyTree, PyTree], Any]:
    """Runs step(own, everywhere) on all devices, where each has rows of its own.

    Args:
      step: pure, for one device; its first argument are this device's rows of arrays that
        `spread_rows` has spread, its second arrays that all have.
      gathers: its results are the same on all devices; else each has its rows of them.
    """
    rows, all_of_it = PartitionSpec(AXIS), PartitionSpec()
    mapped = jax.shard_map(
        step,
        mesh=_mesh(),
        in_specs=(rows, all_of_it),
        out_specs=all_of_it if gathers else rows,
        check_vma=False,
    )
    return jax.jit(mapped)


def shard_sharding(shape: tuple[int, ...], mesh: Mesh | None = None) -> NamedSharding:
    """How "fsdp" spreads an array: along its longest axis that the devices divide, if any."""
    mesh = mesh or _mesh()
    axes = [axis for axis, size in enumerate(shape) if size and size % mesh.size == 0]
    longest = max(axes, key=lambda axis: shape[axis], default=None)
    return NamedSharding(
        mesh, PartitionSpec(*(AXIS if axis == longest else None for axis in range(len(shape))))
    )


def held_shape(
    shape: tuple[int, ...], mode: str, devices: Sequence[object] | None = None
) -> tuple[int, ...]:
    """What one device holds of an array of the state.

    Args:
      shape: of the whole array.
      mode, devices: see `on_all_devices`.
    """
    return shard_sharding(shape, _mesh(devices)).shard_shape(shape) if mode == "fsdp" else shape


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


def spread_rows(x: np.ndarray) -> jax.Array:
    """An array that every process has, its rows spread over all devices, which must divide them."""
    sharding = NamedSharding(_mesh(), PartitionSpec(AXIS))
    return jax.make_array_from_callback(x.shape, sharding, lambda rows: x[rows])


def replicated_sharding() -> NamedSharding:
    """Every device holds the whole array: how states are restored."""
    return NamedSharding(_mesh(), PartitionSpec())


def laid_out(shapes: PyTree, mode: str) -> PyTree:
    """Shapes with the sharding that arrays are to be made or read with, before `replicate`.

    In "fsdp" no device ever holds the whole of what can be spread.
    """

    def sharding(shape: tuple[int, ...]) -> NamedSharding:
        return shard_sharding(shape) if mode == "fsdp" else replicated_sharding()

    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(x.shape)), shapes
    )


def place(x: np.ndarray | jax.Array, sharding: NamedSharding) -> jax.Array:
    """An array that every host has, put on all devices; what is on devices is left there."""
    if isinstance(x, jax.Array):
        return x
    return jax.make_array_from_callback(x.shape, sharding, lambda share: x[share])


def replicate(state: PyTree, mode: str) -> PyTree:
    """The state as a step returns it, so that its first call is compiled like all others."""
    if mode == "fsdp":
        return jax.tree.map(_spread, state)
    if jax.process_count() == 1:
        return jax.device_put(state, replicated_sharding())
    state = jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), state)
    if mode == "pmap":
        return jax.device_put(state, NamedSharding(_mesh(jax.local_devices()), PartitionSpec()))
    sharding = replicated_sharding()
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), state)


def _spread(x: Array) -> Array:
    sharding = shard_sharding(x.shape)
    if x.sharding.is_equivalent_to(sharding, x.ndim):
        return x
    if jax.process_count() == 1:
        return jax.device_put(x, sharding)
    return place(np.asarray(x.addressable_data(0)), sharding)


def to_global(state: PyTree) -> PyTree:
    """The state as arrays over all processes, as checkpoints need them."""
    if jax.process_count() == 1 or not all(x.is_fully_addressable for x in jax.tree.leaves(state)):
        return state
    return jax.tree.map(fully_replicated_host_local_array_to_global_array, state)


class Anywhere:
    """Whether any process says so, known to all at the same call.

    Of several processes the answer is that to the call before the last two: an all-reduce that
    nobody has to wait for. Of one process it is the answer to this call.

    Args:
      mode: see `on_all_devices`.
    """

    def __init__(self, mode: str):
        mode = "shard_map" if mode == "fsdp" else mode
        self._count = on_all_devices(lambda _, mine: jax.lax.psum(mine, AXIS), mode)
        self._asked: collections.deque[jax.Array] = collections.deque()

    def __call__(self, mine: bool) -> bool:
        """Asks; all processes must."""
        if jax.process_count() == 1:
            return mine
        self._asked.append(self._count((), np.full(jax.local_device_count(), mine, np.int32)))
        return len(self._asked) > 2 and bool(self._asked.popleft() > 0)
