"""A bad step again: where in it the numbers begin that are not finite.

The step itself is run, on one CPU device, with its views, the outputs of all its modules and its
gradients looked at in the order in which they are computed.
"""

import collections
import dataclasses
import json
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from flax import linen as nn
from jax.core import Tracer
from jaxtyping import Array, PyTree

from esvit_jax import checkpoint, config_file, parallel
from esvit_jax.config import ConfigDict, resolve
from esvit_jax.errors import UserError
from esvit_jax.models import EsViT
from esvit_jax.recipe import Recipe, build
from esvit_jax.state import TrainState, create_state, init_params

STACKS = ("global views", "local views")


class Seen(NamedTuple):
    """A tensor of the step.

    Attributes:
      name: whose it is, and what.
      shape: of it.
      not_finite: how many of its numbers are NaN or infinite.
      largest: the largest magnitude of the others.
    """

    name: str
    shape: tuple[int, ...]
    not_finite: int
    largest: float


class Replay(NamedTuple):
    """A step that was taken again.

    Attributes:
      step: steps before it.
      loss: of it now; `loss_then` is what it was in the run.
      seen: all tensors, in the order in which they are computed.
    """

    step: int
    loss: float
    loss_then: float
    seen: list[Seen]

    @property
    def first_bad(self) -> int | None:
        """Index of the first tensor with a number that is not finite."""
        return next((i for i, tensor in enumerate(self.seen) if tensor.not_finite), None)


def replay(workdir: str | os.PathLike[str]) -> Replay:
    """Takes the step again that a run left in `workdir/bad_step`.

    All its images are taken by one device. The state is the one after the run's last step: it
    differs from that of the bad step if a good one came between them.

    Raises:
      UserError: there is no bad step, or it cannot be read.
    """
    config, num_images, batch, then = _read(epath.Path(workdir))
    config.accum_steps = 1
    recipe = build(config, resolve(config, num_images=num_images, num_devices=1))
    checkpoints = checkpoint.Checkpoints(str(epath.Path(workdir) / "bad_step"))
    state = checkpoints.restore(jax.eval_shape(lambda: _new_state(recipe)))
    checkpoints.close()
    state = dataclasses.replace(state, step=jnp.asarray(then["step"], jnp.int32))

    watch = _Watch()
    for name in ("params", "teacher", "opt_state", "centers"):
        watch.see(f"the state: {name}", getattr(state, name))
    device = jax.local_devices(backend="cpu")[:1]
    step = parallel.on_all_devices(watch.watched(recipe).step, "pmap", devices=device)
    with nn.intercept_methods(watch.intercept):
        _, scalars, _ = step(state, {name: batch[name][None] for name in ("canvas", "size")})
    jax.block_until_ready(scalars)
    jax.effects_barrier()
    return Replay(then["step"], float(scalars["loss"]), then["loss"], watch.in_order())


def _new_state(recipe: Recipe) -> TrainState:
    params = init_params(recipe.model, jax.random.key(0))
    return create_state(recipe.model, recipe.optimizer, params)


def _read(workdir: epath.Path) -> tuple[ConfigDict, int, dict[str, np.ndarray], dict[str, Any]]:
    """The config and number of images of the run, and the batch and scalars of its bad step."""
    folder = workdir / "bad_step"
    found = config_file.read_config(workdir)
    if found is None or not folder.is_dir():
        raise UserError(
            f"there is no {'config.json' if folder.is_dir() else 'bad_step'} in it: a run leaves a "
            "bad step behind when config.max_bad_steps in a row were not finite",
            argument="workdir", value=str(workdir),
        )  # fmt: skip
    config, origin = found
    try:
        # Opened here, as numpy leaves a file open that it cannot read.
        with (folder / "batch.npz").open("rb") as file:
            arrays = np.load(file, allow_pickle=False)
            batch = {name: arrays[name] for name in ("canvas", "size")}
        then = json.loads((folder / "scalars.json").read_text())
        return config, origin["num_images"], batch, {"step": then["step"], "loss": then["loss"]}
    except Exception as error:  # zipfile and zlib have errors of their own
        message = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"the bad step in {folder} cannot be read: {message}") from error


class _Watch:
    """Looks at tensors, on the host at once, and within a step when it is run."""

    def __init__(self) -> None:
        self._shapes: dict[str, tuple[int, ...]] = {}  # in order
        self._numbers: dict[str, tuple[int, float]] = {}
        self._network = self._stack = ""
        self._calls = collections.Counter[str]()

    def in_order(self) -> list[Seen]:
        """All that was computed."""
        there = [name for name in self._shapes if name in self._numbers]
        return [Seen(name, self._shapes[name], *self._numbers[name]) for name in there]

    def see(self, of: str, tree: PyTree) -> None:
        """Looks at all tensors of real numbers in a tree."""
        for path, x in jax.tree_util.tree_leaves_with_path(tree):
            if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating):
                where = jax.tree_util.keystr(path, simple=True, separator="/")
                self._see(f"{of} {where}".strip(), x)

    def _see(self, name: str, x: Array) -> None:
        while name in self._shapes:  # a module that is called twice
            name += " again"
        self._shapes[name] = x.shape

        def note(not_finite: Any, largest: Any) -> None:
            self._numbers[name] = int(not_finite), float(largest)

        if isinstance(x, Tracer):
            finite = jnp.isfinite(x)
            largest = jnp.max(jnp.where(finite, jnp.abs(x), 0), initial=0.0)
            jax.debug.callback(note, jnp.sum(~finite), largest.astype(jnp.float32))
        else:
            values = np.asarray(x, np.float32)
            finite = np.isfinite(values)
            note(np.sum(~finite), np.max(np.abs(values), where=finite, initial=0.0))

    def watched(self, recipe: Recipe) -> Recipe:
        """The recipe, with its views and gradients looked at."""

        def make_views(keys, batch):
            views = recipe.make_views(keys, batch)
            self.see("the views:", views)
            return views

        def update(updates, state, params=None, **fields):
            self.see("the gradients:", updates)
            return recipe.optimizer.update(updates, state, params, **fields)

        optimizer = optax.GradientTransformationExtraArgs(recipe.optimizer.init, update)
        return recipe._replace(make_views=make_views, optimizer=optimizer)

    def intercept(self, call: Any, args: Any, fields: Any, context: nn.module.InterceptorContext):
        """Calls a method of a module, and looks at what a module returns."""
        if context.method_name != "__call__":
            return call(*args, **fields)
        module, path = context.module, context.module.path
        if isinstance(module, EsViT):  # a student is told to drop paths, a teacher is not
            told = args[1] if len(args) > 1 else None
            self._network = "the teacher" if told is None or told is False else "the student"
            self._calls.clear()
        if len(path) == 1:  # the backbone or a head, once for each stack of views
            self._stack = f", {STACKS[self._calls[path[0]]]}"
            self._calls[path[0]] += 1
        out = call(*args, **fields)
        if path:
            self.see(f"{self._network}{self._stack}: {'/'.join(path)}", out)
        if len(path) == 1:
            self._stack = ""
        return out
