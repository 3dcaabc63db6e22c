"""The losses in chunks of prototypes beside the plain ones, which hold every logit."""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from esvit_jax.bench.timing import time_in_turns
from esvit_jax.config import ConfigDict
from esvit_jax.losses import esvit_loss, match_regions
from esvit_jax.models import EsViTOutput, create_model


class LossCost(NamedTuple):
    """One way to compute the losses: temporaries of the program, seconds, and the value."""

    temp_bytes: int
    seconds: float
    loss: float


class LossCosts(NamedTuple):
    """Both ways, for a number of images."""

    images: int
    chunked: LossCost
    plain: LossCost


def bench_losses(config: ConfigDict, batch_sizes: list[int], rounds: int) -> list[LossCosts]:
    """Both losses and their gradients (student's vectors and prototypes), chunked and plain.

    Args:
      config: its views, backbone, head, temperatures and `loss.prototype_chunk` are used.
      batch_sizes: images; one row of the result each.
      rounds: timings, of which the median is given.
    """
    temperatures = {
        "student_temp": config.loss.student_temp,
        "teacher_temp": config.loss.teacher_temp,
        "dtype": jnp.dtype(config.dtype),
    }

    def chunked(student, teacher, centers):
        fields = temperatures | {"prototype_chunk": config.loss.prototype_chunk}
        return esvit_loss(student=student, teacher=teacher, centers=centers, **fields)[0]

    plain = functools.partial(plain_losses, **temperatures)
    rows = []
    for images in batch_sizes:
        outputs = random_outputs(config, images)
        programs: dict[str, Any] = {
            name: jax.jit(jax.value_and_grad(losses)).lower(*outputs).compile()
            for name, losses in (("chunked", chunked), ("plain", plain))
        }
        calls = {name: functools.partial(run, *outputs) for name, run in programs.items()}
        times = time_in_turns(calls, rounds)
        costs = {
            name: LossCost(
                temp_bytes=program.memory_analysis().temp_size_in_bytes,
                seconds=times[name].median,
                loss=float(calls[name]()[0]),
            )
            for name, program in programs.items()
        }
        rows.append(LossCosts(images, **costs))
    return rows


def random_outputs(
    config: ConfigDict, images: int
) -> tuple[EsViTOutput, EsViTOutput, dict[str, Array]]:
    """Normal numbers of the shapes that student and teacher return for a batch, and centers."""
    model, views = create_model(config), config.views
    stacks = [(2, views.global_size), (views.num_local, views.local_size)]
    inputs = [
        jax.ShapeDtypeStruct((count, images, side, side, 3), jnp.float32)
        for count, side in stacks
        if count
    ]
    key = jax.random.key(0)

    def outputs(key, inputs):
        return model.init_with_output(key, inputs)[0]

    def fill(shapes, seed):
        leaves, structure = jax.tree.flatten(shapes)
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        arrays = [_unit(jax.random.normal(k, x.shape)) for k, x in zip(keys, leaves, strict=True)]
        return structure.unflatten(arrays)

    student = fill(jax.eval_shape(outputs, key, inputs), 1)
    teacher = fill(jax.eval_shape(outputs, key, inputs[:1]), 2)
    heads = ["view", "region"] if config.loss.region else ["view"]
    centers = {
        head: 0.1 * jax.random.normal(jax.random.key(3), (config.head.num_prototypes,))
        for head in heads
    }
    return student, teacher, centers


def _unit(x: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def plain_losses(
    student: EsViTOutput,
    teacher: EsViTOutput,
    centers: dict[str, Array],
    *,
    student_temp: float,
    teacher_temp: float,
    dtype: DTypeLike,
) -> Float[Array, ""]:
    """`losses.esvit_loss` the published way: all logits, and a gather of targets for each pair."""

    def logits(vectors, prototypes):
        return jnp.einsum(
            "...d,kd->...k", vectors.astype(dtype), prototypes.astype(dtype),
            preferred_element_type=jnp.float32,
        )  # fmt: skip

    def loss(name):
        ours, theirs = student.heads[name], teacher.heads[name]
        teacher_logits = logits(theirs.vectors[0], theirs.prototypes)
        probs = jax.nn.softmax((teacher_logits - centers[name]) / teacher_temp)
        total, pairs, first = jnp.zeros(()), 0, 0
        for vectors, features in zip(ours.vectors, student.region_features, strict=True):
            log_probs = jax.nn.log_softmax(logits(vectors, ours.prototypes) / student_temp)
            for s, t in itertools.product(range(len(vectors)), range(2)):
                if first + s == t:
                    continue
                targets = probs[t]
                if name == "region":
                    matches = match_regions(
                        student_features=features[s],
                        teacher_features=teacher.region_features[0][t],
                    )
                    targets = jnp.take_along_axis(targets, matches[..., None], axis=1)
                total -= jnp.sum(targets * log_probs[s], axis=-1).mean()
                pairs += 1
            first += len(vectors)
        return total / pairs

    if "region" not in centers:
        return loss("view")
    return 0.5 * loss("view") + 0.5 * loss("region")
