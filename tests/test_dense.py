"""Dense probes on a set made from the bundled pictures: their pixels say what is foreground."""

import json
from pathlib import Path
from typing import Any

import cv2
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from test_knn_command import save_random
from tfds_files import write_set

from esvit_jax.checkpoint import load_model
from esvit_jax.commands.dense import main
from esvit_jax.data.augment import center_view
from esvit_jax.data.dense import DenseTargets, center_of
from esvit_jax.data.sources import IndexedSource, open_source
from esvit_jax.errors import UserError
from esvit_jax.evaluate import dense
from esvit_jax.evaluate.dense import DenseSplit, dense_probe, dense_split

MINI = "bundled/fashion_mnist_mini"


def png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image)[1].tobytes()


@pytest.fixture(name="small", scope="module")
def _small(tmp_path_factory):
    """Pictures, their mask (0 background, 1 foreground, 255 at the top) and a depth."""
    directory = tmp_path_factory.mktemp("data") / "small" / "1.0.0"
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(28, 28, 1), encoding_format="png"),
            "mask": tfds.features.Image(shape=(28, 28, 1), encoding_format="png"),
            "depth": tfds.features.Tensor(shape=(28, 28), dtype=np.float32),
        }
    )
    splits: dict[str, list[dict[str, Any]]] = {}
    for split, count in (("train", 40), ("test", 16)):
        source = open_source(MINI, split)
        assert isinstance(source, IndexedSource)
        splits[split] = []
        for i in range(0, len(source), -(-len(source) // count)):
            image = source[i]["image"]
            assert isinstance(image, bytes)
            grey = cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_GRAYSCALE)
            assert grey is not None
            mask = np.where(grey > 60, 1, 0).astype(np.uint8)
            mask[:4] = 255
            depth = 1 + grey.astype(np.float32) / 100
            splits[split].append(
                {"image": image, "mask": png(mask), "depth": depth.ravel().tolist()}
            )
    write_set(directory, features, splits)
    return str(directory)


@pytest.fixture(name="workdir")
def _workdir(tmp_path, tiny_config):
    return save_random(tmp_path / "run", tiny_config, seed=1)


def test_targets_are_read_by_id(small):
    masks = DenseTargets(small, "test", None, "mask")
    depths = DenseTargets(small, "test", None, "depth")
    record = masks.source[3]
    image = record["image"]
    assert isinstance(image, bytes)
    grey = cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_GRAYSCALE)
    assert grey is not None
    np.testing.assert_array_equal(masks.read(record["id"])[4:], (grey > 60)[4:])
    np.testing.assert_allclose(depths.read(record["id"]), 1 + grey / 100, rtol=1e-6)


@pytest.mark.parametrize("shape", [(28, 28), (40, 60), (61, 33)])
@pytest.mark.parametrize("crop", [1.0, 0.875, 0.5])
def test_the_centre_is_that_of_the_view(shape, crop):
    """Of a smooth ramp, the nearest pixel is close to what the bicubic view shows."""
    rows, columns = np.indices(shape)
    ramp = (2 * rows + columns).astype(np.float32)
    canvas = np.zeros((1, 64, 64, 3), np.uint8)
    canvas[0, : shape[0], : shape[1]] = ramp[..., None].astype(np.uint8)
    view = center_view(
        jnp.asarray(canvas), jnp.array([shape], jnp.int32), view_size=16, crop=crop,
        mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0),
    )  # fmt: skip
    shown = np.asarray(view)[0, :, :, 0] * 255
    error = np.abs(center_of(ramp, 16, crop) - shown)[2:-2, 2:-2]
    # At most half a pixel off in each direction, and nothing systematic.
    assert error.max() <= 1.7
    assert abs((center_of(ramp, 16, crop) - shown)[2:-2, 2:-2].mean()) < 0.8


def upsampled(maps: np.ndarray, size: int, stride: int) -> np.ndarray:
    """[h, w, c] to [size, size, c], one pixel at a time; beyond the map its edge goes on."""
    found = np.zeros((size, size, maps.shape[2]))
    for i in range(size):
        for j in range(size):
            y = np.clip((i + 0.5) / stride - 0.5, 0, maps.shape[0] - 1)
            x = np.clip((j + 0.5) / stride - 0.5, 0, maps.shape[1] - 1)
            top, left = int(y), int(x)
            down, right = min(top + 1, maps.shape[0] - 1), min(left + 1, maps.shape[1] - 1)
            dy, dx = y - top, x - left
            upper = (1 - dx) * maps[top, left] + dx * maps[top, right]
            lower = (1 - dx) * maps[down, left] + dx * maps[down, right]
            found[i, j] = (1 - dy) * upper + dy * lower
    return found


@pytest.mark.parametrize("stride", [2, 3])
@pytest.mark.parametrize("num_classes", [3, None])
def test_what_is_measured_equals_a_loop(num_classes, stride):
    """Maps that end 2 pixels before a view of 8, and 1 pixel after it."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(5, 3, 3, 4)).astype(np.float32)
    targets = rng.integers(-1, 3, (5, 8, 8)).astype(np.int32)
    if num_classes is None:
        targets = targets.astype(np.float32)
    split = DenseSplit(features, targets, stride)
    layers = {
        "weights": jnp.asarray(rng.normal(size=(2, 4, num_classes or 1)), jnp.float32),
        "bias": jnp.asarray(rng.normal(size=(2, num_classes or 1)), jnp.float32),
    }
    scale = dense._scale_of(split, num_classes)
    for head, found in enumerate(dense._measure(layers, scale, split, num_classes)):
        hits, unions, squares = np.zeros(3), np.zeros(3), []
        for x, target in zip(features, targets, strict=True):
            standard = (x - scale.mean) / scale.deviation
            weights, bias = (np.asarray(layers[name][head]) for name in ("weights", "bias"))
            maps = upsampled(standard @ weights + bias, 8, stride)
            for row, true in zip(maps.reshape(64, -1), target.ravel(), strict=True):
                if num_classes is None and true > 0:
                    squares.append((row[0] * scale.depth_deviation + scale.depth_mean - true) ** 2)
                elif num_classes and true >= 0:
                    guess = int(row.argmax())
                    hits[guess] += guess == true
                    for c in {guess, int(true)}:
                        unions[c] += 1
        expected = 100 * np.mean(hits / unions) if num_classes else np.sqrt(np.mean(squares))
        assert found == pytest.approx(expected, rel=1e-4)


def test_a_layer_learns_what_is_linear():
    """Depths that are a map of the features, scaled up, are found almost exactly."""
    rng = np.random.default_rng(1)
    features = rng.normal(size=(60, 4, 4, 5)).astype(np.float32)
    maps = features @ np.array([1.0, -2.0, 0.5, 0.0, 1.0], np.float32)[:, None] + 20
    depths = np.stack([upsampled(x, 12, 3)[..., 0] for x in maps]).astype(np.float32)
    train, test = (DenseSplit(features[i], depths[i], 3) for i in np.split(np.arange(60), [40]))
    probe = dense_probe(train, test, None, learning_rates=(1e-5, 3e-2), epochs=60)
    assert probe.learning_rate == 3e-2 and probe.images == (32, 8, 20)
    assert probe.result.values["rmse"] < 0.02 * depths.std() < probe.held_out[1e-5]


def test_masks_and_depths_of_pictures(small, workdir):
    loaded = load_model(workdir)
    for key, classes in (("mask", 2), ("depth", None)):
        splits = [
            dense_split(loaded, DenseTargets(small, split, None, key), classes, ignore=(255,))
            for split in ("train", "test")
        ]
        assert splits[0].features.shape[:1] + splits[0].targets.shape == (40, 40, 16, 16)
        train, test = splits
        probe = dense_probe(train, test, classes, epochs=30)
        if classes:
            # Better than calling every pixel the more frequent class.
            share = max(np.mean(test.targets[test.targets >= 0] == c) for c in range(2))
            assert probe.result.values["miou"] > 100 * share / 2 + 10
        else:
            # Better than the one depth that has the least error: their mean.
            assert probe.result.values["rmse"] < 0.99 * test.targets.std()


def test_command(small, workdir, tmp_path, capsys):
    out = tmp_path / "dense.json"
    flags = [f"--workdir={workdir}", f"--data={small}", "--target=mask", f"--out={out}"]
    flags.append("--test_split=test")
    main([*flags, "--classes=2", "--ignore=255", "--epochs=2"])
    said = capsys.readouterr().out
    report = json.loads(out.read_text())
    assert (report["train_images"], report["held_out_images"], report["test_images"]) == (40, 8, 16)
    assert f"test: miou {report['miou']:.1f} %" in said
    assert [one["learning_rate"] for one in report["sweep"]] == [1e-4, 1e-3, 1e-2, 1e-1]

    with pytest.raises(UserError, match=r"^--classes=2: it must be at least 256, or 255 ignored: "):
        main([*flags, "--classes=2"])
    with pytest.raises(UserError, match=r"^--target=masks: \S+ has no mask or depth of"):
        main([*flags, "--target=masks"])
    with pytest.raises(UserError, match=r"^--ignore: 'x' is no whole number from 0 up$"):
        main([*flags, "--ignore=x"])
    with pytest.raises(UserError, match=r"^--data=\S+: masks and depths are read from TFDS"):
        main([*flags, f"--data=folder:{Path(__file__).parent / 'data' / 'photos'}"])
