"""Checkpoints of Orbax on disk, written whole or not at all.

A checkpoint has two items: "model" (student, teacher, centers), all that evaluation needs, and
"training" (step, counters, the optimiser's moments). A converted checkpoint is a directory with
the first item alone. Of a damaged checkpoint, which checksums tell, the one before it is used.
"""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from esvit_jax import buckets, checksums, parallel, whole
from esvit_jax.config import ConfigDict
from esvit_jax.config_file import read_config, write_config
from esvit_jax.errors import DiskFull, RunError, UserError
from esvit_jax.models import EsViT, create_model
from esvit_jax.state import ClassifierState, State, TrainState, init_params, zero_centers

ITEMS = ("model", "training")
NO_SPACE = os.strerror(errno.ENOSPC)


class Checkpoints:
    """The checkpoints of a workdir.

    A damaged newest one is named in the log, gets a name that is no step (`6.damaged`), and the one
    before it takes its place.

    Args:
      workdir: local directory or gs:// path.
      every_steps: steps between two checkpoints.
      keep: latest ones kept.
      keep_every_steps: multiples of this step are kept for good; None for none.
      strict: refuse a damaged newest checkpoint, and leave it as it is.

    Raises:
      UserError: all are damaged, or with `strict` the newest is.
    """

    def __init__(
        self,
        workdir: str,
        *,
        every_steps: int = 1,
        keep: int | None = None,
        keep_every_steps: int | None = None,
        strict: bool = False,
    ):
        self._directory = buckets.ready_path(workdir) / "checkpoints"
        whole.newest(self._directory, ITEMS, strict=strict, set_aside=True)
        self._being_saved: int | None = None
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                save_interval_steps=every_steps,
                max_to_keep=keep,
                keep_period=keep_every_steps,
                enable_async_checkpointing=True,
                # So that `save` raises where nothing can be written, and waits for no thread.
                async_options=ocp.AsyncOptions(
                    post_finalization_callback=self._before_commit,
                    create_directories_asynchronously=False,
                ),
            ),
            item_names=ITEMS,
        )

    def latest_step(self) -> int | None:
        """The step of the newest whole checkpoint, or None."""
        return self._manager.latest_step()

    def save(
        self,
        step: int,
        state: TrainState | ClassifierState,
        *,
        force: bool = False,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        """Starts to save `state` if its step is due (or `force`); calls `before` before that.

        Raises:
          RunError: this or the last checkpoint could not be written; `DiskFull` for want of room.
        """
        if step == self.latest_step() or not (force or self._manager.should_save(step)):
            return
        self.wait()
        before()
        self._being_saved = step
        model, training = parallel.to_global(state).to_items()
        with self._unsaved():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    model=ocp.args.StandardSave(model), training=ocp.args.StandardSave(training)
                ),
                force=True,
            )

    def _before_commit(self) -> None:
        """Adds checksums to what is being saved; Orbax calls this when all else is written."""
        if jax.process_index() == 0 and self._being_saved is not None:
            checksums.write(whole.uncommitted(self._directory, self._being_saved))

    def restore(self, state: State) -> State:
        """The newest state, with the structure and shapes of `state`.

        Shapes that have a sharding are read with it, all else to every device.

        Raises:
          UserError: it is damaged or of another shape.
        """
        model, training = _abstract(state).to_items()
        step = self.latest_step()
        with _unreadable(self._directory, step):
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    model=ocp.args.StandardRestore(model),
                    training=ocp.args.StandardRestore(training),
                ),
            )
        return state.with_items(restored["model"], restored["training"])

    def wait(self) -> None:
        """Waits until what was started is on disk.

        Raises:
          RunError: see `save`.
        """
        with self._unsaved():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits likewise, and ends the manager."""
        self.wait()
        with buckets.waiting(self._directory):
            self._manager.close()

    @contextmanager
    def _unsaved(self) -> Iterator[None]:
        """Says in one line which checkpoint could not be written, and which is there."""
        try:
            with buckets.waiting(self._directory):
                yield
        except (OSError, ValueError) as error:  # of Orbax, and of TensorStore
            if buckets.is_unreachable(error):
                raise
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:300]
            older = whole.committed_steps(self._directory)
            newest = f"the newest is that of step {older[-1]}" if older else "there is none yet"
            full = getattr(error, "errno", None) == errno.ENOSPC or NO_SPACE in str(error)
            reason = NO_SPACE if full else reason
            raise (DiskFull if full else RunError)(
                f"checkpoint {self._being_saved} cannot be written to {self._directory}: {reason}; "
                f"{newest}. {'Make room' if full else 'Mend that'}, and start it again"
            ) from error


@contextmanager
def _unreadable(directory: os.PathLike, step: int | None) -> Iterator[None]:
    """Says in one line which checkpoint is damaged, or of another shape than its config.json."""
    try:
        yield
    except (ValueError, KeyError, TypeError, OSError) as error:
        if buckets.is_unreachable(error):
            raise
        reason = " ".join(str(error).split())
        raise UserError(
            f"checkpoint {step} in {directory} is damaged, or does not fit the config.json beside "
            f"it: {reason[:300]}"
        ) from error


def _abstract(tree: PyTree) -> PyTree:
    """Shapes, with the sharding that the arrays are to be restored with."""
    everywhere = parallel.replicated_sharding()

    def abstract(x: Any) -> jax.ShapeDtypeStruct:
        sharding = x.sharding if isinstance(x, jax.ShapeDtypeStruct) else None
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or everywhere)

    return jax.tree.map(abstract, tree)


@buckets.reads_bucket
def has_checkpoint(workdir: str | os.PathLike) -> bool:
    """Whether a checkpoint is there, damaged or not."""
    return bool(whole.committed_steps(buckets.ready_path(workdir) / "checkpoints"))


class LoadedModel(NamedTuple):
    """A trained or converted network.

    Attributes:
      config: of the run.
      origin: see `config_file.write_config`.
      model: the network, `models.create_model(config)`.
      student, teacher: params {"backbone", "view_head", "region_head"}.
      centers: {"view": f32[k], "region": f32[k]}.
      step: training steps behind it.

    Where `origin["parts"]` is "backbone" (a converted backbone), student and teacher are the same
    {"backbone"} and the centers are {}. Of an export with one network the other one is None.
    """

    config: ConfigDict
    origin: dict[str, Any]
    model: EsViT
    student: PyTree
    teacher: PyTree
    centers: dict[str, jax.Array]
    step: int

    def chosen(self, key: str | None = None) -> str:
        """The key of the network to evaluate: the teacher's, unless another one is asked for.

        Of a checkpoint that was converted for its student (`origin["key"]`) it is the student's.
        """
        return key or self.origin.get("key", "teacher")

    def network(self, key: str | None = None) -> PyTree:
        """The params of one of the two networks.

        Args:
          key: "teacher" or "student"; None is the one that is `chosen`.

        Raises:
          UserError: another key, or that of a network that is not there.
        """
        networks = {"teacher": self.teacher, "student": self.student}
        key = self.chosen(key)
        if key not in networks:
            raise UserError("it must be 'teacher' or 'student'", argument="key", value=key)
        if networks[key] is None:
            raise UserError("it was exported without that one", argument="key", value=key)
        return networks[key]


@buckets.reads_bucket
def load_model(
    workdir: str | os.PathLike, step: int | None = None, *, strict: bool = False
) -> LoadedModel:
    """The network in a workdir or a converted checkpoint, replicated over the devices.

    Args:
      workdir: local directory or gs:// path.
      step: of the checkpoint; None is the newest that is not damaged.
      strict: refuse a damaged newest checkpoint, in place of taking the one before it.

    Raises:
      UserError: there is no run, no (such) checkpoint, or one that is damaged or of another shape.
    """
    found = read_config(workdir)
    if found is None:
        what = "has checkpoints but" if has_checkpoint(workdir) else "is no workdir: it has"
        raise UserError(f"{workdir} {what} no config.json")
    config, origin = found
    step = _step_to_load(workdir, step, strict)
    model = create_model(config)
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    shapes = {"student": params, "teacher": params, "centers": zero_centers(model)}
    if origin.get("parts") == "backbone":
        shapes = {"teacher": {"backbone": params["backbone"]}}
    with (
        ocp.CheckpointManager(
            buckets.ready_path(workdir) / "checkpoints",
            options=ocp.CheckpointManagerOptions(create=False, enable_async_checkpointing=False),
            item_names=ITEMS,
        ) as manager,
        _unreadable(manager.directory, step),
    ):
        items = manager.restore(
            step, args=ocp.args.Composite(model=ocp.args.StandardRestore(_abstract(shapes)))
        )
    arrays = items["model"]
    if origin.get("parts") == "backbone":
        arrays |= {"student": arrays["teacher"], "centers": {}}
    return LoadedModel(config, origin, model, **arrays, step=step)


def _step_to_load(workdir: str | os.PathLike, step: int | None, strict: bool) -> int:
    """The step that is asked for, or else the newest whose network is not damaged.

    Raises:
      UserError: there is no such checkpoint, or it is damaged.
    """
    directory = buckets.ready_path(workdir) / "checkpoints"
    steps = whole.committed_steps(directory)
    if not steps or (step is not None and step not in steps):
        have = f"it has steps {steps}" if steps else "it has none"
        wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
        raise UserError(f"{workdir} has no {wanted}; {have}")
    if step is None:
        found = whole.newest(directory, ["model"], strict=strict)
        assert found is not None  # as there are some
        return found
    whole.check(directory, step, ["model"])
    return step


def save_model(
    directory: str | os.PathLike,
    *,
    config: ConfigDict,
    origin: dict[str, Any],
    teacher: Any,
    student: Any = None,
    centers: Any = None,
    step: int = 0,
) -> None:
    """Writes a directory that `load_model` reads: a converted checkpoint.

    With `origin["parts"] = "backbone"` there is a teacher {"backbone"} only.
    """
    model = {"student": student, "teacher": teacher, "centers": centers}
    if origin.get("parts") == "backbone":
        model = {"teacher": teacher}
    checkpoints = buckets.ready_path(directory) / "checkpoints"

    def before_commit() -> None:
        checksums.write(whole.uncommitted(checkpoints, step))

    options = ocp.CheckpointManagerOptions(
        async_options=ocp.AsyncOptions(post_finalization_callback=before_commit)
    )
    with ocp.CheckpointManager(checkpoints, options=options, item_names=ITEMS) as manager:
        manager.save(step, args=ocp.args.Composite(model=ocp.args.StandardSave(model)))
    write_config(directory, config, origin)
