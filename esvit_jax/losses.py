"""The losses and the centers, on one device. Axes: v views, b images, n regions, d features,
k prototypes; t teacher, s student.

Both losses are means over pairs of a teacher view and a *different* student view, 2 (V - 1) of
them for V views. Teacher rows come as their expected prototypes and student rows with their
log-normalisers, so that the cross-entropy of a pair of rows is

    log_normalizer - student . expected / student_temp        (see `prototypes`).
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from esvit_jax.models.esvit import EsViTOutput, HeadOutput
from esvit_jax.prototypes import expected_prototypes, log_normalizer

HIGHEST = jax.lax.Precision.HIGHEST


def esvit_loss(
    *,
    student: EsViTOutput,
    teacher: EsViTOutput,
    centers: Mapping[str, Float[Array, " k"]],
    student_temp: float,
    teacher_temp: Array | float,
    region_weight: float = 0.5,
    prototype_chunk: int = 0,
    dtype: DTypeLike = jnp.float32,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """EsViT's loss of a student's views against a teacher's global views (paper, sec. 3).

        L = (1 - w) mean_(s,t) H(q_t, p_s) + w mean_(s,t) mean_i H(q_(t, m(i)), p_(s, i))

    with w = region_weight, a half in the paper, over the pairs of a teacher view t and a different
    student view s, with p = softmax(logits / student_temp), q = softmax((logits - center) /
    teacher_temp), H(q, p) = -sum_k q_k log p_k, and m(i) the teacher region whose backbone features
    are most similar to those of student region i.
    In plain Python, with all logits [view, image, (region,) k] at hand (the view loss; the region
    loss takes q[t] at the matches):

        pairs = [(s, t) for t in range(2) for s in range(V) if s != t]
        loss = mean(-(q[t] * log(p[s])).sum(-1).mean() for s, t in pairs)

    Here no logits of all K prototypes are ever held; `prototypes` says how.

    Args:
      student: of all views, the stack of global views first; differentiable.
      teacher: of the global views; a constant.
      centers: {"view": f32[k]}, and "region" if regions are to be matched too.
      student_temp: of the student's softmax.
      teacher_temp: of the teacher's softmax.
      region_weight: share of the region loss, in (0, 1]; of no account without regions.
      prototype_chunk: prototypes held at a time; 0 means all.
      dtype: of the factors of products with prototypes; everything else is float32.

    Returns:
      The scalar loss, and scalars to watch by name. `view_loss`, `region_loss` and
      `teacher_student_kl` are in nats; `teacher_entropy` and `student_entropy`, of the view head,
      are a share of ln K, 0 to 1.
    """

    temps = {"student_temp": student_temp, "teacher_temp": teacher_temp}
    fields = temps | {"prototype_chunk": prototype_chunk, "dtype": dtype}
    sides = _sides(student.heads["view"], teacher.heads["view"], centers["view"], **fields)
    view = view_loss(
        student=jnp.concatenate(student.heads["view"].vectors),
        log_normalizer=jnp.concatenate(sides.log_normalizers),
        expected=sides.expected,
        student_temp=student_temp,
    )
    log_k = math.log(len(centers["view"]))
    scalars = {
        "view_loss": view,
        "teacher_entropy": sides.teacher_entropy / log_k,
        "student_entropy": sides.student_entropy / log_k,
        "teacher_student_kl": view - sides.teacher_entropy,
    }
    if "region" not in centers:
        return view, scalars

    sides = _sides(student.heads["region"], teacher.heads["region"], centers["region"], **fields)
    region = region_loss(
        student=student.heads["region"].vectors,
        log_normalizer=sides.log_normalizers,
        student_features=student.region_features,
        expected=sides.expected,
        teacher_features=teacher.region_features[0],
        student_temp=student_temp,
    )
    loss = (1 - region_weight) * view + region_weight * region
    return loss, scalars | {"region_loss": region}


class _Sides(NamedTuple):
    """What the cross-entropies of one head are made of, beside the student's vectors.

    Attributes:
      expected: f32[2, b, (n,) d], the expected prototypes of the teacher's rows.
      log_normalizers: one f32[v, b, (n)] a stack, of the student's rows.
      teacher_entropy, student_entropy: means over rows, nats.
    """

    expected: Array
    log_normalizers: list[Array]
    teacher_entropy: Array
    student_entropy: Array


def _sides(
    student: HeadOutput,
    teacher: HeadOutput,
    center: Float[Array, " k"],
    *,
    student_temp: float,
    teacher_temp: Array | float,
    prototype_chunk: int,
    dtype: DTypeLike,
) -> _Sides:
    """The two passes over the prototypes of one head; see `esvit_loss`."""
    expected, teacher_entropy = expected_prototypes(
        rearrange(teacher.vectors[0], "... d -> (...) d"),
        teacher.prototypes,
        student.prototypes,
        center,
        teacher_temp,
        prototype_chunk,
        dtype,
    )
    # All stacks in one pass.
    rows = [rearrange(x, "... d -> (...) d") for x in student.vectors]
    normalizers, student_entropy = log_normalizer(
        jnp.concatenate(rows), student.prototypes, student_temp, prototype_chunk, dtype
    )
    parts = jnp.split(normalizers, np.cumsum([len(r) for r in rows])[:-1])
    return _Sides(
        expected.reshape(teacher.vectors[0].shape),
        [n.reshape(x.shape[:-1]) for n, x in zip(parts, student.vectors, strict=True)],
        teacher_entropy.mean(),
        student_entropy.mean(),
    )


def match_regions(
    *,
    student_features: Float[Array, "*#b s d"],
    teacher_features: Float[Array, "*#b t d"],
) -> Int[Array, "*b s"]:
    """The teacher region of largest cosine similarity for every student region (paper, sec. 3.2).

    Args:
      student_features, teacher_features: float32 backbone region features (not head outputs).

    Returns:
      int[..., s] in 0..t-1; the choice has no gradient.
    """

    features = student_features, teacher_features
    return jnp.argmax(region_similarity(*map(jax.lax.stop_gradient, features)), axis=-1)


def region_similarity(
    first: Float[Array, "*#b s d"], second: Float[Array, "*#b t d"]
) -> Float[Array, "*b s t"]:
    """The cosine of every region of one map with every one of another, in float32."""

    def unit(x):
        x = x.astype(jnp.float32)
        return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)

    # Full float32: a coarser product would break ties between near neighbours by rounding.
    return jnp.einsum("...sd,...td->...st", unit(first), unit(second), precision=HIGHEST)


def _different_views(student_views: int, first: int = 0) -> np.ndarray:
    """1 where teacher view t and student view first + s differ: f32[2, student_views]."""
    return 1.0 - np.eye(2, first + student_views, dtype=np.float32)[:, first:]


def view_loss(
    *,
    student: Float[Array, "v b d"],
    log_normalizer: Float[Array, "v b"],
    expected: Float[Array, "t b d"],
    student_temp: float,
) -> Float[Array, ""]:
    """Cross-entropy between views, mean over pairs and images (paper, eq. 2).

    Args:
      student: f32[v, b, d] view-head vectors, global views first.
      log_normalizer: f32[v, b], of the student's softmax.
      expected: f32[2, b, d], expected prototypes of the teacher's views.
      student_temp: of the student's softmax.
    """
    products = jnp.einsum("tbd,vbd->tvb", expected, student, precision=HIGHEST) / student_temp
    pairs = (log_normalizer - products).mean(axis=-1)
    different = _different_views(student.shape[0])
    return jnp.sum(pairs * different) / different.sum()


def region_loss(
    *,
    student: Sequence[Float[Array, "_ b _ d"]],
    log_normalizer: Sequence[Float[Array, "_ b _"]],
    student_features: Sequence[Float[Array, "_ b _ f"]],
    expected: Float[Array, "2 b m d"],
    teacher_features: Float[Array, "2 b m f"],
    student_temp: float,
) -> Float[Array, ""]:
    """Cross-entropy between matched regions, mean over pairs, images, regions (paper, eq. 3).

    Args:
      student: f32[v, b, n, d] region-head vectors, one entry a view size, global views first.
      log_normalizer: f32[v, b, n] likewise.
      student_features: f32[v, b, n, f] likewise, the backbone's region features.
      expected: f32[2, b, m, d], expected prototypes of the teacher's regions.
      teacher_features: f32[2, b, m, f], the backbone's region features.
      student_temp: of the student's softmax.
    """
    total, pairs, first = jnp.zeros(()), 0.0, 0
    for vectors, normalizers, features in zip(
        student, log_normalizer, student_features, strict=True
    ):
        matches = match_regions(
            student_features=features[None], teacher_features=teacher_features[:, None]
        )
        # One row of zeros and a one for each student region: as a product, the gather and its
        # gradient are small matrix products.
        chosen = jax.nn.one_hot(matches, expected.shape[2], dtype=jnp.float32)
        targets = jnp.einsum("tvbnm,tbmd->tvbnd", chosen, expected, precision=HIGHEST)
        products = jnp.einsum("tvbnd,vbnd->tvbn", targets, vectors, precision=HIGHEST)
        losses = (normalizers - products / student_temp).mean(axis=(-1, -2))
        different = _different_views(vectors.shape[0], first)
        total += jnp.sum(losses * different)
        pairs += different.sum()
        first += vectors.shape[0]
    return total / pairs


def update_center(
    *, center: Float[Array, " k"], mean_logits: Float[Array, " k"], momentum: float
) -> Float[Array, " k"]:
    """Running mean of the teacher's raw logits: momentum * c + (1 - momentum) * mean."""
    return momentum * center + (1.0 - momentum) * mean_logits
