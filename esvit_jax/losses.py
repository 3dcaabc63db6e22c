"""The losses and the centers, on one device. Axes: v views, b images, n regions, d features,
k prototypes; t teacher, s student.

Both losses are means over pairs of a teacher view and a *different* student view, 2 (V - 1) of
them for V views. Teacher rows come as their expected prototypes and student rows with their
log-normalisers, so that the cross-entropy of a pair of rows is

    log_normalizer - student . expected / student_temp        (see `prototypes`).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

HIGHEST = jax.lax.Precision.HIGHEST


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

    def unit(x):
        x = jax.lax.stop_gradient(x.astype(jnp.float32))
        return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)

    # Full float32: a coarser product would break ties between near neighbours by rounding.
    similarity = jnp.einsum(
        "...sd,...td->...st", unit(student_features), unit(teacher_features), precision=HIGHEST
    )
    return jnp.argmax(similarity, axis=-1)


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
