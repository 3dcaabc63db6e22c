"""The augmentation against Pillow on real photos, and its random parameters as distributions."""

import functools
import itertools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from scipy import stats

from esvit_jax.config import default_config
from esvit_jax.data import augment as aug

PHOTOS = sorted((Path(__file__).parent / "data" / "photos").glob("*.jpg"))
CANVAS = 512


@functools.cache
def photo(path):
    return Image.open(path).convert("RGB")


def on_canvas(image, fill: int | None = 0):
    """The photo in the corner of a canvas, and its size; beside it `fill`, or noise for None."""
    shape = (CANVAS, CANVAS, 3)
    noise = np.random.default_rng(1).integers(0, 256, shape)
    canvas = np.full(shape, fill, np.uint8) if fill is not None else noise.astype(np.uint8)
    canvas[: image.height, : image.width] = np.asarray(image)
    return jnp.asarray(canvas), jnp.array([image.height, image.width])


def levels(image):
    return aug.to_levels(jnp.asarray(np.asarray(image)))


def error(ours, pillow):
    """Mean absolute difference in levels of 255; `ours` is channels first."""
    return np.abs(np.moveaxis(np.asarray(ours), 0, -1) - np.asarray(pillow, np.float32)).mean()


@functools.partial(jax.jit, static_argnames="out")
def crop_from_canvas(canvas, box, flip, out):
    return aug.resized_crop(aug.to_levels(canvas), box, out, flip=flip)


@pytest.fixture(params=PHOTOS, ids=lambda path: path.stem)
def image(request):
    return photo(request.param)


@pytest.fixture
def square(image):
    """One size for all photos, so that an operation is compiled once."""
    left = (image.width - 300) // 2
    return image.crop((left, 0, left + 300, 300))


def test_photos_are_there():
    assert len(PHOTOS) == 4


def test_view_options_are_the_section_of_the_config():
    assert set(aug.ViewOptions.__annotations__) == set(default_config().views)


# -- Operations against Pillow --------------------------------------------------------------------


@pytest.mark.parametrize("out", [224, 96])
def test_resized_crop_is_pillows_crop_then_resize(image, out):
    h, w = image.height, image.width
    inside = (40, 50, 200, 180)
    small = (100, 120, 37, 61)  # enlarged
    corner = (h - 150, w - 222, 150, 222)
    canvas, _ = on_canvas(image, fill=None)
    for y, x, height, width in [(0, 0, h, w), inside, small, corner, (0, 7, 90, 90)]:
        expected = image.crop((x, y, x + width, y + height)).resize(
            (out, out), Image.Resampling.BICUBIC
        )
        ours = crop_from_canvas(canvas, jnp.array([y, x, height, width]), False, out)
        assert error(ours, expected) < 0.6
        difference = np.abs(np.moveaxis(np.asarray(ours), 0, -1) - np.asarray(expected, np.float32))
        # Borders included. Pillow also clips between the passes: it shows where edges cross.
        assert np.percentile(difference, 99) < 2 and difference.max() < 30
        flipped = crop_from_canvas(canvas, jnp.array([y, x, height, width]), True, out)
        np.testing.assert_array_equal(flipped, ours[:, :, ::-1])


def test_crop_of_the_same_size_changes_nothing(image):
    canvas, _ = on_canvas(image)
    ours = crop_from_canvas(canvas, jnp.array([30, 20, 96, 96]), False, 96)
    np.testing.assert_allclose(ours, levels(image)[:, 30:126, 20:116], atol=1e-4)


@pytest.mark.parametrize("factor", [0.0, 0.6, 0.83, 1.2, 1.4])
@pytest.mark.parametrize(
    "ours, pillow",
    [
        (aug.adjust_brightness, ImageEnhance.Brightness),
        (aug.adjust_contrast, ImageEnhance.Contrast),
        (aug.adjust_saturation, ImageEnhance.Color),
    ],
    ids=["brightness", "contrast", "saturation"],
)
def test_blends_are_pillows(square, ours, pillow, factor):
    result = jax.jit(ours)(levels(square), factor)
    assert error(result, pillow(square).enhance(factor)) < 1.0
    assert result.min() >= 0 and result.max() <= 255


def pillow_hue(image, turns):
    """The hue shift of torchvision's Pillow path: whole steps of 1/255 turn, wrapping at 256."""
    h, s, v = image.convert("HSV").split()
    shifted = (np.asarray(h).astype(np.int32) + int(turns * 255)).astype(np.uint8)
    return Image.merge("HSV", (Image.fromarray(shifted), s, v)).convert("RGB")


@pytest.mark.parametrize("turns", [-0.1, -0.05, 0.0, 0.03, 0.1])
def test_hue_is_pillows(square, turns):
    assert error(jax.jit(aug.adjust_hue)(levels(square), turns), pillow_hue(square, turns)) < 2.0


def test_hue_round_trip_and_pure_colours(square):
    same = jax.jit(aug.adjust_hue)(levels(square), 0.0)
    np.testing.assert_allclose(same, levels(square), atol=1e-3)
    red = jnp.array([255.0, 0, 0]).reshape(3, 1, 1)
    for turns, color in [(1 / 3, (0, 255, 0)), (-1 / 3, (0, 0, 255)), (1 / 6, (255, 255, 0))]:
        ours = aug.adjust_hue(red, turns).ravel()
        np.testing.assert_allclose(ours, color, atol=1e-3)


def test_grayscale_is_pillows(image):
    ours = aug.to_grayscale(levels(image))
    expected = image.convert("L")
    assert np.abs(np.asarray(ours) - np.asarray(expected, np.float32)).max() <= 0.5
    assert ours.shape == (3, image.height, image.width)


@pytest.mark.parametrize("sigma", [0.1, 0.35, 0.8, 1.3, 2.0, 3.5])
def test_blur_is_pillows(image, sigma):
    for patch in [image.resize((224, 224)), image.crop((60, 60, 156, 156))]:
        ours = jax.jit(aug.gaussian_blur)(levels(patch), sigma)
        expected = patch.filter(ImageFilter.GaussianBlur(sigma))
        assert error(ours, expected) < 1.0
        edge = np.abs(np.asarray(ours)[:, :4] - levels(expected)[:, :4])
        assert edge.mean() < 1.2  # the border repeats, as in Pillow


def test_blur_weights_have_the_variance_of_the_gaussian():
    for sigma in [0.3, 1.0, 2.0]:
        row = np.asarray(aug.blur_weights(64, sigma), np.float64)[32]
        distance = np.arange(64) - 32
        assert row.sum() == pytest.approx(1, abs=1e-5)
        assert (row * distance**2).sum() == pytest.approx(sigma**2, rel=1e-3)
    np.testing.assert_array_equal(aug.blur_weights(16, 0.0), np.eye(16))


def test_solarize_is_pillows(image):
    assert error(aug.solarize(levels(image)), ImageOps.solarize(image, 128)) == 0


OPERATIONS = {
    aug.BRIGHTNESS: lambda image, f, _: ImageEnhance.Brightness(image).enhance(f[0]),
    aug.CONTRAST: lambda image, f, _: ImageEnhance.Contrast(image).enhance(f[1]),
    aug.SATURATION: lambda image, f, _: ImageEnhance.Color(image).enhance(f[2]),
    aug.HUE: lambda image, _, hue: pillow_hue(image, hue),
}


def test_jitter_follows_every_order():
    tiny = photo(PHOTOS[0]).resize((64, 64))
    factors, hue = (1.4, 0.6, 1.2), -0.1
    singles = {
        aug.BRIGHTNESS: jax.jit(lambda x: aug.adjust_brightness(x, factors[0])),
        aug.CONTRAST: jax.jit(lambda x: aug.adjust_contrast(x, factors[1])),
        aug.SATURATION: jax.jit(lambda x: aug.adjust_saturation(x, factors[2])),
        aug.HUE: jax.jit(lambda x: aug.adjust_hue(x, hue)),
    }
    orders = jnp.array(list(itertools.permutations(range(4))))
    jitter = jax.jit(
        jax.vmap(lambda order: aug.color_jitter(levels(tiny), jnp.array(factors), hue, order))
    )
    for order, ours in zip(orders, jitter(orders), strict=True):
        step, expected = levels(tiny), tiny
        for operation in order.tolist():
            step = singles[operation](step)
            expected = OPERATIONS[operation](expected, factors, hue)
        np.testing.assert_allclose(ours, step, atol=0.02)
        assert error(ours, expected) < 3.5  # four truncations of Pillow add up


def jitted(views):
    return jax.jit(lambda keys, canvas, size: aug.augment(keys, canvas, size, views))


@functools.cache
def published():
    return jitted(default_config().views)


def view_with_pillow(image, p, size, views):
    """The whole chain for one view, every step a call of Pillow."""
    y, x, h, w = p.box.tolist()
    view = image.crop((x, y, x + w, y + h)).resize((size, size), Image.Resampling.BICUBIC)
    view = ImageOps.mirror(view) if p.flip else view
    for operation in p.order.tolist() if p.hue != 0 else []:
        view = OPERATIONS[operation](view, p.factors.tolist(), float(p.hue))
    view = view.convert("L").convert("RGB") if p.grayscale else view
    view = view.filter(ImageFilter.GaussianBlur(float(p.sigma))) if p.sigma > 0 else view
    view = ImageOps.solarize(view, 128) if p.solarize else view
    return (np.asarray(view) / 255 - views.mean) / views.std


def test_all_views_of_the_published_recipe_are_pillows(image):
    views = default_config().views
    canvas, size = on_canvas(image, fill=None)
    key = jax.random.key(167)  # of which global view 2 is flipped, jittered, blurred and solarised
    result = published()(key[None], canvas[None], size[None])
    drawn = jax.jit(lambda key: aug.sample_parameters(key, size, views))(key)
    assert drawn.flip[1] and drawn.hue[1] and drawn.sigma[1] > 0.8 and drawn.solarize[1]
    assert result["global"].shape == (2, 1, 224, 224, 3)
    assert result["local"].shape == (8, 1, 96, 96, 3)
    errors = []
    for v, ours in enumerate([*result["global"][:, 0], *result["local"][:, 0]]):
        p = jax.tree.map(lambda x: x[v], drawn)  # noqa: B023
        expected = view_with_pillow(image, p, ours.shape[0], views)
        errors.append((np.abs(np.asarray(ours) - expected) * 255 * views.std).mean())
    # Pillow truncates at every blend and conversion, and later factors enlarge what it lost.
    assert np.median(errors) < 2 and max(errors) < 5


def pillow_center(image, view_size, resized):
    """torchvision's Resize(resized, bicubic) and CenterCrop(view_size)."""
    w, h = image.size
    shape = (resized, int(resized * h / w)) if w <= h else (int(resized * w / h), resized)
    image = image.resize(shape, Image.Resampling.BICUBIC)
    left, top = round((image.width - view_size) / 2), round((image.height - view_size) / 2)
    return image.crop((left, top, left + view_size, top + view_size))


@pytest.mark.parametrize(
    "view_size, crop, resized", [(224, 0.875, 256), (96, 0.875, 110), (64, 1.0, 64)]
)
def test_center_view_is_torchvisions(view_size, crop, resized):
    images = [photo(path) for path in PHOTOS]
    images += [
        photo(PHOTOS[3]).transpose(Image.Transpose.ROTATE_90),
        photo(PHOTOS[1]).crop((0, 0, 31, 90)),
    ]
    canvas, size = map(
        jnp.stack, zip(*[on_canvas(image, fill=None) for image in images], strict=True)
    )
    views = default_config().views
    run = functools.partial(
        aug.center_view, view_size=view_size, crop=crop, mean=views.mean, std=views.std
    )
    ours = jax.jit(run)(canvas, size)
    assert ours.shape == (len(images), view_size, view_size, 3) and ours.dtype == jnp.float32
    ours = (np.asarray(ours) * views.std + views.mean) * 255
    for result, image in zip(ours, images, strict=True):
        expected = np.asarray(pillow_center(image, view_size, resized), np.float32)
        assert np.abs(result - expected).mean() < 0.6


def test_random_view_is_a_crop_of_pillow_and_perhaps_a_flip():
    images = [photo(path) for path in PHOTOS] * 2
    keys = jax.random.split(jax.random.key(3), len(images))
    canvas, size = map(
        jnp.stack, zip(*[on_canvas(image, fill=None) for image in images], strict=True)
    )
    views = default_config().views
    scale, ratio = (0.08, 1.0), (3 / 4, 4 / 3)
    run = functools.partial(
        aug.random_view, view_size=64, scale=scale, ratio=ratio, flip=0.5, mean=views.mean,
        std=views.std,
    )  # fmt: skip
    ours = (np.asarray(jax.jit(run)(keys, canvas, size)) * views.std + views.mean) * 255
    flips, areas = [], []
    for result, key, image in zip(ours, keys, images, strict=True):
        u = jax.random.uniform(key, (aug.BOX_DRAWS + 1,))
        box = aug.random_crop_box(
            u[:-1], jnp.array([image.height, image.width]), np.array(scale), ratio
        )
        y, x, h, w = map(int, box)
        expected = image.crop((x, y, x + w, y + h)).resize((64, 64), Image.Resampling.BICUBIC)
        flips.append(bool(u[-1] < 0.5))
        expected = ImageOps.mirror(expected) if flips[-1] else expected
        assert np.abs(result - np.asarray(expected, np.float32)).mean() < 0.6
        areas.append(h * w / (image.height * image.width))
    assert set(flips) == {False, True} and max(areas) > 2 * min(areas)


# -- Random parameters ----------------------------------------------------------------------------

N = 20_000


@functools.cache
def drawn():
    """Parameters of N images of 300 × 400 with the published recipe: [N, 10, ...]."""
    views = default_config().views
    draw = jax.jit(jax.vmap(lambda key: aug.sample_parameters(key, jnp.array([300, 400]), views)))
    return jax.tree.map(np.asarray, draw(jax.random.split(jax.random.key(0), N)))


def assert_rate(happened, probability):
    """Every column of [N, v] within 4.5 standard deviations; impossible and certain are exact."""
    rate, probability = happened.mean(0), np.broadcast_to(probability, happened.shape[1:])
    slack = 4.5 * np.sqrt(probability * (1 - probability) / N)
    assert (np.abs(rate - probability) <= slack).all(), rate


def assert_uniform(values, low, high):
    assert low <= values.min() and values.max() <= high
    assert stats.kstest(values, "uniform", (low, high - low)).pvalue > 1e-4


def test_rates():
    p = drawn()
    jittered = (p.hue != 0) | (p.factors != 1).any(-1)
    assert_rate(p.flip, 0.5)
    assert_rate(jittered, 0.8)
    assert_rate(p.grayscale, 0.2)
    assert_rate(p.sigma > 0, np.array([1.0, 0.1] + 8 * [0.5]))
    assert_rate(p.solarize, np.array([0, 0.2] + 8 * [0]))


def test_operations_are_drawn_independently():
    p = drawn()
    happened = [p.flip, p.hue != 0, p.grayscale, p.sigma > 0]
    columns = np.stack([x[:, v] for x in happened for v in (2, 3)])  # of two local views
    correlation = np.corrcoef(columns) - np.eye(len(columns))
    assert np.abs(correlation).max() < 5 / math.sqrt(N)


def test_ranges():
    p = drawn()
    jittered = p.hue != 0
    for i, strength in enumerate([0.4, 0.4, 0.2]):
        assert_uniform(
            p.factors[..., i][jittered], np.float32(1 - strength), np.float32(1 + strength)
        )
    assert_uniform(p.hue[jittered], -0.1, 0.1)
    assert_uniform(p.sigma[p.sigma > 0], 0.1, 2.0)


def test_factors_are_never_negative():
    views = default_config().views
    views.update(brightness=1.5, jitter_probability=1.0)
    keys = jax.random.split(jax.random.key(0), 500)
    size = jnp.array([30, 30])
    p = jax.jit(jax.vmap(lambda key: aug.sample_parameters(key, size, views)))(keys)
    assert 0 <= p.factors[..., 0].min() < 0.05 and 2.4 < p.factors[..., 0].max() <= 2.5


def test_orders_are_uniform():
    number = drawn().order[:, 5] @ [1000, 100, 10, 1]
    orders, counts = np.unique(number, return_counts=True)
    expected = {int("".join(map(str, order))) for order in itertools.permutations(range(4))}
    assert set(orders.tolist()) == expected
    assert stats.chisquare(counts).pvalue > 1e-4


RATIO = (3 / 4, 4 / 3)
boxes = jax.jit(
    jax.vmap(
        lambda u, size, scale: aug.random_crop_box(u, size, scale, RATIO), in_axes=(0, None, None)
    )
)


def loop_box(rng, height, width, scale, ratio):
    """torchvision's RandomResizedCrop.get_params, as a loop; also returns the try that fitted."""
    for attempt in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.integers(0, height - h + 1), rng.integers(0, width - w + 1), h, w, attempt
    h, w = height, width
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w, 10


def assert_same_distribution(ours, theirs):
    result = stats.ks_2samp(ours, theirs)
    assert result.pvalue > 1e-4  # pyright: ignore[reportAttributeAccessIssue]  (scipy is untyped)


@pytest.mark.parametrize("height, width", [(300, 400), (400, 300), (100, 260), (28, 28)])
@pytest.mark.parametrize("scale", [(0.4, 1.0), (0.05, 0.4)])
def test_boxes_are_distributed_as_torchvisions(height, width, scale):
    n, rng = 4000, np.random.default_rng(3)
    expected = np.array([loop_box(rng, height, width, scale, RATIO)[:4] for _ in range(n)])
    u = jax.random.uniform(jax.random.key(1), (n, aug.BOX_DRAWS))
    ours = np.asarray(boxes(u, jnp.array([height, width]), jnp.array(scale)))
    assert (ours[:, :2] >= 0).all() and (ours[:, 2:] >= 1).all()
    assert (ours[:, :2] + ours[:, 2:] <= [height, width]).all()
    for i in range(4):
        assert_same_distribution(ours[:, i], expected[:, i])
    assert_same_distribution(ours[:, 2] * ours[:, 3], expected[:, 2] * expected[:, 3])
    assert_same_distribution(ours[:, 3] / ours[:, 2], expected[:, 3] / expected[:, 2])


def test_box_takes_the_first_try_that_fits_and_replays_the_loop():
    """The same numbers through the loop give the same boxes, the fallback included."""

    class Replay:
        def __init__(self, u):
            self.area, self.aspect = iter(u[:10].tolist()), iter(u[10:20].tolist())
            self.turn, self.place = itertools.cycle([self.area, self.aspect]), iter(u[20:].tolist())

        def uniform(self, low, high):
            return low + next(next(self.turn)) * (high - low)

        def integers(self, low, high):
            return low + int(next(self.place) * (high - low))

    u = np.asarray(jax.random.uniform(jax.random.key(5), (300, aug.BOX_DRAWS)))
    attempts = []
    scale = (0.4, 1.0)
    for size in [(300, 400), (40, 400), (400, 40), (9, 9), (1, 300)]:
        for ours, numbers in zip(
            np.asarray(boxes(u, jnp.array(size), jnp.array(scale))), u, strict=True
        ):
            *expected, attempt = loop_box(Replay(numbers), *size, scale, RATIO)
            assert np.abs(ours - expected).max() <= 1  # float32 against float64 at a rounding edge
            attempts.append(attempt)
    assert {0, 1, 2, 10} <= set(attempts)


# -- The whole ------------------------------------------------------------------------------------


@functools.cache
def small(num_local=3):
    views = default_config().views
    views.update(global_size=32, local_size=16, num_local=num_local)
    return jitted(views)


def small_batch(fill: int | None = 0):
    size = jnp.array([[48, 48], [30, 41], [48, 20], [28, 28]])
    rng = np.random.default_rng(0)
    canvas = rng.integers(0, 256, (4, 48, 48, 3), np.uint8)
    beside = rng.integers(0, 256, canvas.shape, np.uint8) if fill is None else fill
    inside = np.all(np.indices((48, 48))[:, None] < np.asarray(size).T[:, :, None, None], axis=0)
    return jnp.asarray(np.where(inside[..., None], canvas, beside).astype(np.uint8)), size


def test_same_key_same_views_and_other_key_other_views():
    canvas, size = small_batch()
    keys = jax.random.split(jax.random.key(0), 4)
    run = small()
    first, again, other = (
        run(keys, canvas, size),
        run(keys, canvas, size),
        run(keys[::-1], canvas, size),
    )
    for kind, shape in [("global", (2, 4, 32, 32, 3)), ("local", (3, 4, 16, 16, 3))]:
        assert first[kind].shape == shape and first[kind].dtype == jnp.float32
        assert np.isfinite(first[kind]).all()
        np.testing.assert_array_equal(first[kind], again[kind])
        assert (np.abs(first[kind] - other[kind]).mean((0, 2, 3, 4)) > 0.05).all()
        for a, b in itertools.combinations(first[kind], 2):  # the views of an image differ
            assert (np.abs(a - b).mean((1, 2, 3)) > 0.05).all()


def test_views_do_not_depend_on_the_place_in_the_batch():
    canvas, size = small_batch()
    keys = jax.random.split(jax.random.key(0), 4)
    whole, chosen = small()(keys, canvas, size), jnp.array([3, 1])
    part = small()(keys[chosen], canvas[chosen], size[chosen])
    for kind in whole:
        np.testing.assert_allclose(part[kind], whole[kind][:, chosen], atol=1e-5)


def test_padding_of_the_canvas_never_shows():
    keys = jax.random.split(jax.random.key(2), 4)
    (black, size), (noise, _) = small_batch(0), small_batch(None)
    assert (black != noise).any()
    run = small()
    jax.tree.map(np.testing.assert_array_equal, run(keys, black, size), run(keys, noise, size))


def test_no_local_views_and_the_same_global_ones():
    canvas, size = small_batch()
    keys = jax.random.split(jax.random.key(0), 4)
    alone = small(num_local=0)(keys, canvas, size)
    assert alone["local"].shape == (0, 4, 16, 16, 3)
    with_local = small()(keys, canvas, size)
    np.testing.assert_allclose(alone["global"], with_local["global"], atol=1e-5)
