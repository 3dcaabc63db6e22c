"""Kernels written by hand, for what a compiler does badly.

Which code is used is settled when a model is traced. `jax.lax.platform_dependent` could do it
when it is lowered, but then every process traces the kernels, for 10 to 30 s of a CPU's time, and
the residuals of either code become those of both.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

from esvit_jax.models.kernels.chunk_layout import ChunkLayout
from esvit_jax.models.kernels.layout import Layout

# MiB of vector memory that a program may take, by the beginning of a device's name.
ROOM = {"TPU v2": 13, "TPU v3": 13, "TPU v4": 13, "TPU": 48}
_target = contextvars.ContextVar[str | None]("target", default=None)


@contextlib.contextmanager
def compiling_for(device_kind: str) -> Iterator[None]:
    """What is traced within is for devices of this kind ("TPU v4"), not for those of jax.devices().

    Args:
      device_kind: as `jax.Device.device_kind` names it.
    """
    token = _target.set(device_kind)
    try:
        yield
    finally:
        _target.reset(token)


def _room() -> int:
    """Bytes, 0 if the target is no TPU."""
    kind = _target.get() or jax.devices()[0].device_kind
    return next((mib for name, mib in ROOM.items() if kind.startswith(name)), 0) * 2**20


def for_tpu() -> bool:
    """Whether what is traced is for a TPU."""
    return bool(_room())


def chosen(attention: str, layout: Layout | ChunkLayout, maps: Any, dtype: Any) -> bool:
    """Whether maps are attended by the kernel: "pallas" says so, "auto" on a TPU that can.

    Raises:
      ValueError: `attention` is none of "auto", "xla" and "pallas".
    """
    if attention not in ("auto", "xla", "pallas"):
        raise ValueError(f'attention must be "auto", "xla" or "pallas", not {attention!r}')
    if attention != "auto":
        return attention == "pallas"
    if not (room := _room()) or not isinstance(maps, int):
        return False
    if isinstance(layout, ChunkLayout):
        return layout.supported and layout.memory(dtype) <= room
    from esvit_jax.models.kernels import programs

    layout = dataclasses.replace(layout, room=room)
    return layout.supported and programs.fits(layout, dtype)


def attend(qkv: Any, padding: Any, bias: Any, layout: Layout) -> Any:
    """`window_attention.attend`; Pallas is imported where it is used, as it takes a second."""
    from esvit_jax.models.kernels import window_attention

    layout = dataclasses.replace(layout, room=_room() or layout.room)
    return window_attention.attend(qkv, padding, bias, layout)


def attend_chunks(
    query: Any, key: Any, value: Any, local: Any, to_global: Any, layout: ChunkLayout
) -> Any:
    """`chunk_attention.attend`."""
    from esvit_jax.models.kernels import chunk_attention

    return chunk_attention.attend(query, key, value, local, to_global, layout)
