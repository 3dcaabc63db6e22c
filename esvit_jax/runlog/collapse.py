"""Collapse monitors: when all images begin to look alike to the network."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def feature_std(*, features: Float[Array, "n d"]) -> Float[Array, ""]:
    """Spread of the normalised features: mean over d of their standard deviation, times sqrt(d).

    1 when the directions are uniform on the sphere, 0 when all images have the same features
    (Chen & He 2021, "Exploring simple Siamese representation learning", section 4.1). The rows
    should be different images: two views of one image are alike in a good network, too.
    """
    features = features.astype(jnp.float32)
    norm = jnp.linalg.norm(features, axis=1, keepdims=True)
    unit = features / jnp.maximum(norm, 1e-12)
    return jnp.mean(jnp.std(unit, axis=0)) * math.sqrt(features.shape[1])


def effective_rank(*, features: Float[Array, "n d"]) -> Float[Array, ""]:
    """Number of directions that the features fill: 1 (collapse) to min(n, d).

    exp(H(p)), p = singular values / their sum, of the features as they are, not centred (Roy &
    Vetterli 2007, "The effective rank"). They are square roots of the eigenvalues of the smaller
    Gram matrix, so the cost is one symmetric eigenvalue problem of size min(n, d): for log
    steps, or for few rows. All-zero features have rank 1.
    """
    features = features.astype(jnp.float32)
    features = features if features.shape[0] <= features.shape[1] else features.T
    size = features.shape[0]
    gram = jnp.matmul(features, features.T, precision=jax.lax.Precision.HIGHEST)
    eigenvalues = jnp.linalg.eigvalsh(gram)
    # The root blows rounding up: without a floor, a rank of exactly 1 is measured as several.
    floor = size * jnp.finfo(jnp.float32).eps * eigenvalues[-1]
    singular = jnp.sqrt(jnp.where(eigenvalues > floor, eigenvalues, 0.0))
    share = singular / jnp.maximum(jnp.sum(singular), 1e-30)
    return jnp.exp(jnp.sum(jax.scipy.special.entr(share)))


class Collapse(NamedTuple):
    """A kind of collapse, in words.

    Attributes:
      kind: its name, "collapse to uniform".
      what: is seen.
      remedy: the fields of the config to change, and which way.
    """

    kind: str
    what: str
    remedy: str


def collapse_of(scalars: Mapping[str, Any], *, num_prototypes: int) -> Collapse | None:
    """What the metrics of a step look like, if it is a collapse, else None.

    Three kinds are told apart, in this order:
    - uniform: `teacher_entropy` ≥ 0.99 and `view_loss` within 1 % of ln K. The teacher says
      nothing, and the student says it back.
    - one prototype: `teacher_entropy` ≤ 0.01 and `view_loss` ≤ 1 % of ln K. Every view gets the
      same prototype, which the student has learnt.
    - vanishing features: `feature_std` < 0.05 or `feature_rank` < 1.5. All images look alike to
      the backbone; this is where either of the above ends.

    An untrained network can look uniform for a while: ask after the learning rate's warm-up.
    Numbers that are not finite are no collapse.

    Args:
      scalars: of one step; reads `teacher_entropy` (0..1, share of ln K), `view_loss` (nats),
        `feature_std` and `feature_rank`.
      num_prototypes: K.
    """
    uniform_loss = math.log(num_prototypes)
    entropy, loss = float(scalars["teacher_entropy"]), float(scalars["view_loss"])
    if entropy >= 0.99 and abs(loss - uniform_loss) <= 0.01 * uniform_loss:
        return Collapse(
            "collapse to uniform",
            f"the loss sits at ln K = {uniform_loss:.2f} and the teacher prefers no prototype",
            "lower config.loss.warmup_teacher_temp or config.loss.teacher_temp, raise "
            "config.loss.center_momentum, or lower config.optimizer.learning_rate",
        )
    if entropy <= 0.01 and loss <= 0.01 * uniform_loss:
        return Collapse(
            "collapse to one prototype",
            "the teacher gives every view the same one and the loss is near 0",
            "raise config.loss.teacher_temp and config.loss.warmup_teacher_temp, or lower "
            "config.loss.center_momentum so that the center follows faster",
        )
    if float(scalars["feature_std"]) < 0.05 or float(scalars["feature_rank"]) < 1.5:
        return Collapse(
            "collapse of the features",
            "the backbone tells images hardly apart",
            "lower config.optimizer.learning_rate or config.optimizer.clip_norm, or raise "
            "config.optimizer.warmup_epochs or config.optimizer.freeze_prototypes_epochs",
        )
    return None


def collapse_warning(scalars: Mapping[str, Any], *, num_prototypes: int) -> str | None:
    """A warning in words when the metrics of a step look like a collapse, else None.

    The text of a kind is always the same, so a caller that remembers the texts it has shown warns
    once per kind. See `collapse_of`.
    """
    found = collapse_of(scalars, num_prototypes=num_prototypes)
    return found and f"{found.kind}: {found.what}; {found.remedy}"
