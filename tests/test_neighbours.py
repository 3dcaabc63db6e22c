"""Nearest images and maps, and the commands that draw them."""

import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from test_convert import random_params
from test_knn_command import save_random

from esvit_jax.analyze.neighbours import map_images, nearest_images
from esvit_jax.analyze.pictures import short_name
from esvit_jax.commands import attention, correspond, neighbours
from esvit_jax.commands import map as map_command
from esvit_jax.errors import RunError, UserError

PHOTOS = Path(__file__).parent / "data" / "photos"


def test_nearest_by_brute_force():
    r = np.random.default_rng(0)
    queries, features = r.normal(size=(2, 4, 5)).astype(np.float32)
    features = np.concatenate([features, queries[1:2], 3 * queries[2:3]])
    found, similarity = nearest_images(queries, features, 3, leave_out=np.array([-1, 4, -1, 0]))
    for i, query in enumerate(queries):
        cosines = {
            j: float(query @ x / np.linalg.norm(query) / np.linalg.norm(x))
            for j, x in enumerate(features)
            if j != [-1, 4, -1, 0][i]
        }
        expected = sorted(cosines, key=lambda j: -cosines[j])[:3]
        assert found[i].tolist() == expected
        np.testing.assert_allclose(similarity[i], [cosines[j] for j in expected], atol=1e-6)
    assert found[2, 0] == 5 and similarity[2, 0] == pytest.approx(1.0)


def test_no_more_neighbours_than_there_are():
    features = np.eye(3, dtype=np.float32)
    found, _ = nearest_images(features, features, 10, leave_out=np.arange(3))
    assert found.shape == (3, 2)


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_a_map_keeps_groups_together(method):
    r = np.random.default_rng(0)
    centers = np.eye(3, 8, dtype=np.float32) * 5
    labels = np.repeat(np.arange(3), 20)
    features = (centers[labels] + 0.3 * r.normal(size=(60, 8))).astype(np.float32)
    points = map_images(features, method)
    assert points.shape == (60, 2)
    distance = np.linalg.norm(points[:, None] - points, axis=-1) + np.diag(np.full(60, np.inf))
    assert (labels[distance.argmin(1)] == labels).all()
    np.testing.assert_array_equal(map_images(features, method), points)


def test_what_a_map_refuses(monkeypatch):
    with pytest.raises(UserError, match="three images, and there are 2"):
        map_images(np.ones((2, 4), np.float32))
    with pytest.raises(UserError, match="method = 'nothing'"):
        map_images(np.ones((5, 4), np.float32), "nothing")
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(UserError, match=r"pip install 'esvit_jax\[umap\]'"):
        map_images(np.ones((5, 4), np.float32), "umap")


def test_short_names():
    assert short_name("x-test.array_record-00003-of-00004__7") == "test 3/7"


@pytest.fixture
def workdir(tmp_path, tiny_config):
    return save_random(tmp_path / "run", tiny_config, seed=1)


def width(file):
    with Image.open(file) as image:
        return image.width


def test_neighbours_of_images_of_the_data(workdir, capsys):
    neighbours.main([f"--workdir={workdir}", "--of=0,7", "--k=4"])
    assert width(workdir / "neighbours.png") > 500
    assert "queries: 2, each with those most like it of the 40" in capsys.readouterr().out
    assert len(list((workdir / "features").glob("*/*/*.npz"))) >= 1


def test_neighbours_of_photos_in_other_data(workdir, tmp_path):
    neighbours.main([
        f"--workdir={workdir}", f"--data=folder:{PHOTOS}", f"--images={PHOTOS / 'coffee.jpg'}",
        f"--out={tmp_path}",
    ])  # fmt: skip
    assert width(tmp_path / "neighbours.png") > 500


def test_map_of_the_data(workdir, capsys):
    map_command.main([f"--workdir={workdir}", "--method=pca"])
    assert width(workdir / "map.png") > 500
    assert "40 images" in capsys.readouterr().out


def test_what_is_refused(workdir):
    for main, flags, message in [
        (neighbours.main, ["--of=40"], "--of=40: it must be numbers from 0 to 39"),
        (neighbours.main, ["--of=²"], "--of=²: it must be numbers from 0 to 39"),
        (neighbours.main, ["--of=1", "--images=x.jpg"], "--images: not allowed with argument --of"),
        (neighbours.main, ["--images=none.jpg"], "none.jpg cannot be read"),
        (map_command.main, ["--split=test[:2]", f"--out={workdir}"], "three images"),
        (map_command.main, ["--split=test[:2]"], "--out is missing"),
        (map_command.main, ["--seed=-1"], "--seed=-1: it must be from 0 to 4294967295"),
        (neighbours.main, ["--split=test[:1]", f"--out={workdir}"], "one image, and so no neigh"),
    ]:
        with pytest.raises(UserError, match=re.escape(message)):
            main([f"--workdir={workdir}", *flags])


def test_a_workdir_that_is_not_there_is_not_made(tmp_path):
    for main in (neighbours.main, map_command.main, attention.main, correspond.main):
        with pytest.raises(UserError, match="typo is no workdir"):
            main([f"--workdir={tmp_path / 'typo'}"])
    assert not list(tmp_path.iterdir())


def test_a_network_that_diverged(tmp_path, tiny_config, monkeypatch):
    def not_finite(config, seed):
        return jax.tree.map(lambda x: np.full_like(x, np.nan), random_params(config, seed))

    monkeypatch.setattr("test_knn_command.random_params", not_finite)
    workdir = save_random(tmp_path / "run", tiny_config, seed=1)
    for main in (neighbours.main, map_command.main):
        with pytest.raises(RunError, match="features of 40 of 40 images are not finite"):
            main([f"--workdir={workdir}"])
