"""Which evaluators a config asks for, when they are due, and that a new one is a line."""

import cv2
import numpy as np
import pytest
import tiny

from esvit_jax.config import resolve
from esvit_jax.data.sources import open_source
from esvit_jax.errors import UserError
from esvit_jax.evaluate import online
from esvit_jax.evaluate.blocks import ArrayBlocks
from esvit_jax.evaluate.fast import fast_probe
from esvit_jax.evaluate.features import FeatureExtractor, raw_pixels
from esvit_jax.evaluate.online import Evaluator, evaluators
from esvit_jax.evaluate.result import Result
from esvit_jax.models import create_model


class Constant:
    """An evaluator that knows its answer."""

    def due(self, step):
        return step == 2

    def __call__(self, params, step):
        return [Result("constant", {"answer": 42.0}, step=step)]

    def baselines(self, params, step):
        return []


@pytest.fixture
def asked(tiny_config):
    """The evaluators of a config."""
    source = open_source("bundled/fashion_mnist_mini", "train[:50]", None)
    numbers = resolve(tiny_config, num_images=50, num_devices=4)
    return lambda: evaluators(tiny_config, source, numbers)


def test_none_without_being_asked_for(asked):
    assert asked() == []


def test_knn_is_due_now_and_then_and_at_the_end(asked, tiny_config):
    tiny_config.knn_every_steps = 4
    (knn,) = asked()
    assert isinstance(knn, Evaluator)
    assert [step for step in range(1, 7) if knn.due(step)] == [4, 6]


def test_knn_names_the_field_of_its_split(asked, tiny_config):
    tiny_config.knn_every_steps = 4
    tiny_config.data.test_split = "nowhere"
    with pytest.raises(UserError, match=r"config\.data.*'nowhere'"):
        asked()


def test_a_probe_while_training_is_that_of_the_features(asked, tiny_config):
    tiny_config.linear_every_steps, tiny_config.data.test_split = 5, "test[:40]"
    (probe,) = asked()
    assert [step for step in range(1, 7) if probe.due(step)] == [5, 6]

    params = {"backbone": tiny.initial_params(create_model(tiny_config))["backbone"]}
    pixels, untrained = probe.baselines(params, 0)
    assert (pixels.evaluation, pixels.subject, pixels.step) == ("linear_fast", "raw_pixels", None)
    assert (untrained.subject, untrained.step) == ("teacher", 0)
    extractor = FeatureExtractor(raw_pixels(tiny_config), tiny_config)
    train, test = (
        ArrayBlocks(*extractor.arrays({}, open_source("bundled/fashion_mnist_mini", split, None)))
        for split in ("train[:50]", "test[:40]")
    )
    assert pixels.values == fast_probe(train, test, 10).values


def test_what_is_due_together_shares_the_features(asked, tiny_config, monkeypatch):
    tiny_config.data.test_split = "test[:40]"
    tiny_config.knn_every_steps, tiny_config.linear_every_steps, tiny_config.evaluate.k = 2, 4, (5,)
    (evaluator,) = asked()
    read = []
    images = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    labels = np.arange(50, dtype=np.int32) % 10
    monkeypatch.setattr(
        FeatureExtractor, "arrays", lambda self, params, source: read.append(1) or (images, labels)
    )
    for step, due in ((1, []), (2, ["knn"]), (4, ["knn", "linear_fast"])):
        assert evaluator.due(step) == bool(due)
        if due:
            assert [x.evaluation for x in evaluator({"backbone": {}}, step)] == due
    assert len(read) == 4  # two splits at each of two steps


@pytest.mark.parametrize("field", ["knn_every_steps", "linear_every_steps"])
def test_images_without_labels_name_the_field(asked, tiny_config, tmp_path, field):
    cv2.imwrite(str(tmp_path / "image.png"), np.zeros((8, 8, 3), np.uint8))
    tiny_config[field], tiny_config.data.test_split = 4, "train"
    tiny_config.data.name = f"folder:{tmp_path}"
    with pytest.raises(UserError, match=rf"config\.{field} = 4: .* needs labels, and .* has none"):
        asked()


def test_a_new_evaluator_is_one_line(asked, tiny_config, monkeypatch):
    monkeypatch.setattr(online, "MAKERS", (*online.MAKERS, lambda config, source, n: Constant()))
    (constant,) = asked()
    (result,) = constant({}, 2)
    assert result.scalars() == {"constant/answer": 42.0}
