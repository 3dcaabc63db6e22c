"""The collapse monitors against NumPy, at their ends, and the warnings that follow from them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esvit_jax.config import default_config
from esvit_jax.runlog.collapse import collapse_warning, effective_rank, feature_std


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (64, 24), (2, 300)])
def test_feature_monitors_equal_numpy(shape):
    features = np.random.default_rng(0).normal(size=shape) + 0.5
    unit = np.stack([row / math.sqrt(sum(row**2)) for row in features])
    spread = np.mean([math.sqrt(np.mean((c - c.mean()) ** 2)) for c in unit.T])
    singular = np.linalg.svd(features, compute_uv=False)
    share = singular / singular.sum()
    rank = math.exp(-sum(p * math.log(p) for p in share))
    features = jnp.asarray(features, jnp.float32)
    std = jax.jit(lambda x: feature_std(features=x))(features)
    assert float(std) == pytest.approx(spread * math.sqrt(shape[1]), rel=1e-5)
    measured = jax.jit(lambda x: effective_rank(features=x))(features)
    assert float(measured) == pytest.approx(rank, rel=1e-5)


def test_feature_monitors_at_their_ends():
    rng = np.random.default_rng(0)
    uniform = jnp.asarray(rng.normal(size=(20000, 16)), jnp.float32)
    assert float(feature_std(features=uniform)) == pytest.approx(1, abs=1e-3)
    assert float(effective_rank(features=uniform)) == pytest.approx(16, abs=0.01)
    same = jnp.asarray(np.tile(rng.normal(size=(1, 768)), (96, 1)), jnp.float32)
    assert float(feature_std(features=same)) < 1e-4
    assert float(effective_rank(features=same)) == pytest.approx(1, abs=1e-3)
    # The length of a vector is no spread of its direction.
    longer = same * jnp.arange(1.0, 97.0)[:, None]
    assert float(feature_std(features=longer)) < 1e-4
    zeros = jnp.zeros((8, 4))
    assert float(feature_std(features=zeros)) == 0
    assert float(effective_rank(features=zeros)) == 1
    directions = jnp.repeat(jnp.eye(3, 64), 20, axis=0)
    assert float(effective_rank(features=directions)) == pytest.approx(3, abs=1e-4)


HEALTHY = {"teacher_entropy": 0.4, "view_loss": 6.0, "feature_std": 0.7, "feature_rank": 30.0}


@pytest.mark.parametrize(
    ("change", "start"),
    [
        ({}, None),
        ({"teacher_entropy": 0.995, "view_loss": 11.05}, "collapse to uniform"),
        ({"teacher_entropy": 1.0, "view_loss": 11.19}, "collapse to uniform"),
        ({"teacher_entropy": 0.995, "view_loss": 10.9}, None),  # the loss is below ln K
        ({"teacher_entropy": 0.98, "view_loss": 11.09}, None),  # the teacher has a preference
        ({"teacher_entropy": 0.001, "view_loss": 0.02}, "collapse to one prototype"),
        ({"teacher_entropy": 0.001, "view_loss": 3.0}, None),  # sharp, but it differs by image
        ({"feature_std": 0.04}, "collapse of the features"),
        ({"feature_rank": 1.4}, "collapse of the features"),
        ({"feature_std": 0.04, "teacher_entropy": 1.0, "view_loss": 11.09}, "collapse to uniform"),
        (dict.fromkeys(HEALTHY, math.nan), None),
    ],
)
def test_collapse_warning(change, start):
    warning = collapse_warning(HEALTHY | change, num_prototypes=65536)
    assert (warning and warning.split(":")[0]) == start


def test_collapse_warning_names_fields_that_exist_and_repeats_its_words():
    config = default_config().to_dict()
    kinds = [
        {"teacher_entropy": 1.0, "view_loss": math.log(256)},
        {"teacher_entropy": 0.0, "view_loss": 0.0},
        {"feature_std": 0.0},
    ]
    for kind in kinds:
        warning = collapse_warning(HEALTHY | kind, num_prototypes=256)
        assert warning is not None
        changed = HEALTHY | kind | {"loss": 1.234, "feature_rank": 20.0}
        assert collapse_warning(changed, num_prototypes=256) == warning
        fields = [word.strip(",;") for word in warning.split() if word.startswith("config.")]
        assert len(fields) >= 3
        for field in fields:
            section, name = field.split(".")[1:]
            assert name in config[section]
    assert "ln K = 5.55" in str(collapse_warning(HEALTHY | kinds[0], num_prototypes=256))
