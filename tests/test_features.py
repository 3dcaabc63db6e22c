"""Features of whole sources: values, small batches, images that cannot be read, progress."""

import re
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from esvit_jax.data.sources import IndexedSource, TFRecordSource, open_source
from esvit_jax.errors import RunError, UserError
from esvit_jax.evaluate import features as features_module
from esvit_jax.evaluate.features import (
    FeatureExtractor,
    check_split,
    fitting_batch_size,
    raw_pixels,
    view_features,
)
from esvit_jax.models import create_model
from esvit_jax.runlog import alive
from esvit_jax.runlog.alive import signs_of_life
from esvit_jax.state import init_params

PHOTOS = Path(__file__).parent / "data" / "photos"
BUNDLED = "bundled/fashion_mnist_mini"


@pytest.mark.parametrize(
    ("batch_size", "lengths", "devices", "expected"),
    [
        (256, (60_000, 10_000), 8, 256),
        (256, (60_000, 40), 8, 40),  # the smaller one is one batch
        (256, (60_000, 41), 8, 48),
        (256, (160, 5), 8, 32),  # few images still give the devices something to do
        (8, (160, 5), 8, 8),
        (256, (60_000, 40), 3, 42),
        (100, (60_000, 10_000), 8, 96),  # what the devices can share
        (4, (60_000, 10_000), 8, 8),
        (100, (), 1, 100),
    ],
)
def test_fitting_batch_size(batch_size, lengths, devices, expected):
    assert fitting_batch_size(batch_size, lengths, devices) == expected


def test_features_of_a_source_are_those_of_its_images(tiny_config):
    """Whatever the batch, which the four devices could not share as it was asked for."""
    model = create_model(tiny_config)
    params = init_params(model, jax.random.key(0))["backbone"]
    source = open_source(BUNDLED, "test[:11]")
    tiny_config.evaluate.batch_size = 6
    extractor = FeatureExtractor(view_features(model.backbone, tiny_config), tiny_config, [source])
    assert extractor.batch_size == 4
    features, labels = extractor.arrays(params, source)
    pixels, _ = FeatureExtractor(raw_pixels(tiny_config), tiny_config, [source]).arrays({}, source)
    images = jnp.asarray(pixels.reshape(11, 16, 16, 3))
    expected = model.backbone.forward(params, images).view_features
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)
    assert not isinstance(source, TFRecordSource)
    assert labels.tolist() == [source[i]["label"] for i in range(11)]


def test_small_data_is_not_padded_to_a_large_batch(tiny_config, monkeypatch):
    tiny_config.evaluate.batch_size = 256
    source, seen = open_source(BUNDLED, "test[:40]"), []
    monkeypatch.setattr(
        features_module, "evaluation_images",
        lambda config, batch: seen.append(batch["canvas"].shape) or batch["canvas"] / 255,
    )  # fmt: skip
    extractor = FeatureExtractor(raw_pixels(tiny_config), tiny_config, [source])
    assert len(extractor.arrays({}, source)[1]) == 40
    assert seen == [(10, 28, 28, 3)]  # of each of four devices; traced once


def test_images_that_cannot_be_read_are_left_out(tmp_path, tiny_config):
    for file in PHOTOS.glob("*.jpg"):
        shutil.copy(file, tmp_path)
    (tmp_path / "bad.jpg").write_text("no image")
    source = open_source(f"folder:{tmp_path}", "train")
    extractor = FeatureExtractor(raw_pixels(tiny_config), tiny_config, [source])
    features, labels = extractor.arrays({}, source)
    assert len(source) == 5 and features.shape == (4, 16 * 16 * 3) and labels.tolist() == [-1] * 4


def test_progress_says_what_is_done(tiny_config):
    tiny_config.evaluate.batch_size = 4
    source = open_source(BUNDLED, "test[:10]")
    extractor = FeatureExtractor(raw_pixels(tiny_config), tiny_config, [source])
    seen = [extractor.describe() for _ in extractor.batches({}, source)]
    start = f"features of {BUNDLED} test[:10]: "
    assert seen[0] == start + "4 of 10 images"
    assert seen[1].startswith(start + "8 of 10 images, ") and seen[1].endswith(" img/s")
    assert seen[2].startswith(start + "10 of 10 images, ")
    next(extractor.batches({}, source, first_batch=2))
    assert extractor.describe() == start + "10 of 10 images"


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(alive, "FIRST_LINE", 0.05)
    monkeypatch.setattr(alive, "NEXT_LINE", 0.1)
    monkeypatch.setattr(alive, "LIVE", 0.02)


def busy(seconds):
    """What an evaluation looks like from outside."""
    time.sleep(seconds)


def test_signs_of_life_elsewhere_are_lines(fast, capsys):
    counted = iter(range(1000))
    with signs_of_life(lambda: f"[b] {next(counted)} of 9"):
        busy(0.3)
    lines = capsys.readouterr().out.splitlines()
    assert 2 <= len(lines) <= 4
    assert lines[:2] == ["[b] 0 of 9 (0 s)", "[b] 1 of 9 (0 s)"]


def test_what_is_soon_over_says_nothing(fast, capsys):
    with signs_of_life(lambda: "work"):
        pass
    with pytest.raises(KeyboardInterrupt), signs_of_life(lambda: "work"):
        raise KeyboardInterrupt
    assert capsys.readouterr().out == ""


def test_signs_of_life_on_a_terminal_are_one_line_that_goes_away(fast, capsys):
    console = Console(force_terminal=True, force_interactive=True, width=80)
    with signs_of_life(lambda: "work [b]", console):
        busy(0.6)
    out = capsys.readouterr().out
    assert re.search(r"work \[b\] \(\d s\)", out) and out.count("\n") < 3


def test_a_quiet_console_is_quiet(fast, capsys):
    with signs_of_life(lambda: "work", Console(quiet=True)):
        busy(0.2)
    assert capsys.readouterr().out == ""


class Nothing:
    """Three records, which nobody reads."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        raise AssertionError


@pytest.mark.parametrize(
    ("labels", "features", "error", "message"),
    [
        ([], 1.0, UserError, r"photos test: none of 3 images can be read"),
        ([0, -1], 1.0, UserError, r"photos test: 1 of 2 images have no label"),
        ([0, 1], np.inf, RunError, r"photos test: the features of 2 of 2 images are not finite"),
    ],
)
def test_splits_that_cannot_be_classified_with(labels, features, error, message):
    split = IndexedSource("photos", "test", (), Nothing())
    with pytest.raises(error, match=message):
        check_split(
            split,
            np.full((len(labels), 2), features, np.float32),
            np.array(labels, np.int32),
            "k-NN",
        )
