"""`esvit_jax.load` from everything it reads, and its preprocessing."""

import json
from pathlib import Path

import cv2
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
from esvit_jax.interop.files import state_dict_from_params
from esvit_jax.interop.load import load, preprocessor

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
        tmp_path / "run", config=config, facts={}, **networks, step=30,
        centers={"view": np.zeros(16, np.float32), "region": np.zeros(16, np.float32)},
    )  # fmt: skip
    return tmp_path / "run"


def test_three_lines_of_a_notebook(workdir):
    backbone, variables, preprocess = load(workdir)
    images = preprocess([PHOTOS / "chelsea.jpg", PHOTOS / "coffee.jpg"])
    out = jax.jit(lambda variables, images: backbone.apply(variables, images).view_features)(
        variables, images
    )
    assert images.shape == (2, 64, 64, 3)
    assert out.shape == (2, 32)
    teacher = random_params(config_of_64_pixels(), 2)["backbone"]
    jax.tree.map(np.testing.assert_array_equal, variables["params"], teacher)


def export(folder, config, tensors, facts):
    folder.mkdir()
    save_file({n: np.ascontiguousarray(x) for n, x in tensors.items()}, folder / "m.safetensors")
    text = json.dumps({"config": flatten(config), "facts": facts})
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


def test_paths_that_hold_no_model(tmp_path):
    with pytest.raises(UserError, match="it has no config.json"):
        load(tmp_path / "nothing")
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
    image = cv2.cvtColor(cv2.imread(str(PHOTOS / "chelsea.jpg")), cv2.COLOR_BGR2RGB)
    image = cv2.resize(image, (80, 60), interpolation=cv2.INTER_AREA)
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
    for images in ([], "a.jpg"):
        with pytest.raises(UserError, match="takes a list of images"):
            preprocess(images)
