"""What the metrics of a run say of its health, in words, and which fields would change it.

Pure: lines of metrics in, findings out. What "too low" means is written once, here and in
`runlog.collapse`, which warns of the same while a run trains.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from esvit_jax.analyze.figures import curve, first_rise
from esvit_jax.evaluate.result import RAW_PIXELS, Result, by_evaluation, heading
from esvit_jax.runlog.clock import SPENT_ON
from esvit_jax.runlog.collapse import Collapse, collapse_of

Line = Mapping[str, Any]
# From what is to be put right now, to what is as it should be.
BAD, WATCH, NOTE, GOOD = LEVELS = ("bad", "watch", "note", "good")
MONITORS = ("view_loss", "teacher_entropy", "teacher_student_kl", "feature_std", "feature_rank")
# Lines after the warm-up from which anything can be told.
ENOUGH_LINES = 3
# Nats below which the student repeats the teacher (Caron et al. 2021, figure 7: 0 is a collapse).
DEAD_KL = 0.01
# Share of its highest value below which the spread of features is said to shrink.
SHRUNK = 1 / 3
# Shares of time: spent waiting for data, and not spent on steps. Of a run shorter than this many
# seconds, most is the start.
LONG_WAIT, LOW_GOODPUT, LONG_RUN = 0.2, 0.5, 600
# Points of an evaluation that are no noise.
CLEAR_POINTS = 2.0
TIME_REMEDIES = {
    "data": "raise config.data.num_workers or config.data.num_threads",
    "checkpoint": "raise config.checkpoint_every_steps",
    "evaluation": "raise config.knn_every_steps",
    "lost": "lower config.checkpoint_every_steps: what came after the last one is done again",
    "compile": "keep compiled programs: config.compilation_cache",
    "start": "",
}


class Finding(NamedTuple):
    """One thing that the metrics show.

    Attributes:
      level: one of `LEVELS`.
      title: what it is.
      what: was seen, with numbers and steps.
      remedy: the fields of the config to change, and which way; "" where nothing is to be done.
    """

    level: str
    title: str
    what: str
    remedy: str = ""


class Seen(NamedTuple):
    """The metrics of a run, sorted.

    Attributes:
      losses: the lines of training, all of them.
      settled: those after the warm-up that have all monitors, as finite numbers.
      num_prototypes: K.
    """

    losses: list[Line]
    settled: list[Line]
    num_prototypes: int

    @property
    def tail(self) -> list[Line]:
        """The last quarter of what is settled: how things stand."""
        return self.settled[-max(1, len(self.settled) // 4) :]

    @property
    def uniform_loss(self) -> float:
        """ln K."""
        return math.log(self.num_prototypes)

    def collapse(self, line: Line) -> Collapse | None:
        """What one line looks like."""
        return collapse_of(line, num_prototypes=self.num_prototypes)


def diagnose(
    lines: Sequence[Line],
    *,
    num_prototypes: int | None,
    warmup_steps: int,
    total_steps: int | None = None,
    results: Sequence[Result] = (),
) -> list[Finding]:
    """What the metrics of a run show, the worst first.

    Args:
      lines: of its metrics.jsonl.
      num_prototypes: K; None where nobody knows, and of collapses nothing is said.
      warmup_steps: of the learning rate; what an untrained network looks like is no finding.
      total_steps: that the run is to take; None where nobody knows.
      results: of the evaluations in it.
    """
    losses = [line for line in lines if "loss" in line]
    settled = [line for line in losses if line["step"] > warmup_steps and _has_monitors(line)]
    found = [*_not_finite(losses), *_time(losses), *_evaluations(results)]
    if num_prototypes and any(name in line for line in losses for name in MONITORS):
        seen = Seen(losses, settled, num_prototypes)
        if len(settled) < ENOUGH_LINES:
            found.append(_too_early(seen, warmup_steps))
        if settled:
            found += _learning(seen)
    found += [*_rise(losses), *_unfinished(losses, total_steps)]
    return sorted(found, key=lambda finding: LEVELS.index(finding.level))


def _has_monitors(line: Line) -> bool:
    values = (line.get(name) for name in MONITORS)
    return all(value is not None and math.isfinite(value) for value in values)


def _learning(seen: Seen) -> Iterator[Finding]:
    """Collapses and what leads to them; if there is none now, that."""
    found = [*_collapses(seen)]
    if not any(finding.level == BAD for finding in found):
        found += [*_flat_loss(seen), *_entropy(seen), *_dead_kl(seen), *_shrinking(seen)]
    yield from found
    if not any(finding.level == BAD for finding in found):
        last = seen.settled[-1]
        yield Finding(
            GOOD, "no collapse",
            f"at step {last['step']:,} the entropy of the teacher is "
            f"{last['teacher_entropy']:.2f} of ln K, its distance from the student "
            f"{last['teacher_student_kl']:.2f} nats, the spread of features "
            f"{last['feature_std']:.2f} of 1, and they fill {last['feature_rank']:.1f} directions",
        )  # fmt: skip


def _not_finite(losses: Sequence[Line]) -> Iterator[Finding]:
    skipped = max((line.get("skipped_steps") or 0 for line in losses), default=0)
    values = ((line["step"], line["loss"]) for line in losses)
    bad = [step for step, loss in values if loss is None or not math.isfinite(loss)]
    if not (skipped or bad):
        return
    where = f", the first that was logged at step {bad[0]:,}" if bad else ""
    now = bool(bad) and bad[-1] == losses[-1]["step"]
    count = f"{skipped:.0f} steps were" if skipped > 1 else "a step was"
    if not skipped:
        count = f"{len(bad)} logged losses were"
    yield Finding(
        BAD if now else WATCH, "losses that are not finite",
        f"{count} not finite{where}; such steps are skipped"
        + ("" if now else ", and later ones were finite again"),
        "lower config.optimizer.learning_rate or config.optimizer.clip_norm (0 is no limit), or "
        "set config.dtype=float32",
    )  # fmt: skip


def _collapses(seen: Seen) -> Iterator[Finding]:
    """Each kind: since when, or from when to when."""
    kinds: dict[str, tuple[Collapse, list[int]]] = {}
    now, since = None, 0
    for line in seen.settled:
        found = seen.collapse(line)
        if found:
            kinds.setdefault(found.kind, (found, []))[1].append(line["step"])
        if not now or not found or found.kind != now.kind:
            now, since = found, line["step"]
    for kind, (found, steps) in kinds.items():
        if now and now.kind == kind:
            yield Finding(BAD, kind, f"since step {since:,}: {found.what}", found.remedy)
        else:
            yield Finding(
                WATCH, f"{kind}, for a while",
                f"between steps {steps[0]:,} and {steps[-1]:,}: {found.what}; it is over",
                f"if it comes back: {found.remedy}",
            )  # fmt: skip


def _flat_loss(seen: Seen) -> Iterator[Finding]:
    """The student says nothing, although the teacher does."""
    top = seen.uniform_loss
    if all(
        abs(line["view_loss"] - top) <= 0.01 * top and line["teacher_entropy"] < 0.99
        for line in seen.tail
    ):
        yield Finding(
            BAD, "the loss is flat at ln K",
            f"since step {seen.tail[0]['step']:,} it is within 1 % of ln K = {top:.2f}: the "
            "student prefers no prototype, although the teacher does",
            "raise config.optimizer.learning_rate, or lower config.optimizer.warmup_epochs, "
            "config.optimizer.freeze_prototypes_epochs or config.loss.student_temp",
        )  # fmt: skip


def _entropy(seen: Seen) -> Iterator[Finding]:
    entropies = [line["teacher_entropy"] for line in seen.tail]
    since = f"since step {seen.tail[0]['step']:,}"
    if min(entropies) >= 0.99:
        yield Finding(
            WATCH, "the entropy of the teacher is ln K",
            f"{since} it prefers no prototype, so that there is little to learn from it",
            "lower config.loss.teacher_temp and config.loss.warmup_teacher_temp, or raise "
            "config.loss.center_momentum",
        )  # fmt: skip
    if max(entropies) <= 0.01:
        yield Finding(
            WATCH, "the entropy of the teacher is 0",
            f"{since} it gives every view one prototype alone and says nothing of the others",
            "raise config.loss.teacher_temp and config.loss.warmup_teacher_temp, or lower "
            "config.loss.center_momentum",
        )  # fmt: skip


def _dead_kl(seen: Seen) -> Iterator[Finding]:
    """Nothing is left to learn: views alike and images alike look the same from there."""
    if any(line["teacher_student_kl"] > DEAD_KL for line in seen.tail):
        return
    entropy = sum(line["teacher_entropy"] for line in seen.tail) / len(seen.tail)
    sharper = entropy > 0.5
    yield Finding(
        BAD, "nothing is left to learn",
        f"since step {seen.tail[0]['step']:,} the student's answers are the teacher's (KL below "
        f"{DEAD_KL} nats) for views that differ; the entropy of both is {entropy:.2f} of ln K",
        ("lower" if sharper else "raise") + " config.loss.teacher_temp and "
        "config.loss.warmup_teacher_temp, or "
        + ("raise" if sharper else "lower") + " config.loss.center_momentum",
    )  # fmt: skip


def _shrinking(seen: Seen) -> Iterator[Finding]:
    highest = max(seen.settled, key=lambda line: line["feature_std"])
    last = seen.tail[-1]
    if max(line["feature_std"] for line in seen.tail) >= SHRUNK * highest["feature_std"]:
        return
    yield Finding(
        WATCH, "the spread of features shrinks",
        f"it was {highest['feature_std']:.2f} at step {highest['step']:,} and is "
        f"{last['feature_std']:.2f} at step {last['step']:,}; below 0.05 images look alike",
        "lower config.optimizer.learning_rate or config.optimizer.clip_norm, or raise "
        "config.optimizer.warmup_epochs",
    )  # fmt: skip


def _too_early(seen: Seen, warmup_steps: int) -> Finding:
    steps = f"{warmup_steps:,} step" + ("s" if warmup_steps != 1 else "")
    count = len(seen.settled)
    return Finding(
        NOTE, "too early to tell",
        f"{count or 'no'} whole line{'s' if count != 1 else ''} of metrics after the warm-up of "
        f"{steps}, and {len(seen.losses)} in all: what stands here may change",
    )  # fmt: skip


def _time(losses: Sequence[Line]) -> Iterator[Finding]:
    waits = [x for line in losses if (x := line.get("data_wait_share")) is not None]
    tail = waits[-max(1, len(waits) // 4) :]
    if waits and sum(tail) / len(tail) >= LONG_WAIT:
        yield Finding(
            WATCH, "the devices wait for images",
            f"{sum(tail) / len(tail):.0%} of the time of late", TIME_REMEDIES["data"],
        )  # fmt: skip
    spent = {name: losses[-1].get(f"spent_{name}") or 0.0 for name in SPENT_ON} if losses else {}
    total = sum(spent.values())
    if total < LONG_RUN or spent["step"] >= LOW_GOODPUT * total:
        return
    most = max((name for name in spent if name != "step"), key=lambda name: spent[name])
    yield Finding(
        WATCH, "much time is not spent on steps",
        f"goodput is {spent['step'] / total:.0%}; most of the rest is {most}, "
        f"{spent[most] / total:.0%}",
        TIME_REMEDIES[most],
    )  # fmt: skip


def _evaluations(results: Sequence[Result]) -> Iterator[Finding]:
    """Whether features have become better, and whether they still are."""
    for evaluation, found in by_evaluation(results).items():
        quantity = found[0].first_quantity
        values = [
            (result.step, max(result.quantity(quantity).values()))
            for result in found
            if result.subject != RAW_PIXELS and result.step is not None
            and result.first_quantity == quantity
        ]  # fmt: skip
        if len(values) < 2:
            continue
        (first_step, first), (last_step, last) = values[0], values[-1]
        best_step, best = max(values, key=lambda value: value[1])
        name = heading(evaluation, quantity)
        if first_step == 0 and last < first:
            yield Finding(
                WATCH, "no better than before training",
                f"before the first step {name} was {first:.1f}, and at step {last_step:,} it is "
                f"{last:.1f}",
                "raise config.total_epochs; if the loss does not fall either, change "
                "config.optimizer.learning_rate",
            )  # fmt: skip
        elif best - last > CLEAR_POINTS:
            yield Finding(
                WATCH, "it was better before",
                f"at step {best_step:,} {name} was {best:.1f}, and at step {last_step:,} it is "
                f"{last:.1f}",
                "keep more checkpoints (config.checkpoint_keep_every_steps), or lower "
                "config.total_epochs",
            )  # fmt: skip


def _rise(losses: Sequence[Line]) -> Iterator[Finding]:
    if rise := first_rise(curve(losses, "loss")):
        yield Finding(
            NOTE, "the loss rises before it falls",
            f"from step {rise[0]:,} to {rise[1]:,}; that is as it should be: a new teacher says "
            "much the same of every image, until the centers take that away. How images differ is "
            "harder to predict",
        )  # fmt: skip


def _unfinished(losses: Sequence[Line], total_steps: int | None) -> Iterator[Finding]:
    if losses and total_steps and losses[-1]["step"] < total_steps:
        yield Finding(
            NOTE, "not at its end",
            f"{losses[-1]['step']:,} of {total_steps:,} steps are logged; the same esvit train "
            "command goes on from the newest checkpoint",
        )  # fmt: skip
