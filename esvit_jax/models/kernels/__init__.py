"""Kernels written by hand, for what a compiler does badly.

Which code is used is settled when a model is traced. `jax.lax.platform_dependent` could do it
when it is lowered, but then every process traces the kernels, for 10 to 30 s of a CPU's time, and
the residuals of either code become those of both.
"""

from typing import Any

import jax

from esvit_jax.models.kernels.layout import Layout

# Bytes of vector memory a core of a TPU has, by the beginning of its name; others have 64 MiB.
VECTOR_MEMORY = {"TPU v4": 16, "TPU v3": 16, "TPU v2": 16}


def chosen(attention: str, layout: Layout, maps: Any, dtype: Any) -> bool:
    """Whether windows are attended by the kernel: "pallas" says so, "auto" on a TPU that can.

    Raises:
      ValueError: `attention` is none of "auto", "xla" and "pallas".
    """
    if attention not in ("auto", "xla", "pallas"):
        raise ValueError(f'attention must be "auto", "xla" or "pallas", not {attention!r}')
    if attention != "auto":
        return attention == "pallas"
    if jax.default_backend() != "tpu" or not isinstance(maps, int):
        return False
    from esvit_jax.models.kernels import window_attention

    kind = jax.devices()[0].device_kind
    room = next((mib for name, mib in VECTOR_MEMORY.items() if kind.startswith(name)), 64)
    return window_attention.supported(layout) and (
        window_attention.memory(layout, maps, dtype) < 0.9 * room * 2**20
    )


def attend(qkv: Any, padding: Any, bias: Any, layout: Layout) -> Any:
    """`window_attention.attend`; Pallas is imported where it is used, as it takes a second."""
    from esvit_jax.models.kernels import window_attention

    return window_attention.attend(qkv, padding, bias, layout)
