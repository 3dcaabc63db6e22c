"""Which of a run's checkpoints can be used: those that were written to their end, undamaged."""

from collections.abc import Sequence

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from esvit_jax import checksums, processes
from esvit_jax.errors import UserError

_NAMES = ocp.path.step.standard_name_format()


def committed_steps(directory: epath.Path) -> list[int]:
    """The steps of the checkpoints in a folder that were written to their end, in order."""
    if not directory.exists():
        return []
    found = _NAMES.find_all(directory)
    return sorted(x.step for x in found if ocp.utils.is_checkpoint_finalized(x.path))


def uncommitted(directory: epath.Path, step: int) -> epath.Path:
    """The folder of a checkpoint that is being written; on a bucket it has its name already."""
    start = f"{step}.orbax-checkpoint-tmp"
    temporary = [path for path in directory.iterdir() if path.name.startswith(start)]
    return temporary[0] if temporary else directory / str(step)


def newest(
    directory: epath.Path, items: Sequence[str], *, strict: bool, set_aside: bool = False
) -> int | None:
    """The newest checkpoint that is not damaged; None where there are none.

    Process 0 looks, and names in the log what is damaged; all processes get its answer.

    Args:
      directory: of the checkpoints.
      items: those that are to be read.
      strict: refuse a damaged one instead of looking at the one before.
      set_aside: give damaged ones a name that is no step, such as 6.damaged, as theirs will be
        written again.

    Raises:
      UserError: all are damaged, or with `strict` the newest is.
    """
    answer: tuple[int | None, str] = (None, "")
    if jax.process_index() == 0:
        answer = _newest(directory, items, strict)
        if set_aside and answer[0] is not None:
            _set_aside(directory, newer_than=answer[0])
    step, refusal = processes.from_first(answer)
    if refusal:
        raise UserError(refusal)
    return step


def check(directory: epath.Path, step: int, items: Sequence[str]) -> None:
    """Refuses a checkpoint that is damaged.

    Raises:
      UserError: says what is.
    """
    what = checksums.damage(directory / str(step), items) if jax.process_index() == 0 else None
    if what := processes.from_first(what):
        raise UserError(_damaged(directory, step, what))


def _newest(directory: epath.Path, items: Sequence[str], strict: bool) -> tuple[int | None, str]:
    """The answer of `newest`, or why there is none."""
    damaged: list[str] = []
    for step in reversed(committed_steps(directory)):
        what = checksums.damage(directory / str(step), items)
        if what is None:
            if damaged and strict:
                return None, f"{damaged[0]}; checkpoint {step} would do, but strict forbids it"
            if damaged:
                logging.warning("%s; checkpoint %d is used", "; ".join(damaged), step)
            if not checksums.are_there(directory / str(step)):
                logging.warning(
                    "checkpoint %d in %s has no checksums, as an earlier version wrote it: "
                    "some damage would go unnoticed", step, directory,
                )  # fmt: skip
            return step, ""
        damaged.append(_damaged(directory, step, what))
    if damaged:
        return None, f"{'; '.join(damaged)}; there is no other"
    return None, ""


def _damaged(directory: epath.Path, step: int, what: str) -> str:
    return f"checkpoint {step} in {directory} is damaged ({what})"


def _set_aside(directory: epath.Path, newer_than: int) -> None:
    for step in committed_steps(directory):
        if step > newer_than:
            aside = directory / f"{step}.damaged"
            if aside.exists():
                aside.rmtree()
            (directory / str(step)).rename(aside)
