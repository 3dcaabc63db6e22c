"""Mixup, CutMix and smoothed labels against NumPy, and what is drawn for them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from esvit_jax.evaluate.mixing import Mix, draw_mix, mix_images, partners, targets


def mix_of(own, cut, box) -> Mix:
    return Mix(jnp.array(own, jnp.float32), jnp.array(cut), jnp.array(box))


def test_images_are_blended_or_have_a_box_of_their_partner():
    images = np.random.default_rng(0).standard_normal((4, 6, 6, 3)).astype(np.float32)
    own, cut = [0.25, 0.9, 0.5, 0.75], [False, True, True, False]
    box = [[0, 6, 0, 6], [1, 3, 2, 6], [0, 0, 0, 0], [2, 3, 2, 3]]
    found = mix_images(jnp.asarray(images), mix_of(own, cut, box))

    expected = images.copy()
    for i, partner in enumerate([1, 0, 3, 2]):
        top, bottom, left, right = box[i]
        if cut[i]:
            expected[i, top:bottom, left:right] = images[partner, top:bottom, left:right]
        else:
            expected[i] = own[i] * images[i] + (1 - own[i]) * images[partner]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_targets():
    """own · smooth(label) + (1 - own) · smooth(partner's), smooth(y) = (1 - e) onehot + e / c."""
    labels, own, e = np.array([3, 0, 1, 1]), np.array([0.25, 1.0, 0.0, 0.6]), 0.1
    smooth = np.full((4, 4), e / 4)
    smooth[np.arange(4), labels] += 1 - e
    alone = targets(jnp.asarray(labels), 4, e, None)
    np.testing.assert_allclose(alone, smooth, atol=1e-7)
    expected = own[:, None] * smooth + (1 - own[:, None]) * smooth[[1, 0, 3, 2]]
    mix = mix_of(own, [False] * 4, np.zeros((4, 4), np.int32))
    found = targets(jnp.asarray(labels), 4, e, mix)
    np.testing.assert_allclose(found, expected, atol=1e-7)
    assert found[0, 3] == pytest.approx(0.25 * 0.9 + 0.025)


def test_partners_are_neighbours():
    assert list(partners(6)) == [1, 0, 3, 2, 5, 4]
    assert list(partners(3)) == [1, 0, 2]  # the odd one is alone


N, SIZE = 4000, 32


def drawn(mixup, cutmix):
    mix = draw_mix(jax.random.split(jax.random.key(0), N), SIZE, mixup, cutmix)
    return jax.tree.map(np.asarray, mix)


def test_mixup_draws_a_beta_distribution():
    mix = drawn(0.8, 0)
    assert not mix.cut.any()
    assert stats.kstest(mix.own, stats.beta(0.8, 0.8).cdf).pvalue > 0.01


def test_a_box_has_its_share_and_lies_in_the_image():
    mix = drawn(0, 1.0)
    assert mix.cut.all()
    top, bottom, left, right = mix.box.T
    assert mix.box.min() == 0 and mix.box.max() == SIZE
    assert ((bottom >= top) & (right >= left)).all()
    np.testing.assert_allclose(mix.own, 1 - (bottom - top) * (right - left) / SIZE**2, atol=1e-6)
    # Boxes that no edge cuts are squares; small ones are anywhere.
    inside = (top > 0) & (bottom < SIZE) & (left > 0) & (right < SIZE)
    assert ((bottom - top) == (right - left))[inside].all()
    small = inside & (bottom - top <= 8)
    center = ((left + right) / 2)[small]
    assert stats.kstest(center, stats.uniform(5, SIZE - 10).cdf).statistic < 0.1


def test_both_share_the_images():
    mix = drawn(0.8, 1.0)
    assert mix.cut.mean() == pytest.approx(0.5, abs=0.03)
    assert stats.kstest(mix.own[~mix.cut], stats.beta(0.8, 0.8).cdf).pvalue > 0.01
