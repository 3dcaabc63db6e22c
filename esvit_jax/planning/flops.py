"""Floating-point operations of a traced function: those of its matrix products."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import jax
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Jaxpr, Literal, Var

from esvit_jax.state import TrainState
from esvit_jax.steps import AXIS


def step_flops(
    step: Callable[..., Any],
    state: TrainState,
    batch: Mapping[str, jax.ShapeDtypeStruct | np.ndarray],
) -> int:
    """`matmul_flops` of a training step on one of the devices that `batch` is laid out for.

    Args:
      step: see `recipe.Recipe.step`.
      state: arrays or their shapes.
      batch: likewise, arrays [devices, b, ...].
    """
    devices = batch["size"].shape[0]
    share = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), dict(batch))
    return matmul_flops(trace(step, state, share, devices=devices))


def trace(function: Callable[..., Any], *arguments: Any, devices: int) -> Jaxpr:
    """What one of so many devices does for arguments, or shapes, of one device."""
    return jax.make_jaxpr(function, axis_env=[(AXIS, devices)])(*arguments).jaxpr


def inner_jaxprs(params: dict[str, Any]) -> Iterator[Jaxpr]:
    """The functions among the parameters of an equation: of a loop, a call, a conditional."""
    for value in params.values():
        for part in value if isinstance(value, list | tuple) else [value]:
            jaxpr = getattr(part, "jaxpr", part)
            if hasattr(jaxpr, "eqns"):
                yield jaxpr


def array_of(atom: Var | Literal) -> ShapedArray:
    """Shape and dtype of what an equation reads or returns."""
    return cast(ShapedArray, atom.aval)


def matmul_flops(jaxpr: Jaxpr) -> int:
    """Operations of all matrix products and convolutions, a multiply-add being two.

    Read from the traced function, which has the length of each loop; what a backward pass
    computes again (`config.remat`) is in it. Of a conditional's branches the largest counts.
    """
    total = 0
    for equation in jaxpr.eqns:
        params, name = equation.params, equation.primitive.name
        inner = [matmul_flops(part) for part in inner_jaxprs(params)]
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            depth = math.prod(array_of(equation.invars[0]).shape[axis] for axis in contracted)
            total += 2 * array_of(equation.outvars[0]).size * depth
        elif name == "conv_general_dilated":
            kernel = array_of(equation.invars[1])
            features = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
            total += 2 * array_of(equation.outvars[0]).size * (kernel.size // features)
        elif name == "scan":
            total += params["length"] * sum(inner)
        else:
            total += max(inner, default=0) if name == "cond" else sum(inner)
    return total
