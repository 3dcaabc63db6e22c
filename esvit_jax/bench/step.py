"""The training step as a whole, its parts, and the machine's rate of matrix products."""

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.stages import Compiled
from jaxtyping import Array, PyTree

from esvit_jax import parallel
from esvit_jax.bench.peaks import peak_flops
from esvit_jax.bench.timing import Timing, time_in_turns
from esvit_jax.config import ConfigDict, resolve
from esvit_jax.losses import esvit_loss
from esvit_jax.models import EsViTOutput
from esvit_jax.planning.flops import step_flops
from esvit_jax.planning.measure import batch_shapes
from esvit_jax.recipe import Recipe, Views, build
from esvit_jax.state import TrainState, create_state, init_params
from esvit_jax.steps import AXIS, loss_and_gradients

PRODUCT_SIZE = {"cpu": 2048, "gpu": 8192, "tpu": 8192}  # rows and columns of the factors


class Workload(NamedTuple):
    """A config's training step with random data to run it on."""

    config: ConfigDict
    recipe: Recipe
    state: TrainState  # on the host
    batch: dict[str, np.ndarray]  # [devices, b, ...]


def workload(config: ConfigDict, num_images: int) -> Workload:
    """Builds a config's step, a new state, and a batch of noise of about the sizes of photos.

    Raises:
      UserError: the config cannot work on these devices.
    """
    numbers = resolve(config, num_images=num_images, num_devices=jax.device_count())
    recipe = build(config, numbers)
    params = jax.jit(functools.partial(init_params, recipe.model))(jax.random.key(config.seed))
    state = jax.jit(functools.partial(create_state, recipe.model, recipe.optimizer))(params)
    shapes = batch_shapes(config, jax.local_device_count(), numbers.images_per_device)
    rng = np.random.default_rng(config.seed)
    side = config.data.canvas_size
    batch = {
        "canvas": rng.integers(0, 256, shapes["canvas"].shape, np.uint8),
        "size": rng.integers(side * 3 // 4, side + 1, shapes["size"].shape, np.int32),
    }
    return Workload(config, recipe, jax.device_get(state), batch)


class StepSpeed(NamedTuple):
    """The whole step, beside a matrix product of the same dtype.

    Attributes:
      compile_seconds: of the step.
      step: seconds.
      images_per_second: over all devices.
      tflops: operations of the step's matrix products over its time, all devices, in 10¹².
      product_tflops: of a large matrix product on one device, times the devices.
      product_share: `tflops` over `product_tflops`.
      mfu: share of the devices' peak; None where nobody knows it.
      temp_bytes, argument_bytes: of the compiled step on one device.
      peak_bytes: that a device says it held at most until the end of the first step; None where
        it does not say.
    """

    compile_seconds: float
    step: Timing
    images_per_second: float
    tflops: float
    product_tflops: float
    product_share: float
    mfu: float | None
    temp_bytes: int
    argument_bytes: int
    peak_bytes: int | None


def bench_step(work: Workload, rounds: int) -> StepSpeed:
    """Compiles the step, and times it `rounds` times in turns with the product."""
    start = time.perf_counter()
    compiled, run_step = compile_step(work)
    compile_seconds = time.perf_counter() - start
    devices, memory = jax.device_count(), compiled.memory_analysis()
    assert memory is not None
    jax.block_until_ready(run_step())
    device = jax.local_devices()[0]
    peak_bytes = (device.memory_stats() or {}).get("peak_bytes_in_use")  # the product adds to it
    product, operations = matrix_product(work.config.dtype)
    times = time_in_turns({"step": run_step, "product": product}, rounds)
    seconds = times["step"].median
    flops = devices * step_flops(work.recipe.step, work.state, work.batch)
    product_tflops = devices * operations / times["product"].median / 1e12
    peak = peak_flops(device.device_kind, work.config.dtype)
    return StepSpeed(
        compile_seconds=compile_seconds,
        step=times["step"],
        images_per_second=work.config.batch_size / seconds,
        tflops=flops / seconds / 1e12,
        product_tflops=product_tflops,
        product_share=flops / seconds / 1e12 / product_tflops,
        mfu=flops / seconds / (devices * peak) if peak else None,
        temp_bytes=memory.temp_size_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        peak_bytes=peak_bytes,
    )


def compile_step(work: Workload) -> tuple[Compiled, Callable[[], dict[str, Array]]]:
    """The compiled step, and a call that takes one step further each time."""
    state = parallel.replicate(work.state, work.config.parallel)
    step = parallel.on_all_devices(work.recipe.step, work.config.parallel, donate=True)
    compiled = step.lower(state, work.batch).compile()

    def run_step():
        nonlocal state
        state, scalars, _ = compiled(state, work.batch)
        return scalars

    return compiled, run_step


def matrix_product(dtype: str) -> tuple[Callable[[], jax.Array], int]:
    """A product of two large random matrices on one device, and its operations."""
    size = PRODUCT_SIZE[jax.default_backend()]
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (size, size), dtype) for key in keys)
    product = jax.jit(jnp.matmul)
    return lambda: product(a, b), 2 * size**3


def bench_split(work: Workload, rounds: int) -> dict[str, float]:
    """Seconds of the parts of a step on one device's share, each compiled on its own.

    The student's backward pass is what teacher, student and losses leave of them all together.
    As one program the step is faster than the sum: nothing between the parts is kept.
    """
    times = time_in_turns(step_parts(work)._asdict(), rounds)
    medians = {name: timing.median for name, timing in times.items()}
    together = medians.pop("gradients")
    earlier = sum(medians[name] for name in ("teacher", "student", "losses"))
    return {
        "augmentation": medians["augmentation"],
        "teacher forward": medians["teacher"],
        "student forward": medians["student"],
        "losses, both ways": medians["losses"],
        "student backward": together - earlier,
        "optimiser and teacher": medians["optimizer"],
    }


class StepParts(NamedTuple):
    """The parts of a step on the first device's share of the batch, as calls.

    Attributes:
      augmentation: all views.
      teacher, student: forward.
      losses: of both heads, and their gradients with respect to the student's output.
      gradients: teacher, student and losses, forward and backward.
      optimizer: the update of student and teacher.
    """

    augmentation: Callable[[], Views]
    teacher: Callable[[], EsViTOutput]
    student: Callable[[], EsViTOutput]
    losses: Callable[[], EsViTOutput]
    gradients: Callable[[], tuple[PyTree, dict[str, Array], dict[str, Array], Array]]
    optimizer: Callable[[], PyTree]


def augmentation(work: Workload) -> Callable[[], Views]:
    """Cuts all views of the first device's share of the batch; compiled when first called."""
    batch = jax.device_put({name: x[0] for name, x in work.batch.items()}, jax.local_devices()[0])
    keys = jax.random.split(jax.random.key(0), len(batch["size"]))
    make_views = jax.jit(work.recipe.make_views)
    return lambda: make_views(keys, batch)


def step_parts(work: Workload) -> StepParts:
    """Compiles each part when it is first called."""
    recipe, model = work.recipe, work.recipe.model
    state = jax.device_put(work.state, jax.local_devices()[0])
    drop_keys = jax.random.split(jax.random.key(1), len(jax.tree.leaves(work.batch)[0][0]))
    options, teacher_temp = recipe.options, recipe.schedules["teacher_temp"](state.step)

    # Batch norms ask all devices of the axis, here one.
    on_one = functools.partial(jax.vmap, in_axes=None, out_axes=None, axis_size=1, axis_name=AXIS)

    @jax.jit
    @on_one
    def teacher(params, views):
        return model.forward_training(params, [views["global"]])[0]

    @jax.jit
    @on_one
    def student(params, views):
        stacks = [views["global"], views["local"]] if len(views["local"]) else [views["global"]]
        return model.forward_training(params, stacks, drop_keys=drop_keys)[0]

    @jax.jit
    @jax.grad
    def losses(student_output, teacher_output):
        return esvit_loss(
            student=student_output,
            teacher=teacher_output,
            centers=state.centers,
            student_temp=options.student_temp,
            teacher_temp=teacher_temp,
            region_weight=options.region_weight,
            prototype_chunk=options.prototype_chunk,
            dtype=options.dtype,
        )[0]

    @jax.jit
    @on_one
    def gradients(params, teacher_params, centers, views):
        return loss_and_gradients(
            params, teacher_params, centers, views, drop_keys,
            model=model, teacher_temp=teacher_temp, options=options,
        )  # fmt: skip

    @jax.jit
    def update(grads, state):
        updates, opt_state = recipe.optimizer.update(
            grads, state.opt_state, state.params, step=state.step
        )
        return optax.apply_updates(state.params, updates), opt_state

    make_views = augmentation(work)
    views = make_views()
    outputs = student(state.params, views), teacher(state.teacher, views)
    grads = gradients(state.params, state.teacher, state.centers, views)[0]
    return StepParts(
        augmentation=make_views,
        teacher=lambda: teacher(state.teacher, views),
        student=lambda: student(state.params, views),
        losses=lambda: losses(*outputs),
        gradients=lambda: gradients(state.params, state.teacher, state.centers, views),
        optimizer=lambda: update(grads, state),
    )
