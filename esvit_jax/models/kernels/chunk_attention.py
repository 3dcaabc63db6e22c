"""Attention of a Vision Longformer's chunks, as a pair of kernels for TPUs.

A cell attends to nine chunks: XLA's program copies every chunk nine times, and of each copy fills a
quarter of the lanes. Here a program holds a whole map of one head, and neighbours are addresses.
Logits never leave the chip; the backward pass computes them again.

Arrays are transposed, features along rows and cells along lanes: a chunk takes a slot of 64 lanes
or a multiple of 128, its cells, then a copy of the global tokens, then nothing. As many chunks as
fill 128 lanes are queries together, of the slots in the columns around them in three rows. Logits
are [key, query], so that sums over keys are additions of registers. What is no cell of the map says
so in more features of its key, which the queries multiply by 1; which chunks are neighbours, and
which copies of global tokens count, the bias says.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from esvit_jax.models.kernels.basics import F32, by_platform, product
from esvit_jax.models.kernels.chunk_layout import ChunkLayout
from esvit_jax.models.kernels.metadata import ChunkCall


def _around(x: Any, row: Any, group: int, layout: ChunkLayout) -> Any:
    """[features, keys] of a group, three rows side by side."""
    lanes = pl.ds(group * layout.query_lanes, layout.key_lanes)
    return jnp.concatenate([x[row + i, :, lanes] for i in range(3)], axis=1)


def _weights(key: Any, outside: Any, query: Any, bias: Any) -> Any:
    """softmax over keys of f32[keys, queries]."""
    key = jnp.concatenate([key, outside], axis=0)
    ones = jnp.ones((len(outside), query.shape[1]), query.dtype)
    logits = product(key, jnp.concatenate([query, ones], axis=0), (0, 0)) + bias[0]
    exp = jnp.exp(logits - jnp.max(logits, axis=0, keepdims=True))
    return exp * (1.0 / jnp.sum(exp, axis=0, keepdims=True))


def _chunk_forward_kernel(
    query: Any, key: Any, value: Any, outside: Any, bias: Any, out: Any, *, layout: ChunkLayout
) -> None:
    def row(y: Any, _: None) -> None:
        for group in range(layout.groups):
            own = pl.ds(group * layout.query_lanes, layout.query_lanes)
            k, v, away = (_around(x, y, group, layout) for x in (key.at[0], value.at[0], outside))
            weights = _weights(k, away, query[0, y, :, own], bias).astype(v.dtype)
            out[0, y, :, own] = product(v, weights, (1, 0)).astype(out.dtype)

    jax.lax.fori_loop(0, layout.rows, row, None)


def _chunk_backward_kernel(
    query: Any, key: Any, value: Any, d_out: Any, outside: Any, bias: Any, d_query: Any,
    d_key: Any, d_value: Any, d_bias: Any, keys: Any, values: Any, *, layout: ChunkLayout,
) -> None:  # fmt: skip
    """`keys` and `values` add up the gradients in float32."""
    dtype = value.dtype
    keys[...] = jnp.zeros_like(keys)
    values[...] = jnp.zeros_like(values)

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        d_bias[...] = jnp.zeros_like(d_bias)

    def row(y: Any, _: None) -> None:
        for group in range(layout.groups):
            own = pl.ds(group * layout.query_lanes, layout.query_lanes)
            k, v, away = (_around(x, y, group, layout) for x in (key.at[0], value.at[0], outside))
            q, d_o = query[0, y, :, own], d_out[0, y, :, own]
            weights = _weights(k, away, q, bias)
            d_weights = product(v, d_o, (0, 0))
            mean = jnp.sum(weights * d_weights, axis=0, keepdims=True)
            d_logits = weights * (d_weights - mean)
            d_bias[0] += d_logits
            d_logits = d_logits.astype(dtype)
            d_query[0, y, :, own] = product(k, d_logits, (1, 0)).astype(dtype)
            parts = (
                (keys, product(q, d_logits, (1, 1))),
                (values, product(d_o, weights.astype(dtype), (1, 1))),
            )
            lanes = pl.ds(group * layout.query_lanes, layout.key_lanes)
            for total, part in parts:
                for i in range(3):
                    total[y + i, :, lanes] += part[:, i * layout.key_lanes :][:, : layout.key_lanes]

    jax.lax.fori_loop(0, layout.rows, row, None)
    d_key[0] = keys[...].astype(dtype)
    d_value[0] = values[...].astype(dtype)


def _call(
    kernel: Any, layout: ChunkLayout, maps: list[Any], bias: Any, outs: list[Any],
    scratch: list[Any], interpret: bool,
) -> Any:  # fmt: skip
    """Programs for each head and each map; a head's bias stays for all maps."""

    def cut(x: Any) -> pl.BlockSpec:
        if x.ndim == 3:
            return pl.BlockSpec((1, *x.shape[1:]), lambda head, b: (head, 0, 0))
        block = (1, x.shape[1], layout.dim, x.shape[3])
        return pl.BlockSpec(block, lambda head, b: (b, 0, head, 0))

    outside = jnp.asarray(layout.outside(), maps[0].dtype)
    return pl.pallas_call(
        functools.partial(kernel, layout=layout),
        grid=(layout.heads, len(maps[0])),
        in_specs=[
            *map(cut, maps), pl.BlockSpec(outside.shape, lambda head, b: (0, 0, 0)), cut(bias)
        ],
        out_specs=[*map(cut, outs)],
        out_shape=outs,
        scratch_shapes=[pltpu.VMEM(shape, F32) for shape in scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=100 * 2**20
        ),
        interpret=interpret,
        metadata=ChunkCall(layout, len(maps[0])).metadata(),
        name=kernel.__name__.strip("_"),
    )(*maps, outside, bias)  # fmt: skip


def forward(
    query: Any, key: Any, value: Any, bias: Any, layout: ChunkLayout, interpret: bool = False
) -> Any:
    """`attend`, of a bias as `ChunkLayout.bias` lays it."""
    maps, outs = [query, key, value], [jax.ShapeDtypeStruct(query.shape, value.dtype)]
    return _call(_chunk_forward_kernel, layout, maps, bias, outs, [], interpret)[0]


def backward(
    query: Any, key: Any, value: Any, d_out: Any, bias: Any, layout: ChunkLayout,
    interpret: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    """Gradients of query, key, value and (laid) bias, from those of the output."""
    maps = [query, key, value, d_out]
    outs = [jax.ShapeDtypeStruct(x.shape, value.dtype) for x in (query, key, value)]
    outs += [jax.ShapeDtypeStruct(bias.shape, F32)]
    scratch = [(key.shape[1], layout.dim, key.shape[3])] * 2
    return _call(_chunk_backward_kernel, layout, maps, bias, outs, scratch, interpret)


# Blocks of the same shape are traced once.
_forward = jax.jit(functools.partial(by_platform, forward), static_argnums=0)
_backward = jax.jit(functools.partial(by_platform, backward), static_argnums=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(query: Any, key: Any, value: Any, bias: Any, layout: ChunkLayout) -> Any:
    return _forward(layout, query, key, value, bias)


def _attend_forward(query: Any, key: Any, value: Any, bias: Any, layout: ChunkLayout) -> Any:
    return _forward(layout, query, key, value, bias), (query, key, value, bias)


def _attend_backward(layout: ChunkLayout, kept: Any, d_out: Any) -> Any:
    query, key, value, bias = kept
    return _backward(layout, query, key, value, d_out, bias)


_attend.defvjp(_attend_forward, _attend_backward)


def attend(
    query: Float[Array, "b rows d lanes"],
    key: Float[Array, "b rows2 d lanes2"],
    value: Float[Array, "b rows2 d lanes2"],
    local: Float[Array, "heads n n9"],
    to_global: Float[Array, "heads g"],
    layout: ChunkLayout,
) -> Float[Array, "b rows d lanes"]:
    """What each cell makes of its nine chunks and the global tokens; see `chunk_attention`.

    Args:
      query: scaled already; of slots without a border, heads one below the other.
      key, value: of slots with their border, whatever a projection makes of it.
      local: bias of a chunk's cells to those of its nine neighbours, in float32.
      to_global: bias of cells to global tokens.
      layout: of the maps.

    Raises:
      ValueError: the kernel has no form for heads of these features.
    """
    if not layout.supported:
        raise ValueError(f"no kernel for heads of {layout.dim} features: no multiple of 8")
    bias = layout.bias(local.astype(F32), to_global.astype(F32))
    return _attend(query, key, value, bias, layout)
