"""Which images a backbone takes for alike: nearest neighbours, and all images in a plane."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from esvit_jax.analyze.components import principal_components
from esvit_jax.errors import UserError

METHODS = ("pca", "tsne", "umap")
# Directions that are kept before images are laid out, as is usual for t-SNE.
DIRECTIONS = 50


def nearest_images(
    queries: Float[np.ndarray, "q d"],
    features: Float[np.ndarray, "n d"],
    k: int,
    *,
    leave_out: Int[np.ndarray, " q"] | None = None,
) -> tuple[Int[np.ndarray, "q k"], Float[np.ndarray, "q k"]]:
    """The k images whose features are most like those of each query, by cosine.

    Args:
      queries: features to look for.
      features: of all images.
      k: of them; no more than there are.
      leave_out: an image that does not count, for each query: itself; -1 for none.

    Returns:
      Numbers of the images, and cosines, the most similar first.
    """

    def unit(x: jax.Array) -> jax.Array:
        return x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-12)

    similarity = np.array(
        jnp.matmul(unit(jnp.asarray(queries)), unit(jnp.asarray(features)).T, precision="highest")
    )
    count = len(features)
    if leave_out is not None:
        rows = np.flatnonzero(leave_out >= 0)
        similarity[rows, leave_out[rows]] = -np.inf
        count -= 1
    order = np.argsort(-similarity, axis=1, kind="stable")[:, : min(k, count)]
    return order, np.take_along_axis(similarity, order, axis=1)


def map_images(
    features: Float[np.ndarray, "n d"], method: str = "tsne", seed: int = 0
) -> Float[np.ndarray, "n 2"]:
    """Lays images out in a plane, so that those with similar features are close.

    Args:
      features: of the images; normalised here, as k-NN compares them.
      method: "pca", "tsne" (scikit-learn's, of the first 50 components), or "umap" (the extra
        `umap`).
      seed: of the last two, from 0 to 2**32 - 1.

    Raises:
      UserError: another method, one that is not installed, another seed, or fewer than three
        images.
    """
    if method not in METHODS:
        raise UserError(f"it must be {', '.join(METHODS)}", argument="method", value=method)
    if not 0 <= seed < 2**32:
        raise UserError("it must be from 0 to 4294967295", argument="seed", value=seed)
    if len(features) < 3:
        raise UserError(f"a map needs three images, and there are {len(features)}")
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    if method == "pca":
        return principal_components(unit, 2)
    reduced = principal_components(unit, min(DIRECTIONS, features.shape[1]))
    return np.asarray(_layout(method, len(features), seed).fit_transform(reduced), np.float32)


def _layout(method: str, images: int, seed: int) -> Any:
    if method == "tsne":
        from sklearn.manifold import TSNE

        return TSNE(perplexity=min(30.0, (images - 1) / 3), init="pca", random_state=seed)
    try:
        from umap import UMAP  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            "it is not installed: pip install 'esvit_jax[umap]', or take tsne",
            argument="method", value=method,
        ) from error  # fmt: skip
    return UMAP(n_neighbors=min(15, images - 1), random_state=seed)
