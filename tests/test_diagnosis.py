"""What is found in made-up curves, and that it names fields that exist."""

import itertools
import math
import re

import pytest

from esvit_jax.analyze.diagnosis import BAD, GOOD, NOTE, WATCH, diagnose
from esvit_jax.config import default_config, flatten
from esvit_jax.evaluate.result import RAW_PIXELS, Result

K = 256
LN_K = math.log(K)
HEALTHY = {
    "loss": 4.0, "view_loss": 4.5, "region_loss": 3.5, "teacher_entropy": 0.6,
    "student_entropy": 0.7, "teacher_student_kl": 1.1, "feature_std": 0.8, "feature_rank": 20.0,
    "skipped_steps": 0.0, "data_wait_share": 0.01, "spent_step": 900.0, "spent_data": 10.0,
    "goodput": 0.98,
}  # fmt: skip


def lines(*changes, every=10):
    """A line for each change of what is healthy."""
    return [{"step": every * (i + 1)} | HEALTHY | change for i, change in enumerate(changes)]


def found(records, **more):
    findings = diagnose(records, **{"num_prototypes": K, "warmup_steps": 20, **more})
    return [(finding.level, finding.title) for finding in findings]


def only(records, title, **more):
    findings = diagnose(records, **{"num_prototypes": K, "warmup_steps": 20, **more})
    (finding,) = [finding for finding in findings if finding.title == title]
    return finding


def test_a_healthy_run():
    assert found(lines(*[{}] * 12)) == [(GOOD, "no collapse")]
    what = only(lines(*[{}] * 12), "no collapse").what
    assert what == (
        "at step 120 the entropy of the teacher is 0.60 of ln K, its distance from the student "
        "1.10 nats, the spread of features 0.80 of 1, and they fill 20.0 directions"
    )


UNIFORM = {"teacher_entropy": 1.0, "view_loss": LN_K, "teacher_student_kl": 0.0}
ONE = {"teacher_entropy": 0.0, "view_loss": 0.001, "teacher_student_kl": 0.001}


@pytest.mark.parametrize(
    ("change", "level", "title", "fields"),
    [
        (UNIFORM, BAD, "collapse to uniform", ["loss.warmup_teacher_temp", "loss.teacher_temp"]),
        (ONE, BAD, "collapse to one prototype", ["loss.teacher_temp", "loss.center_momentum"]),
        ({"feature_std": 0.04}, BAD, "collapse of the features", ["optimizer.clip_norm"]),
        ({"feature_rank": 1.2}, BAD, "collapse of the features", ["optimizer.learning_rate"]),
        ({"view_loss": 0.995 * LN_K}, BAD, "the loss is flat at ln K", ["optimizer.learning_rate"]),
        ({"teacher_entropy": 0.995}, WATCH, "the entropy of the teacher is ln K",
         ["loss.teacher_temp"]),
        ({"teacher_entropy": 0.005}, WATCH, "the entropy of the teacher is 0",
         ["loss.teacher_temp"]),
        ({"teacher_student_kl": 0.002}, BAD, "nothing is left to learn", ["loss.teacher_temp"]),
        ({"feature_std": 0.2}, WATCH, "the spread of features shrinks",
         ["optimizer.warmup_epochs"]),
        ({"loss": None, "skipped_steps": 3.0}, BAD, "losses that are not finite", ["dtype"]),
        ({"data_wait_share": 0.4}, WATCH, "the devices wait for images", ["data.num_workers"]),
    ],
)  # fmt: skip
def test_what_is_seen_at_the_end(change, level, title, fields):
    records = lines(*[{}] * 8, *[change] * 4)
    titles = found(records)
    assert (level, title) in titles
    assert ((GOOD, "no collapse") in titles) == (
        level != BAD or title == "losses that are not finite"
    )
    remedy = only(records, title).remedy
    for field in fields:
        assert f"config.{field}" in remedy
    # In the warm-up it is no finding, (Time knows none.)
    if "loss" not in change and "data_wait_share" not in change:
        assert (level, title) not in found(lines(*[change] * 2, *[{}] * 8))


@pytest.mark.parametrize(
    "change",
    [
        {"teacher_entropy": 0.98, "view_loss": LN_K * 0.98, "teacher_student_kl": 0.02},
        {"teacher_entropy": 0.02, "view_loss": 0.2},
        {"feature_std": 0.3, "feature_rank": 1.6},
        {"data_wait_share": 0.19},
    ],
)
def test_just_short_of_it(change):
    assert found(lines(*[{}] * 8, *[change] * 4)) == [(GOOD, "no collapse")]


def test_since_when_and_from_when_to_when():
    finding = only(lines(*[{}] * 6, *[UNIFORM] * 5), "collapse to uniform")
    assert finding.what.startswith(f"since step 70: the loss sits at ln K = {LN_K:.2f}")
    over = lines(*[{}] * 3, *[ONE] * 2, *[{}] * 9)
    assert found(over) == [
        (WATCH, "collapse to one prototype, for a while"), (GOOD, "no collapse")
    ]  # fmt: skip
    finding = only(over, "collapse to one prototype, for a while")
    assert finding.what.startswith("between steps 40 and 50: the teacher gives")
    assert finding.what.endswith("; it is over")


def test_a_kl_of_zero_asks_for_the_opposite_of_what_the_entropy_is():
    dead = {"teacher_student_kl": 0.0}
    sharper = only(lines(*[dead | {"teacher_entropy": 0.9}] * 9), "nothing is left to learn").remedy
    wider = only(lines(*[dead | {"teacher_entropy": 0.1}] * 9), "nothing is left to learn").remedy
    assert sharper.startswith("lower config.loss.teacher_temp")
    assert sharper.endswith("raise config.loss.center_momentum")
    assert wider.startswith("raise config.loss.teacher_temp")
    assert wider.endswith("lower config.loss.center_momentum")


def test_steps_that_were_skipped():
    records = lines({}, {}, {"loss": None, "skipped_steps": 1.0}, *[{"skipped_steps": 4.0}] * 5)
    finding = only(records, "losses that are not finite")
    assert finding.level == WATCH
    assert finding.what == (
        "4 steps were not finite, the first that was logged at step 30; such steps are skipped, "
        "and later ones were finite again"
    )
    one = only(lines(*[{"skipped_steps": 1.0}] * 5), "losses that are not finite")
    assert one.what.startswith("a step was not finite; such")


def test_too_early_to_tell():
    assert found([]) == []
    assert found(lines({}, {})) == [(NOTE, "too early to tell")]
    assert only(lines({}, {}), "too early to tell").what == (
        "no whole lines of metrics after the warm-up of 20 steps, and 2 in all: what stands here "
        "may change"
    )
    three = lines({}, {}, {}, every=1)
    assert found(three, warmup_steps=0) == [(GOOD, "no collapse")]
    assert found(three, warmup_steps=1) == [(NOTE, "too early to tell"), (GOOD, "no collapse")]
    # Of a run of another kind nothing is said that its metrics do not have.
    assert found([{"step": 1, "loss": 2.0, "learning_rate": 0.1}]) == []


def test_not_at_its_end():
    assert found(lines(*[{}] * 8), total_steps=80) == [(GOOD, "no collapse")]
    finding = only(lines(*[{}] * 8), "not at its end", total_steps=1000)
    assert finding.what.startswith("80 of 1,000 steps are logged")


@pytest.mark.parametrize(
    ("spent", "remedy"),
    [
        ({"checkpoint": 800.0, "evaluation": 200.0}, "raise config.checkpoint_every_steps"),
        ({"evaluation": 1000.0}, "raise config.knn_every_steps"),
        ({"start": 1000.0}, ""),
        ({"lost": 890.0}, None),  # goodput is 900 of 1,800
        ({"checkpoint": 300.0, "step": 250.0}, None),  # a run of minutes is mostly its start
    ],
)
def test_goodput(spent, remedy):
    change = {"spent_data": 0.0} | {f"spent_{name}": x for name, x in spent.items()}
    titles = found(lines(*[change] * 8))
    assert ((WATCH, "much time is not spent on steps") in titles) == (remedy is not None)
    if remedy is not None:
        finding = only(lines(*[change] * 8), "much time is not spent on steps")
        assert finding.remedy == remedy
        total = 900.0 + sum(spent.values())
        most = max(spent, key=lambda name: spent[name])
        assert f"goodput is {900 / total:.0%}; most of the rest is {most}" in finding.what


def results(*top1, first_step=0):
    return [Result("knn", {"top1/10": x, "top1/20": x - 1}, step=first_step + 10 * i)
            for i, x in enumerate(top1)]  # fmt: skip


def test_evaluations():
    records = lines(*[{}] * 8)
    pixels = [Result("knn", {"top1/10": 80.0}, RAW_PIXELS)]
    for measured, expected in (
        (results(50.0), []),
        (results(50.0, 60.0, 58.5), []),
        (results(50.0, 60.0, 57.5), ["it was better before"]),
        (results(50.0, 49.0), ["no better than before training"]),
        (results(50.0, 49.0, first_step=5), []),
    ):
        titles = [title for _, title in found(records, results=pixels + measured)]
        assert titles == [*expected, "no collapse"]
    finding = only(records, "it was better before", results=results(50.0, 60.0, 57.5))
    assert finding.what == "at step 10 k-NN top-1 (%) was 60.0, and at step 20 it is 57.5"


def test_a_loss_that_rises_first_is_as_it_should_be():
    rises = [5 - 0.2 * i for i in range(6)] + [4 + 0.3 * i for i in range(6)]
    rises += [5.5 - 0.1 * i for i in range(30)]
    finding = only(lines(*({"loss": x} for x in rises)), "the loss rises before it falls")
    assert finding.level == NOTE
    assert re.match(r"from step \d+ to \d+; that is as it should be", finding.what)


def test_the_worst_comes_first():
    change = {"feature_std": 0.01, "data_wait_share": 0.5}
    levels = [level for level, _ in found(lines(*[change] * 8), total_steps=100)]
    assert levels == [BAD, WATCH, NOTE]


def test_remedies_name_fields_that_exist():
    kinds = [
        {}, UNIFORM, ONE, {"feature_std": 0.04}, {"view_loss": LN_K}, {"teacher_entropy": 1.0},
        {"teacher_entropy": 0.0}, {"teacher_student_kl": 0.0}, {"feature_std": 0.2},
        {"loss": None}, {"data_wait_share": 0.5},
        *({f"spent_{name}": 5000.0} for name in ("data", "checkpoint", "evaluation", "lost",
                                                 "compile")),
    ]  # fmt: skip
    fields = flatten(default_config())
    named = set()
    for kind, measured in itertools.product(kinds, (results(50.0, 60.0, 50.0), results(9.0, 8.0))):
        for finding in diagnose(
            lines(*[{}] * 6, *[kind] * 6), num_prototypes=K, warmup_steps=0, results=measured
        ):
            named |= set(re.findall(r"config\.([a-z_.]*[a-z])", finding.remedy))
    assert len(named) >= 14
    assert named <= set(fields)
