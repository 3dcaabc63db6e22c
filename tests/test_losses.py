"""Both losses, the matches and the centers against loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esvit_jax import losses
from esvit_jax.losses import esvit_loss
from esvit_jax.models import EsViTOutput, HeadOutput

K, D, F, IMAGES, REGIONS = 7, 4, 5, 2, (6, 3)  # regions of a global and of a local view
STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.07


def normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def network(views, seed):
    """Outputs of a network for so many views of each size, as random numbers."""
    rng = np.random.default_rng(seed)
    stacks = [(v, n) for v, n in zip(views, REGIONS, strict=False) if v]
    return EsViTOutput(
        heads={
            "view": HeadOutput(
                vectors=tuple(normal(rng, v, IMAGES, D) for v, _ in stacks),
                prototypes=normal(rng, K, D),
            ),
            "region": HeadOutput(
                vectors=tuple(normal(rng, v, IMAGES, n, D) for v, n in stacks),
                prototypes=normal(rng, K, D),
            ),
        },
        view_features=tuple(normal(rng, v, IMAGES, F) for v, _ in stacks),
        region_features=tuple(normal(rng, v, IMAGES, n, F) for v, n in stacks),
    )


def centers(seed=9):
    rng = np.random.default_rng(seed)
    return {"view": normal(rng, K), "region": normal(rng, K)}


def loss_of(student, teacher, center, chunk=0, **fields):
    return esvit_loss(
        student=student, teacher=teacher, centers=center, student_temp=STUDENT_TEMP,
        teacher_temp=jnp.asarray(TEACHER_TEMP), prototype_chunk=chunk, dtype=jnp.float32,
        **fields,
    )  # fmt: skip


# The reference: one pair of distributions at a time, in float64.


def distribution(vector, prototypes, temp, center=None):
    logits = np.asarray(prototypes, np.float64) @ np.asarray(vector, np.float64)
    logits = (logits - (0.0 if center is None else np.asarray(center, np.float64))) / temp
    exps = np.exp(logits - logits.max())
    return exps / exps.sum()


def cross_entropy(student, teacher, head, center, s, t):
    q = distribution(t, teacher.heads[head].prototypes, TEACHER_TEMP, center[head])
    p = distribution(s, student.heads[head].prototypes, STUDENT_TEMP)
    return -sum(q[k] * np.log(p[k]) for k in range(K))


def nearest(feature, features):
    """The first index of the largest cosine similarity."""
    best, best_cosine = 0, -np.inf
    for i, other in enumerate(np.asarray(features, np.float64)):
        feature = np.asarray(feature, np.float64)
        cosine = feature @ other / np.linalg.norm(feature) / np.linalg.norm(other)
        if cosine > best_cosine:
            best, best_cosine = i, cosine
    return best


def naive_losses(student, teacher, center):
    """(view loss, region loss) over all pairs of a teacher view and a different student view."""
    view, region, pairs = 0.0, 0.0, 0
    views = [
        (stack, v) for stack, x in enumerate(student.heads["view"].vectors) for v in range(len(x))
    ]
    for t in range(2):
        for s, (stack, v) in enumerate(views):
            if s == t:
                continue
            pairs += 1
            for b in range(IMAGES):
                vectors = (
                    student.heads["view"].vectors[stack][v, b],
                    teacher.heads["view"].vectors[0][t, b],
                )
                view += cross_entropy(student, teacher, "view", center, *vectors) / IMAGES
                n = student.heads["region"].vectors[stack].shape[2]
                for i in range(n):
                    match = nearest(
                        student.region_features[stack][v, b, i], teacher.region_features[0][t, b]
                    )
                    vectors = (
                        student.heads["region"].vectors[stack][v, b, i],
                        teacher.heads["region"].vectors[0][t, b, match],
                    )
                    loss = cross_entropy(student, teacher, "region", center, *vectors)
                    region += loss / IMAGES / n
    assert pairs == 2 * (len(views) - 1)
    return view / pairs, region / pairs


@pytest.mark.parametrize("num_local", [0, 1, 3])
def test_losses_equal_loops(num_local):
    student, teacher, center = network((2, num_local), 0), network((2,), 1), centers()
    view, region = naive_losses(student, teacher, center)
    for chunk in (0, 3):
        loss, scalars = jax.jit(loss_of, static_argnums=3)(student, teacher, center, chunk)
        np.testing.assert_allclose(scalars["view_loss"], view, rtol=2e-6)
        np.testing.assert_allclose(scalars["region_loss"], region, rtol=2e-6)
        np.testing.assert_allclose(loss, 0.5 * view + 0.5 * region, rtol=2e-6)
    loss, _ = loss_of(student, teacher, center, region_weight=0.1)
    np.testing.assert_allclose(loss, 0.9 * view + 0.1 * region, rtol=2e-6)
    loss, scalars = loss_of(student, teacher, {"view": center["view"]})
    np.testing.assert_allclose(loss, view, rtol=2e-6)
    assert "region_loss" not in scalars


def test_scalars_to_watch():
    student, teacher, center = network((2, 3), 0), network((2,), 1), centers()
    _, scalars = loss_of(student, teacher, center, 3)

    def mean_entropy(rows, *fields):
        probs = [distribution(row, *fields) for x in rows for row in x.reshape(-1, D)]
        return np.mean([-(p * np.log(p)).sum() for p in probs])

    teacher_entropy = mean_entropy(
        teacher.heads["view"].vectors,
        teacher.heads["view"].prototypes,
        TEACHER_TEMP,
        center["view"],
    )
    student_entropy = mean_entropy(
        student.heads["view"].vectors, student.heads["view"].prototypes, STUDENT_TEMP
    )
    np.testing.assert_allclose(scalars["teacher_entropy"], teacher_entropy / np.log(K), rtol=1e-4)
    np.testing.assert_allclose(scalars["student_entropy"], student_entropy / np.log(K), rtol=1e-4)
    # Every teacher view is in as many pairs, so that the mean entropy is that of the pairs.
    kl = naive_losses(student, teacher, center)[0] - teacher_entropy
    np.testing.assert_allclose(scalars["teacher_student_kl"], kl, rtol=1e-5)
    assert kl > 0


def test_gradients_are_those_of_the_plain_formula():
    student, teacher, center = network((2, 3), 0), network((2,), 1), centers()

    features = student.region_features  # constants of the choice

    def plain(student):
        """The formula with all logits and an explicit gather, by jax's own derivatives."""

        def log_probs(x, head):
            w = student.heads[head].prototypes
            return jax.nn.log_softmax(x @ w.T / STUDENT_TEMP)

        def probs(x, head):
            w = teacher.heads[head].prototypes
            return jax.nn.softmax((x @ w.T - center[head]) / TEACHER_TEMP)

        total, first = 0.0, 0
        for stack, views in enumerate(student.heads["view"].vectors):
            for v in range(len(views)):
                for t in range(2):
                    if t == first + v:
                        continue
                    q, log_p = (
                        probs(teacher.heads["view"].vectors[0][t], "view"),
                        log_probs(views[v], "view"),
                    )
                    total -= 0.5 * jnp.mean(jnp.sum(q * log_p, axis=-1))
                    log_p = log_probs(student.heads["region"].vectors[stack][v], "region")
                    for b in range(IMAGES):
                        others = teacher.region_features[0][t, b]
                        match = [nearest(f, others) for f in features[stack][v, b]]
                        q = probs(
                            teacher.heads["region"].vectors[0][t, b, np.array(match)], "region"
                        )
                        total -= 0.5 * jnp.mean(jnp.sum(q * log_p[b], axis=-1)) / IMAGES
            first += len(views)
        return total / (2 * (first - 1))

    expected = jax.grad(plain)(student)
    ours = jax.jit(jax.grad(lambda s: loss_of(s, teacher, center, 3)[0]))(student)
    for a, b in zip(jax.tree.leaves(ours.heads), jax.tree.leaves(expected.heads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        assert np.linalg.norm(b) > 0.01
    for x in (
        *ours.region_features,
        *ours.view_features,
    ):  # nothing flows through the choice of regions
        assert not np.any(x)


def test_teacher_and_centers_get_no_gradient():
    student, teacher, center = network((2, 1), 0), network((2,), 1), centers()
    gradients = jax.jit(jax.grad(lambda t, c: loss_of(student, t, c)[0], argnums=(0, 1)))(
        teacher, center
    )
    assert all(not np.any(x) for x in jax.tree.leaves(gradients))


def test_view_loss_is_a_mean_over_different_views():
    rng = np.random.default_rng(2)
    student, normalizer = normal(rng, 5, 3, D), normal(rng, 5, 3)
    expected = normal(rng, 2, 3, D)
    loss = losses.view_loss(
        student=student, log_normalizer=normalizer, expected=expected, student_temp=0.5
    )
    terms = [
        normalizer[s, b] - student[s, b] @ expected[t, b] / 0.5
        for t in range(2) for s in range(5) for b in range(3) if s != t
    ]  # fmt: skip
    np.testing.assert_allclose(loss, np.mean(terms), rtol=1e-5)


def test_matches_equal_loops_and_are_of_directions():
    rng = np.random.default_rng(3)
    student, teacher = normal(rng, 2, 3, 8, F), normal(rng, 2, 3, 6, F)
    teacher = teacher * jnp.asarray(rng.uniform(0.01, 100, (2, 3, 6, 1)), jnp.float32)
    matches = losses.match_regions(student_features=student, teacher_features=teacher)
    assert matches.shape == (2, 3, 8)
    for i in np.ndindex(2, 3, 8):
        assert matches[i] == nearest(student[i], teacher[i[:2]])
    longest = jnp.argmax(jnp.einsum("abnf,abmf->abnm", student, teacher), axis=-1)
    assert np.any(longest != matches)  # products alone would choose otherwise


def test_first_of_equal_matches():
    teacher = jnp.asarray([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    student = jnp.asarray([[2.0, 0.0], [0.0, 0.5], [0.0, 0.0]])
    matches = losses.match_regions(student_features=student, teacher_features=teacher)
    np.testing.assert_array_equal(matches, [1, 0, 0])


def test_match_is_float32_for_bfloat16_features():
    """Near neighbours that one product in bfloat16 would not tell apart."""
    teacher = jnp.asarray([[1.0, 0.004], [1.0, 0.0], [1.0, -0.004]])
    student = jnp.asarray([[1.0, 0.0]], jnp.bfloat16)
    matches = losses.match_regions(student_features=student, teacher_features=teacher)
    np.testing.assert_array_equal(matches, [1])


def test_center():
    rng = np.random.default_rng(4)
    center, mean = normal(rng, K), normal(rng, K)
    update = functools.partial(losses.update_center, center=center, mean_logits=mean)
    np.testing.assert_allclose(update(momentum=0.9), 0.9 * center + 0.1 * mean, rtol=1e-6)
    np.testing.assert_array_equal(update(momentum=1.0), center)
    np.testing.assert_array_equal(update(momentum=0.0), mean)
