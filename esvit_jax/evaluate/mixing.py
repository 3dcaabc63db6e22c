"""Mixup and CutMix: images that are two images, and labels that are two labels.

Images 2i and 2i + 1 of a batch are partners, so that what is mixed does not depend on how many
devices share the batch (but for a device with an odd number of them, whose last image stays alone).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key


class Mix(NamedTuple):
    """What is drawn for b images.

    Attributes:
      own: share of the image itself; the rest is its partner's.
      cut: whether the partner's share is a box, in place of a part of every pixel.
      box: top, bottom, left, right of the box, pixels; what is between them is the partner's.
    """

    own: Float[Array, " b"]
    cut: Bool[Array, " b"]
    box: Int[Array, "b 4"]


def draw_mix(
    keys: Key[Array, " b"], image_size: int, mixup: int | float, cutmix: int | float
) -> Mix:
    """Draws how images are mixed: by mixup or CutMix, each in half of the cases if there are both.

    Shares are Beta(a, a) (Zhang et al. 2018). A box has the partner's share of the image's area,
    its centre anywhere in the image; what of it lies beside the image is cut off, and the share is
    that of what is left (Yun et al. 2019).

    Args:
      keys: one an image.
      image_size: pixels along a side.
      mixup, cutmix: a of the two; 0 for none of them, not both.
    """

    def of_one_image(key):
        share_key, other_key = jax.random.split(key)
        which, y, x = jax.random.uniform(other_key, (3,))
        cut = which < (0.5 if mixup and cutmix else float(not mixup))
        a = jnp.where(cut, cutmix or 1.0, mixup or 1.0)
        own = jax.random.beta(share_key, a, a)
        side = jnp.floor(image_size * jnp.sqrt(1.0 - own)).astype(jnp.int32)
        corner = jnp.floor(image_size * jnp.stack([y, x])).astype(jnp.int32) - side // 2
        start, stop = (jnp.clip(edge, 0, image_size) for edge in (corner, corner + side))
        area = jnp.prod(stop - start).astype(jnp.float32)
        own = jnp.where(cut, 1.0 - area / image_size**2, own)
        return Mix(own, cut, jnp.stack([start, stop], axis=1).ravel())

    return jax.vmap(of_one_image)(keys)


def mix_images(images: Float[Array, "b s s c"], mix: Mix) -> Float[Array, "b s s c"]:
    """Images mixed with their partners'."""
    other = images[partners(len(images))]
    pixel = jnp.arange(images.shape[1])
    top, bottom, left, right = mix.box.T[:, :, None]
    rows = (top <= pixel) & (pixel < bottom)
    columns = (left <= pixel) & (pixel < right)
    boxed = rows[:, :, None, None] & columns[:, None, :, None]
    own, cut = (x[:, None, None, None] for x in (mix.own, mix.cut))
    blended = own * images + (1.0 - own) * other
    return jnp.where(cut, jnp.where(boxed, other, images), blended)


def targets(
    labels: Int[Array, " b"], num_classes: int, smoothing: float, mix: Mix | None
) -> Float[Array, "b c"]:
    """What a classifier is to say: (1 - smoothing) of the label and smoothing of every class alike.

    Of a mixed image, the shares of both labels.
    """
    own = (1.0 - smoothing) * jax.nn.one_hot(labels, num_classes) + smoothing / num_classes
    if mix is None:
        return own
    share = mix.own[:, None]
    return share * own + (1.0 - share) * own[partners(len(labels))]


def partners(count: int) -> Int[Array, " count"]:
    """The place of each image's partner."""
    place = jnp.arange(count)
    return jnp.minimum(place ^ 1, count - 1)
