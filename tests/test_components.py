"""Principal components, against a covariance matrix."""

import numpy as np

from esvit_jax.analyze.components import component_colors, principal_components


def test_components_are_those_of_the_covariance():
    r = np.random.default_rng(0)
    features = (r.normal(size=(50, 3)) * [3.0, 1.0, 0.2] @ r.normal(size=(3, 5))).astype(np.float32)
    found = principal_components(features, 3)
    variances, directions = np.linalg.eigh(np.cov(features.T.astype(np.float64)))
    for i in range(3):
        direction = directions[:, -1 - i]
        direction = direction * np.sign(direction[np.argmax(np.abs(direction))])
        expected = (features - features.mean(0)) @ direction
        np.testing.assert_allclose(found[:, i], expected, atol=1e-4)
        np.testing.assert_allclose(found[:, i].var(ddof=1), variances[-1 - i], rtol=1e-4)


def test_fewer_directions_than_asked_for():
    found = principal_components(np.array([[1.0, 2.0], [3.0, 4.0]], np.float32), 4)
    assert found.shape == (2, 4) and not found[:, 2:].any()


def test_colors_mean_the_same_in_all_maps():
    r = np.random.default_rng(1)
    first, second = r.normal(size=(2, 3, 4, 6)).astype(np.float32)
    second[0, 0] = first[2, 3]
    colors = component_colors([first, second])
    assert [color.shape for color in colors] == [(3, 4, 3)] * 2
    np.testing.assert_allclose(colors[1][0, 0], colors[0][2, 3], atol=1e-6)
    for channel in np.concatenate([color.reshape(-1, 3) for color in colors]).T:
        assert channel.min() == 0 and channel.max() == 1
