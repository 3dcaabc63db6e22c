"""Multi-crop augmentation on the device: one uint8 canvas in, all normalised views out.

The host sends each image once; everything random happens here, in static shapes, under jit and
vmap. The operations and their order are those of the published recipe, with Pillow's definitions:
random resized crop, flip, colour jitter, greyscale, blur, solarise, normalise.

Inside, an image is `f32[3, h, w]` with levels 0..255. The channels come first because a minor axis
of 3 would leave most of a vector register (CPU) or of the 128 lanes (TPU) empty. Pillow rounds to
whole levels after each operation, its blends and its HSV conversion even downwards; here levels
stay fractional, so one operation differs from Pillow's by about half a level.
"""

import itertools
import math
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int, Key, Real, UInt8

# The default precision of a float32 product on a TPU is one bfloat16 pass. Its 8 bits would put the
# weights and the half-done image off by up to half a level each; three passes keep 16 bits.
PRECISION = jax.lax.Precision.HIGH
CUBIC = -0.5  # the free parameter of the bicubic kernel, as in Pillow
LUMA = np.array([19595, 38470, 7471], np.float32) / 65536  # ITU-R 601, as Pillow's mode "L"
BLUR_PASSES = 3  # box blurs that make up Pillow's Gaussian blur
BOX_TRIES = 10
BOX_DRAWS = 2 * BOX_TRIES + 2  # random numbers in [0, 1) for a crop box
COLOR_DRAWS = 11  # and for all else in a view
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
ORDERS = np.array(list(itertools.permutations(range(4))))  # [24, 4]

Image = Float[Array, "3 h w"]
Number = int | float | Real[Array, ""]


class ViewOptions(Protocol):
    """The section `views` of a config, which says what its fields are."""

    global_size: int
    local_size: int
    num_local: int
    global_scale: tuple[float, float]
    local_scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: float
    jitter_probability: float
    brightness: float
    contrast: float
    saturation: float
    hue: float
    grayscale: float
    blur_probability: tuple[float, float, float]
    blur_sigma: tuple[float, float]
    solarize: tuple[float, float, float]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


if TYPE_CHECKING:
    ViewSection = ViewOptions
else:
    # A config finds its fields by __getattr__, where checks of protocols at run time do not look.
    ViewSection = Any


class ViewParameters(NamedTuple):
    """What is drawn for v views. An operation that does not happen has its neutral value."""

    box: Int[Array, "v 4"]  # y, x, height, width; canvas pixels
    flip: Bool[Array, " v"]
    factors: Float[Array, "v 3"]  # of brightness, contrast, saturation; neutral 1
    hue: Float[Array, " v"]  # turns of the hue circle; neutral 0
    order: Int[Array, "v 4"]  # permutations of BRIGHTNESS, CONTRAST, SATURATION, HUE
    grayscale: Bool[Array, " v"]
    sigma: Float[Array, " v"]  # of the blur, pixels of the view; neutral 0
    solarize: Bool[Array, " v"]


def augment(
    keys: Key[Array, " b"],
    canvas: UInt8[Array, "b s s 3"],
    size: Int[Array, "b 2"],
    views: ViewSection,
) -> dict[str, Float[Array, "v b p p 3"]]:
    """Cuts all views of every image.

    Args:
        keys: one PRNG key an image. The views of an image depend on its own key, pixels and size
            alone, not on its place in the batch.
        canvas: images in the top-left corners of squares; what lies beside them is never seen.
        size: true heights and widths, pixels.
        views: the section `views` of the config.

    Returns:
        `global` f32[2, b, g, g, 3] and `local` f32[num_local, b, l, l, 3], normalised.
    """

    def of_one_image(key, canvas, size):
        image = to_levels(canvas)
        drawn = sample_parameters(key, size, views)

        def render(chosen, view_size):
            of_one_view = lambda p: render_view(image, p, view_size, views)  # noqa: E731
            return jax.vmap(of_one_view)(jax.tree.map(lambda x: x[chosen], drawn))

        return {
            "global": render(slice(0, 2), views.global_size),
            "local": render(slice(2, None), views.local_size),
        }

    return jax.vmap(of_one_image, out_axes=1)(keys, canvas, size)


def center_view(
    canvas: UInt8[Array, "b s s 3"],
    size: Int[Array, "b 2"],
    *,
    view_size: int,
    crop: float,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> Float[Array, "b {view_size} {view_size} 3"]:
    """The view for evaluation: shorter side to view_size / crop pixels, bicubic, then the centre.

    One resample gives the pixels of both steps; lengths and offsets are rounded as torchvision's
    `Resize` and `CenterCrop` round them (the longer side down, the offset half to even). It differs
    from them in Pillow's rounding, and clipping, between the two passes of its resize.

    Args:
        canvas: images in the top-left corners of squares.
        size: true heights and widths, pixels.
        view_size: pixels along a side of the view.
        crop: share of the shorter side that is kept, in (0, 1]; 0.875 resizes to 256 for 224.
        mean: of red, green, blue in 0..1; subtracted.
        std: likewise; divided by.
    """

    def of_one_image(canvas, size):
        return normalize(center_crop(to_levels(canvas), size, view_size, crop), mean, std)

    return jax.vmap(of_one_image)(canvas, size)


def random_view(
    keys: Key[Array, " b"],
    canvas: UInt8[Array, "b s s 3"],
    size: Int[Array, "b 2"],
    *,
    view_size: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    flip: float,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> Float[Array, "b {view_size} {view_size} 3"]:
    """The view that classifiers are trained on: a random resized crop, flipped or not.

    Args:
        keys: one PRNG key an image.
        canvas: images in the top-left corners of squares.
        size: true heights and widths, pixels.
        view_size: pixels along a side of the view.
        scale: least and largest share of the image's area.
        ratio: least and largest width over height.
        flip: probability of a horizontal flip.
        mean: of red, green, blue in 0..1; subtracted.
        std: likewise; divided by.
    """

    def of_one_image(key, canvas, size):
        u = jax.random.uniform(key, (BOX_DRAWS + 1,))
        box = random_crop_box(u[:BOX_DRAWS], size, np.array(scale), ratio)
        view = resized_crop(to_levels(canvas), box, view_size, flip=u[BOX_DRAWS] < flip)
        return normalize(view, mean, std)

    return jax.vmap(of_one_image)(keys, canvas, size)


def center_crop(
    image: Image, size: Int[Array, " 2"], view_size: int, crop: float
) -> Float[Array, "3 {view_size} {view_size}"]:
    """The levels of `center_view`, of one image of the true size (height, width)."""
    resized = round(view_size / crop) * size // size.min()
    first = jnp.round((resized - view_size).astype(jnp.float32) / 2)
    rows, columns = (
        bicubic_weights(image.shape[1 + i], view_size, 0, size[i], resized[i], first[i])
        for i in range(2)
    )
    return resample(image, rows, columns)


def sample_parameters(
    key: Key[Array, ""], size: Int[Array, " 2"], views: ViewSection
) -> ViewParameters:
    """Draws the parameters of all views of one image: global 1, global 2, then the local ones.

    All numbers come from one call of the generator: a view's do not depend on how many views
    follow, and the generator, large when compiled, is compiled once.
    """
    kind = np.array([0, 1] + [2] * views.num_local)
    scale = np.array([views.global_scale, views.global_scale, views.local_scale])[kind]
    blur_probability = np.array(views.blur_probability)[kind]
    solarize_probability = np.array(views.solarize)[kind]
    strength = np.array([views.brightness, views.contrast, views.saturation])[:, None]
    factor_low, factor_high = np.maximum(0, 1 - strength), 1 + strength
    sigma_low, sigma_high = views.blur_sigma

    u = jax.random.uniform(key, (len(kind), BOX_DRAWS + COLOR_DRAWS))
    box = jax.vmap(random_crop_box, (0, None, 0, None))(u[:, :BOX_DRAWS], size, scale, views.ratio)
    u = u[:, BOX_DRAWS:].T
    jitter = u[0] < views.jitter_probability
    return ViewParameters(
        box=box,
        flip=u[1] < views.flip,
        factors=jnp.where(jitter, factor_low + u[2:5] * (factor_high - factor_low), 1.0).T,
        hue=jnp.where(jitter, (2 * u[5] - 1) * views.hue, 0.0),
        order=jnp.asarray(ORDERS)[(u[6] * len(ORDERS)).astype(jnp.int32)],
        grayscale=u[7] < views.grayscale,
        sigma=jnp.where(u[8] < blur_probability, sigma_low + u[9] * (sigma_high - sigma_low), 0.0),
        solarize=u[10] < solarize_probability,
    )


def random_crop_box(
    u: Float[Array, " draws"],
    size: Int[Array, " 2"],
    scale: Float[Array | np.ndarray, " 2"],
    ratio: tuple[float, float],
) -> Int[Array, " 4"]:
    """The box of a random resized crop, by the rule of torchvision's `RandomResizedCrop`.

    Area uniform, ratio log-uniform; the first of ten tries that fits inside the image is placed
    uniformly; if none fits, the largest central box of an allowed ratio.

    Args:
        u: BOX_DRAWS random numbers in [0, 1).
        size: height and width of the image, pixels.
        scale: least and largest share of the image's area.
        ratio: least and largest width over height.

    Returns:
        y, x, height, width, whole pixels.
    """
    height, width = size[0], size[1]
    share = scale[0] + u[:BOX_TRIES] * (scale[1] - scale[0])
    area = (height * width).astype(jnp.float32) * share
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    aspect = jnp.exp(log_low + u[BOX_TRIES:-2] * (log_high - log_low))
    h = round_to_int(jnp.sqrt(area / aspect))
    w = round_to_int(jnp.sqrt(area * aspect))
    fits = (h > 0) & (h <= height) & (w > 0) & (w <= width)
    first = jnp.argmax(fits)
    found = fits[first]
    tallest = round_to_int(width.astype(jnp.float32) / ratio[0])
    widest = round_to_int(height.astype(jnp.float32) * ratio[1])
    h = jnp.where(found, h[first], jnp.minimum(height, tallest))
    w = jnp.where(found, w[first], jnp.minimum(width, widest))

    def place(u, room):
        return (u * (room + 1).astype(jnp.float32)).astype(jnp.int32)

    y = jnp.where(found, place(u[-2], height - h), (height - h) // 2)
    x = jnp.where(found, place(u[-1], width - w), (width - w) // 2)
    return jnp.stack([y, x, h, w])


def round_to_int(x: Array) -> Array:
    """Rounds half to even, as Python's `round`."""
    return jnp.round(x).astype(jnp.int32)


def render_view(
    image: Image, p: ViewParameters, view_size: int, views: ViewSection
) -> Float[Array, "{view_size} {view_size} 3"]:
    """Makes one view of an image from its parameters (a `ViewParameters` without the axis v)."""
    view = resized_crop(image, p.box, view_size, flip=p.flip)
    view = color_jitter(view, p.factors, p.hue, p.order)
    view = jnp.where(p.grayscale, to_grayscale(view), view)
    view = gaussian_blur(view, p.sigma)
    view = jnp.where(p.solarize, solarize(view), view)
    return normalize(view, views.mean, views.std)


def to_levels(canvas: UInt8[Array, "h w 3"]) -> Image:
    """From stored pixels to the layout in which this module computes."""
    return rearrange(canvas, "h w c -> c h w").astype(jnp.float32)


def normalize(
    image: Image, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> Float[Array, "h w 3"]:
    """From levels to what a backbone takes: (x / 255 - mean) / std, channels last."""
    shift, scale = (255 * np.asarray(x, np.float32) for x in (mean, std))
    return (rearrange(image, "c h w -> h w c") - shift) / scale


def resized_crop(
    image: Image, box: Real[Array, " 4"], out: int, *, flip: bool | Bool[Array, ""] = False
) -> Float[Array, "3 {out} {out}"]:
    """Crops to the box (y, x, height, width), then resizes to out × out, bicubic with antialias.

    As Pillow, it sees nothing beside the box: at its borders the kernel is cut and its weights
    renormalised. A flip, left to right, costs nothing: it reverses the order of the columns.
    """
    y, x, h, w = box
    rows = bicubic_weights(image.shape[1], out, y, h, out)
    columns = bicubic_weights(image.shape[2], out, x, w, out)
    return resample(image, rows, jnp.where(flip, columns[::-1], columns))


def bicubic_weights(
    size: int, out: int, start: Number, length: Number, resized: Number, first: Number = 0.0
) -> Float[Array, "{out} {size}"]:
    """Weights of Pillow's bicubic resize along one axis; each row sums to 1.

    The pixels start .. start + length - 1 of an axis of `size` are resized to `resized` pixels, of
    which those numbered first .. first + out - 1 are given.
    """
    start, length, resized, first = (
        jnp.asarray(x, jnp.float32) for x in (start, length, resized, first)
    )
    scale = length / resized
    stretch = jnp.maximum(scale, 1.0)  # antialias: the kernel widens when the image shrinks
    pixel = np.arange(size, dtype=np.float32)
    center = start + (first + (np.arange(out, dtype=np.float32) + 0.5)) * scale
    d = jnp.abs(pixel + 0.5 - center[:, None]) / stretch
    near = ((CUBIC + 2) * d - (CUBIC + 3)) * d * d + 1
    far = ((CUBIC * d - 5 * CUBIC) * d + 8 * CUBIC) * d - 4 * CUBIC
    weights = jnp.where(d < 1, near, jnp.where(d < 2, far, 0.0))
    weights = jnp.where((start <= pixel) & (pixel < start + length), weights, 0.0)
    return weights / weights.sum(1, keepdims=True)


def resample(
    image: Image, rows: Float[Array, "p h"], columns: Float[Array, "q w"]
) -> Float[Array, "3 p q"]:
    """Applies weights along both axes and clips overshoots.

    Rows first: over all views of an image that is one product with the same canvas.
    """
    half = jnp.einsum("ph,chw->pcw", rows, image, precision=PRECISION)
    return jnp.clip(jnp.einsum("pcw,qw->cpq", half, columns, precision=PRECISION), 0, 255)


def color_jitter(
    image: Image, factors: Float[Array, " 3"], hue: Number, order: Int[Array, " 4"]
) -> Image:
    """Brightness, contrast, saturation and hue, in the given order; neutral values change nothing.

    Under vmap every branch of a switch is computed. So the hue, the costly one, stands fixed in the
    middle, with three blends before and three after it, of which those on the wrong side are
    neutral. A scan keeps XLA from computing each blend anew for every later mean.
    """
    hue_at = jnp.argmax(order == HUE)

    def adjust(image, step):
        operation, active = step
        factor = jnp.where(active, factors[jnp.minimum(operation, SATURATION)], 1.0)
        luma = to_luma(image)
        other = jnp.where(operation == SATURATION, luma, 0.0)
        other = jnp.where(operation == CONTRAST, jnp.floor(luma.mean() + 0.5), other)
        return blend(other, image, factor), None

    image, _ = jax.lax.scan(adjust, image, (order[:3], jnp.arange(3) < hue_at))
    image = adjust_hue(image, hue)
    image, _ = jax.lax.scan(adjust, image, (order[1:], jnp.arange(1, 4) > hue_at))
    return image


def adjust_brightness(image: Image, factor: Number) -> Image:
    """Blends with black; factor 0 is black, 1 the image."""
    return blend(jnp.zeros(()), image, factor)


def adjust_contrast(image: Image, factor: Number) -> Image:
    """Blends with the mean grey level of the image, rounded to a whole level."""
    return blend(jnp.floor(to_luma(image).mean() + 0.5), image, factor)


def adjust_saturation(image: Image, factor: Number) -> Image:
    """Blends with the grey image."""
    return blend(to_luma(image), image, factor)


def adjust_hue(image: Image, turns: Number) -> Image:
    """Adds `turns` of a full circle to the hue of the HSV model."""
    r, g, b = image
    value = jnp.maximum(jnp.maximum(r, g), b)
    chroma = value - jnp.minimum(jnp.minimum(r, g), b)
    slope = 1 / jnp.where(chroma > 0, chroma, 1.0)
    from_blue = jnp.where(value == g, 2 + (b - r) * slope, 4 + (r - g) * slope)
    sextant = jnp.where(value == r, (g - b) * slope, from_blue) + 6 * turns

    def channel(offset):
        # A channel is at its peak for two sextants, at its floor for two, and linear in between.
        k = sextant + offset
        k = k - 6 * jnp.floor(k / 6)
        return value - chroma * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)

    return jnp.stack([channel(5), channel(3), channel(1)])


def to_grayscale(image: Image) -> Image:
    """All three channels become the luma."""
    return jnp.broadcast_to(to_luma(image), image.shape)


def to_luma(image: Image) -> Float[Array, "h w"]:
    """Pillow's mode "L", unrounded."""
    return LUMA[0] * image[0] + LUMA[1] * image[1] + LUMA[2] * image[2]


def blend(other: Float[Array, "..."], image: Image, factor: Number) -> Image:
    """other + factor · (image - other), clipped: Pillow's `Image.blend`."""
    return jnp.clip(other + factor * (image - other), 0, 255)


def solarize(image: Image) -> Image:
    """Inverts the levels from 128 up."""
    return jnp.where(image >= 128, 255 - image, image)


def gaussian_blur(image: Image, sigma: Number) -> Image:
    """Pillow's `GaussianBlur(radius=sigma)`, sigma in pixels; 0 changes nothing.

    Two products with banded matrices: on CPUs no slower than adding shifted images, and what
    matrix units are made for.
    """
    rows = blur_weights(image.shape[1], sigma)
    columns = blur_weights(image.shape[2], sigma)
    half = jnp.einsum("chw,qw->chq", image, columns, precision=PRECISION)
    return jnp.einsum("ph,chq->cpq", rows, half, precision=PRECISION)


def blur_weights(size: int, sigma: Number) -> Float[Array, "{size} {size}"]:
    """Weights of the blur along one axis; pixels beyond an end repeat the last one.

    Pillow's Gaussian is three passes of a box of fractional width, chosen so that the variance is
    right (Gwosdek et al., Theoretical Foundations of Gaussian Convolution by Extended Box
    Filtering, 2011). An entry of a pass is the overlap of the box around the row's pixel with the
    column's pixel, where the pixels at the ends reach to infinity.
    """
    variance = sigma**2 / BLUR_PASSES
    whole = jnp.floor((jnp.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    part = part / (6 * (variance - (whole + 1) ** 2))
    reach = whole + part + 0.5  # from the middle of the box to its ends

    pixel = np.arange(size)
    lower = np.where(pixel == 0, -np.inf, pixel - 0.5) - pixel[:, None]
    upper = np.where(pixel == size - 1, np.inf, pixel + 0.5) - pixel[:, None]
    box = (jnp.clip(upper, -reach, reach) - jnp.clip(lower, -reach, reach)) / (2 * reach)
    return jnp.matmul(jnp.matmul(box, box, precision=PRECISION), box, precision=PRECISION)
