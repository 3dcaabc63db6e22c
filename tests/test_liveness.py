"""Memory of traced functions against counts by hand, and of the step against its variations."""

import jax
import jax.numpy as jnp
import pytest

from esvit_jax.config import resolve
from esvit_jax.planning import measure
from esvit_jax.planning.estimate import step_cost
from esvit_jax.planning.liveness import peak_bytes
from esvit_jax.recipe import build
from esvit_jax.state import create_state, init_params

SQUARE = (100, 100)
BYTES = 100 * 100 * 4


def peak(function, *shapes, in_place=0):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return peak_bytes(jax.make_jaxpr(function)(*arguments).jaxpr, in_place=in_place)


def test_products_are_held_until_they_are_read():
    # x @ y, then its product with y beside it; the first is gone before the third.
    assert peak(lambda x, y: x @ y @ y @ y, SQUARE, SQUARE) == 2 * BYTES

    def late(x, y):
        first = x @ y
        return first @ y @ y @ y + first

    assert peak(late, SQUARE, SQUARE) == 3 * BYTES


def test_elementwise_results_are_not_held():
    assert peak(lambda x: jnp.sum(jnp.sin(x) * 2 + x), SQUARE) == 4
    # But a product reads an array: exp(x) + 1 is stored, and so is the result.
    assert peak(lambda x, y: (jnp.exp(x) + 1) @ y, SQUARE, SQUARE) == 2 * BYTES
    # What is costly is not computed twice.
    assert peak(lambda x: (jnp.exp(x).sum(), jnp.exp(x).max()), SQUARE) == 8

    def shared(x):
        y = jnp.exp(x)
        return y.sum(), y.max()

    assert peak(shared, SQUARE) == BYTES + 4


def test_what_a_fused_result_is_computed_from_lives_until_it_is_read():
    def late(x, y):
        product = x @ y
        doubled = 2 * product  # nobody stores it, so the product has to stay
        return x @ (y @ (x @ y)) + doubled

    assert peak(late, SQUARE, SQUARE) == 3 * BYTES


def test_reshapes_and_what_nobody_reads_take_nothing():
    def turned(x, y):
        return (x @ y).reshape(-1).reshape(50, 200).T.sum()

    assert peak(turned, SQUARE, SQUARE) == BYTES

    def unread(x, y):
        _ = x @ y
        return x.sum()

    assert peak(unread, SQUARE, SQUARE) == 4


def test_results_in_place_of_arguments_take_nothing():
    assert peak(lambda x: (x + 1, x.sum()), SQUARE) == BYTES + 4
    assert peak(lambda x: (x + 1, x.sum()), SQUARE, in_place=1) == 4


def test_a_loop_holds_what_one_turn_does():
    def loop(x, ys):
        return jax.lax.scan(lambda x, y: (jnp.tanh(x @ y @ y), x.sum()), x, ys)

    # Its results (the last x and 7 sums); in a turn two products, the new x, a sum, one of ys.
    turn = 3 * BYTES + BYTES
    assert peak(loop, SQUARE, (7, *SQUARE)) == pytest.approx(BYTES + turn, rel=0.3)
    assert peak(loop, SQUARE, (70, *SQUARE)) - peak(loop, SQUARE, (7, *SQUARE)) == 63 * 4


def test_recomputing_holds_less():
    def network(x, w):
        for _ in range(6):
            x = jnp.tanh(x @ w)
        return x.sum()

    def halves(x, w):
        def half(x):
            for _ in range(3):
                x = jnp.tanh(x @ w)
            return x

        return jax.checkpoint(half)(jax.checkpoint(half)(x)).sum()

    whole = peak(jax.grad(network), SQUARE, SQUARE)
    parts = peak(jax.grad(halves), SQUARE, SQUARE)
    # Six results of tanh, and what goes back; of halves, what lies between them and one's three.
    assert (whole, parts) == (7 * BYTES, 4 * BYTES)
    jaxpr = jax.make_jaxpr(jax.grad(halves))(*[jax.ShapeDtypeStruct(SQUARE, jnp.float32)] * 2)
    assert peak_bytes(jaxpr.jaxpr, merging=True) == whole


def test_bytes_of_a_step(tiny_config):
    def estimate(**fields):
        config = tiny_config.copy_and_resolve_references()
        with config.unlocked():
            config.update(fields)
        numbers = resolve(config, num_images=6000, num_devices=1)
        recipe = build(config, numbers)
        state = jax.eval_shape(
            lambda key: create_state(
                recipe.model, recipe.optimizer, init_params(recipe.model, key)
            ),
            jax.random.key(0),
        )
        batch = measure.batch_shapes(config, 1, config.batch_size)
        share = {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in batch.items()}
        known = measure.tree_bytes(state) + measure.tree_bytes(share)
        return step_cost(recipe, state, share).bytes - known

    few, many = estimate(batch_size=8), estimate(batch_size=64)
    assert 5 * few < many < 8 * few  # gradients do not grow with the batch
    assert estimate(batch_size=64, accum_steps=8) < 1.6 * few
