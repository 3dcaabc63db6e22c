"""`esvit_jax.load` from everything it reads, and its preprocessing."""

import asyncio
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from test_convert import both_centers, published, random_params, small_config, write

from esvit_jax import checkpoint
from esvit_jax.config import flatten
from esvit_jax.data.augment import center_view
from esvit_jax.errors import UserError
from esvit_jax.interop.convert import convert
from esvit_jax.interop.load import load, preprocessor
from esvit_jax.interop.names.published import state_dict_from_params

PHOTOS = Path(__file__).parent / "data" / "photos"


def config_of_64_pixels():
    config = small_config()
    config.dtype = "float32"
    config.views.global_size = 64
    config.data.canvas_size = 96
    return config


@pytest.fixture
def workdir(tmp_path):
    config = config_of_64_pixels()
    networks = {"student": random_params(config, 1), "teacher": random_params(config, 2)}
    checkpoint.save_model(
        tmp_path / "run", config=config, origin={}, **networks, step=30,
        centers={"view": np.zeros(16, np.float32), "region": np.zeros(16, np.float32)},
    )  # fmt: skip
    return tmp_path / "run"


def test_three_lines_of_a_notebook(workdir):
    backbone, variables, preprocess = load(workdir)
    images = preprocess([PHOTOS / "chelsea.jpg", PHOTOS / "coffee.jpg"])
    out: Any = jax.jit(backbone.apply)(variables, images)
    assert images.shape == (2, 64, 64, 3)
    assert out.view_features.shape == (2, 32)
    assert [x.shape for x in out.stage_maps] == [(2, 16, 16, 8), (2, 8, 8, 16), (2, 4, 4, 32)]
    teacher = random_params(config_of_64_pixels(), 2)["backbone"]
    jax.tree.map(np.testing.assert_array_equal, variables["params"], teacher)


def export(folder, config, tensors, origin):
    folder.mkdir()
    save_file({n: np.ascontiguousarray(x) for n, x in tensors.items()}, folder / "m.safetensors")
    text = json.dumps({"config": flatten(config), "facts": origin})
    (folder / "config.json").write_text(text)


@pytest.mark.parametrize("key", ["teacher", "student"])
def test_converted_and_exported_networks(tmp_path, key):
    config = config_of_64_pixels()
    tensors, student, teacher = published(config, **both_centers())
    wanted = (student if key == "student" else teacher)["backbone"]
    convert(write(tmp_path / "a.safetensors", tensors), tmp_path / "a", key=key)
    export(tmp_path / "both", config, tensors, {"key": key})
    export(tmp_path / "one", config, state_dict_from_params({"backbone": wanted}), {"key": key})
    paths = ["a", "both", "both/m.safetensors", "one"]
    for path in paths:
        _, variables, _ = load(tmp_path / path)
        jax.tree.map(np.testing.assert_array_equal, variables["params"], wanted)


def test_an_export_that_does_not_fit_its_config(tmp_path):
    config = config_of_64_pixels()
    tensors = state_dict_from_params({"backbone": random_params(config, 1)["backbone"]})
    del tensors["norm.bias"]
    export(tmp_path / "a", config, tensors, {})
    with pytest.raises(UserError, match="missing: model norm.bias"):
        load(tmp_path / "a")


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_an_export_that_is_not_finite(tmp_path, value):
    config = config_of_64_pixels()
    tensors = state_dict_from_params({"backbone": random_params(config, 1)["backbone"]})
    tensors["layers.1.blocks.0.mlp.fc1.bias"][:3] = value
    export(tmp_path / "a", config, tensors, {})
    with pytest.raises(UserError) as error:
        load(tmp_path / "a")
    assert str(tmp_path / "a" / "m.safetensors") in str(error.value)
    message = "model layers.1.blocks.0.mlp.fc1.bias: 3 of its 64 values are not finite"
    assert str(error.value).splitlines()[1].strip() == message


def test_in_a_worker_thread_and_under_a_running_event_loop(workdir):
    """As in a server, and in a notebook."""
    with ThreadPoolExecutor(1) as pool:
        threaded = pool.submit(load, workdir).result()

    async def cell():
        return load(workdir)

    looped = asyncio.run(cell())
    assert threaded.backbone == looped.backbone
    jax.tree.map(np.testing.assert_array_equal, threaded.variables, looped.variables)


def test_maps_for_a_pyramid_at_any_size(workdir):
    loaded = load(workdir)
    images = np.zeros((1, 70, 45, 3), np.float32)
    out = jax.eval_shape(loaded.backbone.apply, loaded.variables, images)
    expected = [
        (1, -(-70 // stage.stride), -(-45 // stage.stride), stage.num_features)
        for stage in loaded.backbone.stages
    ]
    assert [x.shape for x in out.stage_maps] == expected
    assert expected[-1] == (1, 5, 3, 32)


def test_home_folder(workdir, monkeypatch):
    monkeypatch.setenv("HOME", str(workdir.parent))
    assert load("~/run").backbone == load(workdir).backbone


def test_paths_that_hold_no_model(tmp_path):
    with pytest.raises(UserError, match="^path = '.*nothing': .* has no config.json"):
        load(tmp_path / "nothing")
    for path in ("a\0b", "x" * 300, "", tmp_path / "a" / "b.safetensors"):
        with pytest.raises(UserError, match="^path = ") as error:
            load(path)
        assert "\n" not in str(error.value)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text(
        json.dumps({"config": flatten(config_of_64_pixels()), "facts": {}})
    )
    with pytest.raises(UserError, match="it has no checkpoint"):
        load(tmp_path / "a")


def test_images_of_every_kind_give_the_same_view():
    config = config_of_64_pixels()
    preprocess = preprocessor(config)
    # A PNG, so that the decoders agree to the last bit.
    image = np.asarray(Image.open(PHOTOS / "chelsea.jpg").resize((80, 60)))
    views = np.asarray(preprocess([image, Image.fromarray(image)]))
    np.testing.assert_array_equal(views[0], views[1])
    canvas = np.zeros((1, 96, 96, 3), np.uint8)
    canvas[0, :60, :80] = image
    expected = center_view(
        jax.numpy.asarray(canvas), jax.numpy.asarray([[60, 80]], dtype="int32"), view_size=64,
        crop=config.evaluate.crop, mean=config.views.mean, std=config.views.std,
    )  # fmt: skip
    np.testing.assert_allclose(views[:1], expected, atol=1e-5)


def test_orientation_and_modes(tmp_path):
    preprocess = preprocessor(config_of_64_pixels())
    image = np.zeros((60, 80, 3), np.uint8)
    image[:30] = 255
    Image.fromarray(image).save(tmp_path / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned = Image.fromarray(image[::-1, ::-1])
    turned.save(tmp_path / "turned.jpg", quality=100, exif=exif)
    with Image.open(tmp_path / "turned.jpg") as opened:
        views = preprocess(
            [tmp_path / "a.png", str(tmp_path / "turned.jpg"), opened, image[..., 0],
             Image.fromarray(image).convert("L"), Image.fromarray(image).convert("RGBA")]
        )  # fmt: skip
    assert np.abs(views[0, 5, 5] - views[0, 60, 5]).min() > 4
    for view in views[1:]:
        np.testing.assert_allclose(view, views[0], atol=0.1)


def test_what_is_no_image_is_named(tmp_path):
    preprocess = preprocessor(config_of_64_pixels())
    (tmp_path / "a.jpg").write_bytes(b"text")
    with pytest.raises(UserError, match=r"a\.jpg cannot be decoded"):
        preprocess([tmp_path / "a.jpg"])
    with pytest.raises(UserError, match=r"b\.jpg cannot be read: No such file"):
        preprocess([tmp_path / "b.jpg"])
    with pytest.raises(UserError, match="float64"):
        preprocess([np.zeros((5, 5, 3))])
    os.mkfifo(tmp_path / "c.jpg")
    with pytest.raises(UserError, match=r"c\.jpg cannot be read: it is no file"):
        preprocess([tmp_path / "c.jpg"])
    with pytest.raises(UserError, match="a NoneType is no image; take a path"):
        preprocess([None])
    for images in ([], "a.jpg"):
        with pytest.raises(UserError, match="takes a list of images"):
            preprocess(images)
