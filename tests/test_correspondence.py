"""Matches of regions, their scores, and the mirrored views that they are looked for in."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from PIL import Image
from replay_analysis import AnalysisReplay
from tiny import tiny_config

from esvit_jax.evaluate.correspondence import (
    Correspondence,
    correspond,
    correspondence,
    mirrored_pairs,
    score_mirrored,
)
from esvit_jax.models.backbone import Backbone, BackboneOutput, StageInfo

DATA = Path(__file__).parent / "data"


def test_golden():
    """Correspondence, entropies, attention rows and masks of the published implementation."""
    errors = AnalysisReplay(DATA / "swin_nano_w7_analysis.npz").errors()
    wrong = {name: errors.pop(name) for name in ("match_wrong", "top_wrong", "mask_wrong")}
    assert wrong == dict.fromkeys(wrong, 0)
    assert set(errors) == {
        "features", "similarity", "accuracy", "distance", "cutoff_similarity", "entropy",
        "entropy_all", "attention",
    }  # fmt: skip
    for name, error in errors.items():
        assert error < 1e-5, (name, error)


def brute_force(first, second, shape, counted):
    """Accuracy, mean distance and cut-off of one image, pair by pair."""
    pairs = []
    for i, a in enumerate(first):
        cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in second]
        pairs.append((max(cosines), i, int(np.argmax(cosines))))
    pairs.sort(key=lambda pair: -pair[0])
    distances = []
    for _, i, j in pairs[:counted]:
        row, column = divmod(i, shape[1])
        distances.append(np.hypot(j // shape[1] - row, j % shape[1] - (shape[1] - 1 - column)))
    cutoff = pairs[min(counted, len(pairs) - 1)][0]
    return np.mean(np.array(distances) == 0), np.mean(distances), cutoff


@pytest.mark.parametrize("shape, counted", [((3, 4), 5), ((2, 2), 10)])
def test_scores_of_maps_that_are_not_square_and_of_fewer_pairs_than_count(shape, counted):
    r = np.random.default_rng(0)
    n = shape[0] * shape[1]
    first = r.normal(size=(2, n, 6)).astype(np.float32)
    mirrored = first.reshape(2, *shape, 6)[:, :, ::-1].reshape(2, n, 6)
    second = (mirrored + 0.9 * r.normal(size=first.shape)).astype(np.float32)
    found = correspond(jnp.asarray(first), jnp.asarray(second))
    score = score_mirrored(found, shape, counted)
    expected = [brute_force(*pair, shape, counted) for pair in zip(first, second, strict=True)]
    np.testing.assert_allclose(np.stack(score, axis=1), expected, rtol=1e-6)
    assert 0 < np.mean(score.accuracy) < 1


def test_the_mirrored_map_itself_is_found():
    first = jax.random.normal(jax.random.key(0), (1, 12, 8))
    second = first.reshape(1, 3, 4, 8)[:, :, ::-1].reshape(1, 12, 8)
    score = score_mirrored(correspond(first, second), (3, 4))
    assert (float(score.accuracy[0]), float(score.distance[0])) == (1.0, 0.0)
    assert float(score.cutoff_similarity[0]) == pytest.approx(1.0, abs=1e-6)


def test_of_equally_sure_pairs_the_first_ones_count():
    found = Correspondence(
        similarity=jnp.ones((4, 4)), match=jnp.array([1, 0, 0, 0]), match_similarity=jnp.ones(4),
        top=jnp.arange(4),
    )  # fmt: skip
    assert float(score_mirrored(found, (2, 2), counted=2).accuracy) == 1.0


def photo_batch():
    photo = Image.open(DATA / "photos" / "astronaut.jpg").convert("RGB").resize((64, 64))
    canvas = np.stack([np.asarray(photo), np.asarray(photo)[::-1]])
    return {"canvas": jnp.asarray(canvas), "size": jnp.full((2, 2), 64)}


def test_the_second_view_is_the_first_mirrored_and_grey():
    config = tiny_config()
    config.views.global_size, config.evaluate.crop = 64, 1.0
    config.views.mean, config.views.std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    batch = photo_batch()
    changed = []
    for seed in range(20):
        first, second = (255 * np.asarray(x) for x in mirrored_pairs(batch, config, seed, 1))
        np.testing.assert_allclose(first, batch["canvas"], atol=1e-3)
        np.testing.assert_allclose(second, second[..., :1].repeat(3, -1), atol=1e-3)
        luma = first @ [0.299, 0.587, 0.114]
        gray = luma[:, :, ::-1]
        changed += list(np.abs(second[..., 0] - gray).mean((1, 2)) > 1e-2)
        # Colours change, places do not: what is bright on the left is bright on the right.
        for a, b in zip(gray, second[..., 0], strict=True):
            assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.9
    assert 25 <= sum(changed) <= 38  # of 40, with probability 0.8


def test_what_is_drawn_depends_on_the_image_and_the_seed_alone():
    config, batch = tiny_config(), photo_batch()
    _, second = mirrored_pairs(batch, config, 3, 1)
    backwards = {name: x[::-1] for name, x in batch.items()}
    np.testing.assert_array_equal(mirrored_pairs(backwards, config, 3, 1)[1], second[::-1])
    assert np.abs(np.asarray(mirrored_pairs(batch, config, 4, 1)[1] - second)).max() > 0.01


class Cells(Backbone):
    """Of each cell of 12 x 12 pixels, whole or not at all, the lines' means, which know no side."""

    @property
    def stages(self):
        return (StageInfo(12, 12),)

    def forward(self, params, images, **_):
        count = images.shape[1] // 12
        cells = images[:, : 12 * count, : 12 * count].mean(-1)
        lines = rearrange(cells, "b (h y) (w x) -> b h w y x", y=12, x=12).mean(-1)
        lines -= lines.mean(-1, keepdims=True)
        return BackboneOutput(lines.mean((1, 2)), lines, (lines,), (), ())


def test_views_have_whole_cells():
    """64 pixels of cells of 12 are cut to 60, so that each cell is one of the mirror image too."""
    config, batch = tiny_config(), photo_batch()
    config.views.global_size, config.evaluate.crop = 64, 1.0
    first, second = mirrored_pairs(batch, config, 0, 12)
    assert first.shape == second.shape == (2, 60, 60, 3)
    assert mirrored_pairs(batch, config, 0, 65)[0].shape == (2, 64, 64, 3)
    score = correspondence(Cells(), config)({}, batch)
    np.testing.assert_array_equal(score["accuracy"], [1, 1])
