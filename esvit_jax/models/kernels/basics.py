"""What all kernels have in common."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

F32 = jnp.float32


def product(a: Any, b: Any, axes: tuple[int, int]) -> Any:
    """Of two matrices in float32, summed over one axis of each."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == F32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(
        a, b, (((axes[0],), (axes[1],)), ((), ())), precision=precision,
        preferred_element_type=F32,
    )  # fmt: skip


def by_platform(function: Any, layout: Any, *arrays: Any) -> Any:
    """On a TPU the compiled kernel, elsewhere Pallas's interpreter."""
    return jax.lax.platform_dependent(
        *arrays,
        tpu=functools.partial(function, layout=layout),
        default=functools.partial(function, layout=layout, interpret=True),
    )
