"""Bytes that one Swin block moves on a TPU, forward and backward.

python -m esvit_jax.bench.block [v5e:2x4] [float32|bfloat16]   # the dtype of the attention logits

The whole step takes the TPU compiler many minutes; what a change to a block does shows here in
a few.
"""

import functools
import math
import os
import sys

from esvit_jax.planning import measure, traffic

# Views, side of the map, features, heads, shift: Swin-T's stages 1 and 3 of global views, and all
# four of local ones.
BLOCKS = [
    (64, 56, 96, 3, 3),
    (64, 14, 384, 12, 3),
    (256, 24, 96, 3, 3),
    (256, 12, 192, 6, 3),
    (256, 6, 384, 12, 3),
    (256, 3, 768, 24, 0),
]


def main(topology: str = "v5e:2x4", attention_dtype: str = "float32") -> None:
    """Prints gigabytes moved and of temporaries for each of BLOCKS."""
    measure.check_topology(topology)
    os.environ.update(measure.environment(topology))  # before jax looks for devices
    import jax
    import jax.numpy as jnp

    from esvit_jax.models.swin import SwinBlock

    devices, _ = measure.topology_devices(topology)
    sharding = jax.sharding.SingleDeviceSharding(devices[0])
    key = jax.random.key(0)
    for views, side, dim, heads, shift in BLOCKS:
        block = SwinBlock(heads, 7, shift, 4.0, 0.1, jnp.bfloat16, jnp.dtype(attention_dtype))
        shape = views, side, side

        def run(params, x, gradient, block=block, shape=shape):
            def forward(params, x):
                return block.apply(params, x, shape, True, rngs={"drop_path": key})[0]

            out, backward = jax.vjp(forward, params, x)
            return out, backward(gradient)

        x = jax.ShapeDtypeStruct((math.prod(shape), dim), jnp.bfloat16, sharding=sharding)
        init = functools.partial(block.init, key, shape=shape, train=False)
        params = jax.eval_shape(init, x)
        params = jax.tree.map(
            lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=sharding), params
        )
        compiled = jax.jit(run).lower(params, x, x).compile()
        moved = traffic.bytes_accessed(compiled.as_text())
        temporaries = compiled.memory_analysis().temp_size_in_bytes
        print(
            f"{views} maps of {side} x {side} x {dim}, {heads} heads, shift {shift}: "
            f"{moved / 1e9:.2f} GB moved, {temporaries / 1e9:.2f} GB of temporaries",
            flush=True,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
