"""Features that are kept: what is in them, when they are computed again, how a start goes on."""

import os

import numpy as np
import pytest
from PIL import Image
from test_knn_command import save_random

from esvit_jax import checkpoint
from esvit_jax.data.look import read_images
from esvit_jax.data.sources import IndexedSource, open_source
from esvit_jax.errors import RunError, UserError
from esvit_jax.evaluate import cache
from esvit_jax.evaluate.blocks import in_memory
from esvit_jax.evaluate.cache import (
    KeptFeatures,
    NetworkFeatures,
    kept_features,
    labelled_blocks,
)
from esvit_jax.evaluate.features import FeatureExtractor, view_features
from esvit_jax.evaluate.parts import Parts


@pytest.fixture
def loaded(tmp_path, tiny_config):
    tiny_config.evaluate.batch_size = 8
    return checkpoint.load_model(save_random(tmp_path / "run", tiny_config, 1, student_seed=2))


@pytest.fixture
def written(monkeypatch):
    """Counts the batches that are computed."""
    found, write = [], Parts.write

    def counting(self, i, columns):
        found.append(i)
        write(self, i, columns)

    monkeypatch.setattr(Parts, "write", counting)
    return found


def keep(loaded, folder, split="test[:20]", **options) -> KeptFeatures:
    source = open_source(loaded.config.data.name, split)
    (kept,) = kept_features(loaded, [source], folder, **options)
    return kept


def test_what_is_kept_are_the_features(loaded, tmp_path):
    kept = keep(loaded, tmp_path / "kept")
    extractor = FeatureExtractor(view_features(loaded.model.backbone, loaded.config), loaded.config)
    source = open_source(loaded.config.data.name, "test[:20]")
    features, labels = extractor.arrays(loaded.teacher["backbone"], source)
    np.testing.assert_allclose(kept.array(), features, atol=1e-6)
    np.testing.assert_array_equal(kept.labels, labels)
    assert [len(block) for block, _ in kept] == [8, 8, 4]
    assert isinstance(source, IndexedSource)
    assert list(kept.ids) == [source[i]["id"] for i in range(20)]
    # Read again, the same.
    np.testing.assert_array_equal(np.concatenate([x for x, _ in kept]), kept.array())


def test_columns(loaded, tmp_path):
    source = open_source(loaded.config.data.name, "test[:3]")
    out = loaded.model.backbone.forward(loaded.teacher["backbone"], images_of(loaded, source))
    means = keep(loaded, tmp_path, "test[:3]", column="block_means").array()
    np.testing.assert_allclose(means, np.concatenate(out.block_means, axis=1), atol=1e-5)
    regions = keep(loaded, tmp_path, "test[:3]", column="region_features").array()
    np.testing.assert_allclose(regions, out.region_features, atol=1e-5)


def images_of(loaded, source):
    from esvit_jax.interop.load import preprocessor

    return preprocessor(loaded.config)([source[i]["image"] for i in range(len(source))])


def test_nothing_is_computed_twice(loaded, tmp_path, written):
    first = keep(loaded, tmp_path / "kept").array()
    assert written == [0, 1, 2]
    np.testing.assert_array_equal(keep(loaded, tmp_path / "kept").array(), first)
    assert written == [0, 1, 2]


def test_a_broken_start_goes_on(loaded, tmp_path, written):
    first = keep(loaded, tmp_path / "kept").array()
    (cut,) = tmp_path.glob("kept/*/*/00000001.npz")
    cut.write_bytes(cut.read_bytes()[:100])
    (gone,) = tmp_path.glob("kept/*/*/00000002.npz")
    gone.unlink()
    np.testing.assert_array_equal(keep(loaded, tmp_path / "kept").array(), first)
    assert written == [0, 1, 2, 1, 2]


def folder_of_images(path):
    for i in range(4):
        file = path / f"class_{i % 2}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((20, 20, 3), 40 * i, np.uint8)).save(file)
    return f"folder:{path}"


@pytest.mark.parametrize("what", ["network", "step", "crop", "canvas", "image"])
def test_what_changes_is_computed_again(loaded, tmp_path, written, what):
    """And what was kept of the same split goes."""
    name = folder_of_images(tmp_path / "images")
    (before,) = kept_features(loaded, [open_source(name, "train")], tmp_path / "kept")
    first = before.array()
    if what == "network":
        norm = dict(loaded.teacher["backbone"]["norm"], bias=np.full(16, 0.5, np.float32))
        backbone = dict(loaded.teacher["backbone"], norm=norm)
        loaded = loaded._replace(teacher=dict(loaded.teacher, backbone=backbone))
    elif what == "step":
        loaded = loaded._replace(step=7)
    elif what == "crop":
        loaded.config.evaluate.crop = 0.5
    elif what == "canvas":
        loaded.config.data.canvas_size = 16
    else:
        Image.fromarray(np.full((20, 20, 3), 255, np.uint8)).save(tmp_path / "images/class_0/0.png")
    written.clear()
    (after,) = kept_features(loaded, [open_source(name, "train")], tmp_path / "kept")
    assert written == [0]
    assert len(list((tmp_path / "kept").glob("*/*"))) == 1
    if what in ("network", "image"):
        assert np.abs(after.array() - first).max() > 1e-3


def test_both_networks_and_several_splits_are_kept_beside_each_other(loaded, tmp_path, written):
    for _ in range(2):
        keep(loaded, tmp_path / "kept")
        keep(loaded, tmp_path / "kept", key="student")
        keep(loaded, tmp_path / "kept", "train[:8]")
    assert written == [0, 1, 2, 0, 1, 2, 0]
    assert len(list((tmp_path / "kept").glob("*/*"))) == 3


def test_splits_share_a_compilation(loaded, tmp_path, monkeypatch):
    made = []

    class Counted(FeatureExtractor):
        def __init__(self, *arguments, **options):
            made.append(self)
            super().__init__(*arguments, **options)

    monkeypatch.setattr(cache, "FeatureExtractor", Counted)
    sources = [open_source(loaded.config.data.name, split) for split in ("train[:8]", "test[:8]")]
    kept_features(loaded, sources, tmp_path / "kept")
    assert len(made) == 1


def test_images_that_cannot_be_read_have_no_features(loaded, tmp_path):
    name = folder_of_images(tmp_path / "images")
    (tmp_path / "images/class_0/0.png").write_bytes(b"no image")
    source = open_source(name, "train")
    (kept,) = kept_features(loaded, [source], tmp_path / "kept")
    assert len(kept.labels) == len(kept.ids) == 3 and "class_0/0.png" not in kept.ids
    # Their numbers are those of the images that can be read.
    images = read_images(source, kept.ids, [2, 0])
    for image, n in zip(images, (2, 0), strict=True):
        assert image == (tmp_path / "images" / kept.ids[n]).read_bytes()


def test_about_names_the_network_and_the_data(loaded):
    source = open_source(loaded.config.data.name, "test[:20]")
    work = NetworkFeatures(loaded, [source], ["view_features"], key="student")
    about = work.about(source)
    assert about["network"] == "student" and about["records"] == 20
    assert about["data_sha1"] != open_source(loaded.config.data.name, "test[:21]").fingerprint()


def test_where_no_image_can_be_read(loaded, tmp_path):
    name = folder_of_images(tmp_path / "images")
    for file in (tmp_path / "images").glob("*/*.png"):
        file.write_bytes(b"no image")
    with pytest.raises(UserError, match="none of 4 images can be read; a probe needs some"):
        labelled_blocks(loaded, [open_source(name, "train")], "a probe", keep=tmp_path / "kept")


def test_a_place_where_nothing_can_be_kept(loaded, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match=r"^features = '\S+/file/\S+': it cannot be written: "):
        keep(loaded, tmp_path / "file")


def test_what_is_all_there_is_only_read(loaded, tmp_path):
    """Nothing is written then, so it may be where nothing can be."""
    first = keep(loaded, tmp_path / "kept").array()
    files = list(tmp_path.glob("kept/*/*/*"))
    times = [file.stat().st_mtime_ns for file in files]
    np.testing.assert_array_equal(keep(loaded, tmp_path / "kept").array(), first)
    assert [file.stat().st_mtime_ns for file in files] == times and len(files) == 4


def test_what_another_command_removes_in_the_middle(loaded, tmp_path, monkeypatch):
    kept = keep(loaded, tmp_path / "kept")
    keep(loaded._replace(step=7), tmp_path / "kept")
    with pytest.raises(RunError, match=r"00000000.npz is gone: .*; start this one again$"):
        kept.array()
    write = Parts.write

    def removing(self, i, columns):
        self.remove()
        write(self, i, columns)

    monkeypatch.setattr(Parts, "write", removing)
    with pytest.raises(RunError, match=r"\.parts is gone: .*; start this one again$"):
        keep(loaded, tmp_path / "kept", "train[:8]")


def test_two_commands_may_fill_it_at_the_same_time(loaded, tmp_path, monkeypatch):
    """Both compute what neither found; what each writes is whole when it is there."""
    first, write = keep(loaded, tmp_path / "one").array(), Parts.write

    def interleaved(self, i, columns):
        monkeypatch.setattr(Parts, "write", write)
        np.testing.assert_array_equal(keep(loaded, tmp_path / "two").array(), first)
        monkeypatch.setattr(Parts, "write", interleaved)
        write(self, i, columns)

    monkeypatch.setattr(Parts, "write", interleaved)
    np.testing.assert_array_equal(keep(loaded, tmp_path / "two").array(), first)
    assert not list(tmp_path.glob("two/*/*/*.tmp"))


def test_where_nothing_can_be_written_nothing_is_kept(loaded, tmp_path, monkeypatch, written):
    """A converted checkpoint on a disk that others own."""
    source = open_source(loaded.config.data.name, "test[:20]")
    (kept,) = labelled_blocks(loaded, [source], "k-NN", keep=tmp_path / "kept")
    written.clear()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    (found,) = labelled_blocks(loaded, [source], "k-NN", keep=tmp_path / "other")
    assert not written and not (tmp_path / "other").exists()
    for ours, theirs in zip(in_memory(found), in_memory(kept), strict=True):
        np.testing.assert_allclose(ours[0], theirs[0], atol=1e-6)
        np.testing.assert_array_equal(ours[1], theirs[1])
