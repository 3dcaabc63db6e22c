"""Where on pictures cells lie, and what is drawn there, by values."""

import jax
import numpy as np
import pytest
from matplotlib import colormaps
from test_cvt import positive_variances
from test_swin import normal, random_params

from esvit_jax.analyze import pictures
from esvit_jax.analyze.attention import Attention
from esvit_jax.analyze.cells import cell_at, middle, over_picture
from esvit_jax.models import create_backbone

CELLS = np.array([[1, 2], [3, 4]], np.float32)
# Seven lines end a cell of three pixels short of the picture, five columns cut one off.
TALL = np.random.default_rng(0).random((7, 5, 3)).astype(np.float32)
HEADS = {"depths": (1, 1), "num_heads": (1, 1)}
BACKBONES = {
    "swin_tiny": {"embed_dim": 8, "window_size": 3, "image_size": 48, **HEADS},
    "cvt_tiny": {"embed_dims": (8, 16), "window_size": 3, **HEADS},
    "vil_2262": {
        "embed_dims": (8, 16), "patch_sizes": (4, 2), "num_global": (1, 0), "window_sizes": (2,),
        "image_size": 32, **HEADS,
    },
    "vit_tiny": {
        "embed_dim": 8, "depths": (1,), "num_heads": (1,), "patch_size": 8, "image_size": 32,
    },
}  # fmt: skip


def test_cells_lie_side_by_side_from_the_corner_on():
    x = np.nan
    np.testing.assert_array_equal(
        over_picture(CELLS, 3, (7, 5)), [[1, 1, 1, 2, 2]] * 3 + [[3, 3, 3, 4, 4]] * 3 + [[x] * 5]
    )
    assert [middle(cell, 3, 5) for cell in (0, 1)] == [1.5, 4]
    assert [cell_at(pixel, 3, 2) for pixel in (0.0, 2.9, 3.0, 5.9, 6.0, 7.0)] == [0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("name", BACKBONES)
def test_what_the_cells_of_a_backbone_cover(name):
    """Of 29 x 37 pixels, in cells of 8. What lies beyond the finest map's cells has no part."""
    backbone = create_backbone(name=name, **BACKBONES[name])
    image = normal(0, 1, 29, 37, 3)
    params = positive_variances(random_params(backbone.init, image))
    maps = jax.jit(lambda image: backbone.forward(params, image).stage_maps)
    first, found = maps(image)[0], maps(image)[-1]
    cropped = name.startswith("vi")
    assert backbone.stages[-1].stride == 8
    assert found.shape[1:3] == ((3, 4) if cropped else (4, 5))
    bottom, right = (backbone.stages[0].stride * side for side in first.shape[1:3])
    assert (bottom < 29, right < 37) == (cropped, cropped)
    beyond, within = np.array(image), np.array(image)
    beyond[:, bottom:], beyond[:, :, right:] = 9, 9
    np.testing.assert_array_equal(maps(beyond)[-1], found)
    within[:, 23, 31] = 9
    assert np.any(maps(within)[-1] != found)

    attention = Attention(backbone, params, image)
    last = len(backbone.blocks) - 1
    # By shares of rows and columns a ViT's would be (1, 2), a Swin's (3, 4).
    for y, x in ((18.1, 25.1), (22.5, 30.5)):
        assert attention.token_at(last, y / 29, x / 37) == (2, 3)
    assert attention.token_at(last, 1.0, 1.0) == tuple(side - 1 for side in found.shape[1:3])


@pytest.fixture(name="figures")
def _figures(monkeypatch):
    """What would have been written."""
    figures = []
    monkeypatch.setattr(pictures, "write_figure", lambda figure, path: figures.append(figure))
    return figures


def test_attention_is_drawn_where_its_tokens_lie(figures):
    kept = np.array([[[False, False], [False, True]]])
    row = pictures.AttendedPicture(TALL, 3, CELLS[None], kept, (0, 1), np.ones(1), "title")
    pictures.attention_figure([row], "all", "out.png")
    plain, axes = figures[0].axes
    gray = TALL.mean(-1, keepdims=True)
    drawn = np.asarray(axes.images[0].get_array())
    np.testing.assert_allclose(drawn[6], np.repeat(gray[6], 3, axis=-1))
    for y, x, weight in ((2, 2, 0.25), (2, 3, 0.5), (5, 2, 0.75), (3, 4, 1.0)):
        glow = np.array(colormaps["inferno"](weight)[:3])
        np.testing.assert_allclose(drawn[y, x], 0.45 * gray[y, x] + 0.55 * glow, rtol=1e-6)
    (outline,) = axes.collections
    lines = {tuple(map(tuple, line)) for line in outline.get_segments()}
    assert lines == {
        ((2.5, 2.5), (4.5, 2.5)), ((2.5, 5.5), (4.5, 5.5)),
        ((2.5, 2.5), (2.5, 5.5)), ((4.5, 2.5), (4.5, 5.5)),
    }  # fmt: skip
    for mark in (*plain.lines, *axes.lines):
        np.testing.assert_array_equal(mark.get_xydata(), [[3.5, 1.0]])


def test_colours_are_drawn_where_their_cells_lie(figures):
    colors = np.zeros((2, 2, 3), np.float32)
    pictures.components_figure([TALL], [[colors]], [3], ["stage 1"], "out.png")
    axes = figures[0].axes[1]
    assert tuple(axes.images[0].get_extent()) == (0, 6, 6, 0)
    assert (axes.get_xlim(), axes.get_ylim()) == ((0, 5), (7, 0))


def test_matches_are_drawn_where_their_cells_lie(figures):
    """The second picture stands right of the first; both are one wide."""
    start, end = np.array([0, 3]), np.array([1, 2])
    pair = pictures.MatchedPair(TALL, TALL, (2, 2), 3, start, end, None, "title")
    pictures.matches_figure([pair], "out.png")
    first, second = (line.get_xydata() for line in figures[0].axes[0].lines)
    np.testing.assert_allclose(first, [[1.5 / 5, 1.5 / 5], [1.06 + 4 / 5, 1.5 / 5]])
    np.testing.assert_allclose(second, [[4 / 5, 4.5 / 5], [1.06 + 1.5 / 5, 4.5 / 5]])
