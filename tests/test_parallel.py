"""A function of one device on several: all modes, donation, states and batches."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esvit_jax import parallel
from esvit_jax.models.layers import patch_convolution
from esvit_jax.steps import AXIS


def add_mean(total: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    """total + the mean over devices of their sums; wrong if a device sees another's share."""
    return total + jax.lax.pmean(batch["x"].sum(axis=0), AXIS)


@pytest.mark.parametrize("mode", ["pmap", "shard_map", "fsdp"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_all_modes_give_the_mean_over_devices(mode: str, count: int):
    devices = jax.devices()[:count]
    x = np.arange(24, dtype=np.float32).reshape(count, -1, 3)
    run = parallel.on_all_devices(add_mean, mode, devices=devices)
    total = run(jnp.ones(3), {"x": x})
    assert total.shape == (3,)  # replicated: no axis of devices
    np.testing.assert_array_equal(total, 1 + x.sum(axis=1).mean(axis=0))


@pytest.mark.parametrize("mode", ["pmap", "shard_map", "fsdp"])
def test_devices_tell_themselves_apart(mode: str):
    """Indices rise in the order of the shares."""

    def place(offset, batch):
        index = offset + jax.lax.axis_index(AXIS)
        return jax.lax.all_gather(index * 10 + batch["x"][0], AXIS)

    run = parallel.on_all_devices(place, mode)
    found = run(jnp.zeros((), jnp.int32), {"x": np.arange(4, dtype=np.int32)[:, None]})
    np.testing.assert_array_equal(found, [0, 11, 22, 33])


@pytest.mark.parametrize("mode", ["pmap", "shard_map", "fsdp"])
def test_a_donated_state_is_gone(mode: str):
    state = parallel.replicate({"a": jnp.ones(4)}, mode)

    def step(state, batch):
        mean = jax.lax.pmean(batch["x"].mean(), AXIS)
        return jax.tree.map(lambda x: x + mean, state)

    run = parallel.on_all_devices(step, mode, donate=True)
    new = run(state, {"x": np.ones((4, 2), np.float32)})
    np.testing.assert_array_equal(new["a"], 2 * np.ones(4))
    assert state["a"].is_deleted()


def test_a_state_is_spread():
    """A device holds a share of the longest axis that can be shared, and again after a step."""
    state = {"a": jnp.arange(24.0).reshape(3, 8), "b": jnp.ones(6), "c": jnp.ones(())}
    spread = parallel.replicate(state, "fsdp")

    def step(state, batch):
        mean = jax.lax.pmean(batch["x"].mean(), AXIS)
        return jax.tree.map(lambda x: x + mean, state), mean

    run = parallel.on_all_devices(step, "fsdp")
    new, mean = run(spread, {"x": np.ones((4, 2), np.float32)})
    for x in (spread, new):
        shapes = {name: array.addressable_shards[0].data.shape for name, array in x.items()}
        assert shapes == {"a": (3, 2), "b": (6,), "c": ()}
    np.testing.assert_array_equal(new["a"], state["a"] + 1)
    assert mean.sharding.is_fully_replicated


def test_shares_of_a_batch_are_contiguous_and_only_arrays():
    batch = {"canvas": np.arange(16).reshape(8, 2), "id": ["a"] * 8}
    shared = parallel.shard(batch)
    assert set(shared) == {"canvas"}
    np.testing.assert_array_equal(shared["canvas"], np.arange(16).reshape(4, 2, 2))


def test_one_process_needs_no_conversion():
    state = {"a": jnp.ones(3)}
    assert parallel.to_global(state) is state
    replicated = parallel.replicate(state, "pmap")["a"]
    assert replicated.sharding.is_fully_replicated and len(replicated.devices()) == 4


def test_patches_that_devices_share_have_the_same_gradient():
    """5 features on 4 devices, where XLA's convolutions go wrong; the product is cut right."""
    images = np.random.default_rng(0).normal(size=(4, 1, 10, 8, 3)).astype(np.float32)

    def gradient(mode: str, *, as_product: bool):
        embed = patch_convolution(5, 4, 3, jnp.float32, as_product)
        params = embed.init(jax.random.key(0), images[0])["params"]

        def step(params, batch):
            def loss(params):
                patches: Any = embed.apply({"params": params}, batch["x"])
                return jnp.sum(jnp.sin(patches))

            return jax.lax.pmean(jax.grad(loss)(params), AXIS)

        return parallel.on_all_devices(step, mode)(params, {"x": images})

    theirs = gradient("pmap", as_product=False)
    for mode in ("pmap", "fsdp"):
        ours = gradient(mode, as_product=True)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, theirs
        )
