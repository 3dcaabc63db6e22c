"""The heads of a linear probe: their training against NumPy, one head at a time."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esvit_jax import parallel, steps
from esvit_jax.errors import UserError
from esvit_jax.evaluate.sweep import (
    Head,
    Sweep,
    head_losses,
    head_ranks,
    init_heads,
    sweep_optimizer,
)
from esvit_jax.state import ClassifierState

CLASSES, BATCH, STEPS = 3, 8, 7
SWEEP = Sweep(blocks=(1, 2), learning_rates=(1.0, 8.0, 64.0), weight_decays=(0.0, 0.05))
SIZES = {"1": 4, "2": 6}


@pytest.fixture(scope="module")
def data():
    """Features and labels of every step, f64[steps, b, d] and int[steps, b]."""
    rng = np.random.default_rng(0)
    features = {n: rng.standard_normal((STEPS, BATCH, d)) for n, d in SIZES.items()}
    return features, rng.integers(0, CLASSES, (STEPS, BATCH))


def trained_by_numpy(kernel, features, labels, head):
    """SGD as PyTorch does it, in float64: velocity ← 0.9 velocity + gradient; w ← w - lr velocity.

    The learning rate of step i of n is lr · batch / 256 · (1 + cos(pi i / n)) / 2.
    """
    weight, bias = kernel.astype(np.float64), np.zeros(CLASSES)
    velocities = [np.zeros_like(weight), np.zeros_like(bias)]
    for i in range(STEPS):
        rate = head.learning_rate * BATCH / 256 * (1 + np.cos(np.pi * i / STEPS)) / 2
        logits = features[i] @ weight + bias
        probs = np.exp(logits - logits.max(1, keepdims=True))
        probs /= probs.sum(1, keepdims=True)
        errors = (probs - np.eye(CLASSES)[labels[i]]) / BATCH
        gradients = [features[i].T @ errors + head.weight_decay * weight, errors.sum(0)]
        velocities = [0.9 * v + g for v, g in zip(velocities, gradients, strict=True)]
        weight, bias = weight - rate * velocities[0], bias - rate * velocities[1]
    return weight, bias


@pytest.mark.parametrize("mode", ["pmap", "shard_map"])
def test_all_heads_at_once_are_each_as_if_alone(data, mode):
    features, labels = data
    heads = init_heads(jax.random.key(1), SIZES, SWEEP, CLASSES)
    first = {n: np.asarray(head["kernel"]) for n, head in heads.items()}
    optimizer = sweep_optimizer(SWEEP, BATCH, STEPS)

    def loss_of(params, frozen, batch, keys):
        losses = head_losses(params["head"], {n: batch[n] for n in SIZES}, batch["label"])
        return jnp.concatenate(list(losses.values())).sum(), {"loss": losses}

    step = functools.partial(steps.classifier_step, loss_of=loss_of, optimizer=optimizer, seed=0)
    run = parallel.on_all_devices(step, mode)
    params = {"head": heads}
    state = ClassifierState(jnp.zeros((), jnp.int32), params, optimizer.init(params), {})
    scalars: Any = {}
    for i in range(STEPS):
        batch = {n: x[i].astype(np.float32) for n, x in features.items()}
        state, scalars = run(state, parallel.shard(batch | {"label": labels[i].astype(np.int32)}))
    assert int(state.step) == STEPS
    for n in SIZES:
        heads_of = SWEEP.heads(int(n))
        assert len(heads_of) == len(scalars["loss"][n]) == 6
        for i, head in enumerate(heads_of):
            weight, bias = trained_by_numpy(first[n][i], features[n], labels, head)
            found = jax.tree.map(lambda x, i=i: x[i], state.params["head"][n])
            np.testing.assert_allclose(found["kernel"], weight, rtol=2e-4, atol=2e-5)
            np.testing.assert_allclose(found["bias"], bias, rtol=2e-4, atol=2e-5)


def test_heads_start_alike_and_small():
    heads = init_heads(jax.random.key(0), {"1": 300}, SWEEP, 200)["1"]
    kernel = np.asarray(heads["kernel"])
    assert kernel.shape == (6, 300, 200) and not np.asarray(heads["bias"]).any()
    assert (kernel == kernel[0]).all()
    assert kernel[0].mean() == pytest.approx(0, abs=2e-4)
    assert kernel[0].std() == pytest.approx(0.01, rel=0.02)


def test_ranks_against_sorting():
    rng = np.random.default_rng(0)
    heads = {
        "1": {
            "kernel": rng.standard_normal((3, 4, 6)).astype(np.float32),
            "bias": rng.standard_normal((3, 6)).astype(np.float32),
        }
    }
    features = rng.standard_normal((9, 4)).astype(np.float32)
    labels = rng.integers(0, 6, 9).astype(np.int32)
    heads["1"]["bias"][2, 3] = np.nan
    on_device = jax.tree.map(jnp.asarray, heads)
    found = head_ranks(on_device, {"1": jnp.asarray(features)}, jnp.asarray(labels))
    ranks = np.asarray(found["1"])
    for i in range(2):
        logits = features @ heads["1"]["kernel"][i] + heads["1"]["bias"][i]
        order = np.argsort(-logits, axis=1)
        assert [list(row).index(y) for row, y in zip(order, labels, strict=True)] == list(
            ranks[:, i]
        )
    assert (ranks[:, 2] == 6).all()  # not finite: never a hit


def test_of_equal_logits_the_lower_class_is_first():
    heads = {"1": {"kernel": jnp.zeros((1, 2, 4)), "bias": jnp.zeros((1, 4))}}
    ranks = head_ranks(heads, {"1": jnp.ones((4, 2))}, jnp.arange(4))["1"]
    assert list(ranks[:, 0]) == [0, 1, 2, 3]


def test_order_and_words_of_the_default():
    heads = [head for n in Sweep().blocks for head in Sweep().heads(n)]
    assert len(heads) == len(set(heads)) == 13 * 2 * 2
    assert {0.001, 0.003, 0.01} < {head.learning_rate for head in heads}  # the published ones
    assert heads[0] == Head(1, 3e-4, 0.0) and heads[13] == Head(1, 3e-4, 1e-4)
    assert str(heads[-1]) == "last 4 blocks, learning rate 10, decay 0.0001"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"blocks": (1, 5)}, r"blocks = \(1, 5\): the network has 4 blocks; numbers from 1 to 4"),
        ({"blocks": (0,)}, r"blocks = \(0,\): the network has 4"),
        ({"learning_rates": ()}, r"learning_rates = \(\): it must be some numbers"),
        ({"learning_rates": (1.0, 1.0)}, r"none twice"),
        ({"learning_rates": (0.0,)}, r"learning_rates = \(0.0,\): they must be more than 0"),
        ({"learning_rates": (float("nan"),)}, r"they must be more than 0"),
        ({"weight_decays": (-1.0,)}, r"weight_decays = \(-1.0,\): they must be at least 0"),
    ],
)
def test_what_cannot_be_swept(fields, message):
    with pytest.raises(UserError, match=message):
        Sweep(**fields).check(4)
