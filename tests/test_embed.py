"""Embeddings out: values, both files, resuming, refusing, memory."""

import json
import shutil
import tracemalloc
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from etils import epath
from rich.console import Console
from test_convert import random_params
from test_knn_command import save_random

import esvit_jax
from esvit_jax import checkpoint
from esvit_jax.commands.embed import main
from esvit_jax.data.loader import eval_batches
from esvit_jax.data.sources import open_source
from esvit_jax.errors import UserError
from esvit_jax.evaluate import cache as cache_module
from esvit_jax.evaluate import embed as embed_module
from esvit_jax.evaluate import parts as parts_module
from esvit_jax.evaluate.embed import embed
from esvit_jax.evaluate.features import FeatureExtractor
from esvit_jax.evaluate.parts import Parts
from esvit_jax.interop.load import load

PHOTOS = Path(__file__).parent / "data" / "photos"
BUNDLED = "bundled/fashion_mnist_mini"
QUIET = Console(quiet=True)


@pytest.fixture
def workdir(tmp_path, tiny_config):
    """Of a run whose network has 16-px views and 16 features."""
    return save_random(tmp_path / "run", tiny_config, seed=1)


@pytest.fixture
def photos(tmp_path):
    """A folder of two classes, one file of which is no image."""
    for i, file in enumerate(sorted(PHOTOS.glob("*.jpg"))):
        folder = tmp_path / "photos" / ("a" if i % 2 else "b")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder)
    (tmp_path / "photos" / "a" / "bad.jpg").write_text("no image")
    return tmp_path / "photos"


def arguments(workdir, out, *, data=BUNDLED, split="test[:10]"):
    return [f"--workdir={workdir}", f"--data={data}", f"--split={split}", f"--out={out}",
            "--batch_size=4"]  # fmt: skip


def test_values_ids_and_labels_of_a_folder(tmp_path, workdir, photos, capsys):
    main([*arguments(workdir, tmp_path / "f.npz", data=f"folder:{photos}", split="train"),
          "--regions"])  # fmt: skip
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "1 of 5 records could not be read as images",
        f"features of 4 images: {tmp_path / 'f.npz'}",
    ]
    found = np.load(tmp_path / "f.npz")
    assert set(found.files) == {"view_features", "region_features", "label", "id", "about"}
    files = sorted(p.relative_to(photos).as_posix() for p in photos.glob("*/*.jpg"))
    files.remove("a/bad.jpg")
    assert sorted(found["id"].tolist()) == files
    assert [int(name.startswith("b/")) for name in found["id"]] == found["label"].tolist()

    backbone, variables, preprocess = load(workdir)
    out = jax.jit(lambda images: vars(backbone.apply(variables, images)))(
        preprocess([photos / name for name in found["id"]])
    )
    np.testing.assert_allclose(found["view_features"], out["view_features"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        found["region_features"], out["region_features"], rtol=1e-5, atol=1e-5
    )
    about = json.loads(str(found["about"]))
    assert (about["step"], about["images"], about["class_names"]) == (6, 4, ["a", "b"])
    assert about["data"] == f"folder:{photos}"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.npz", "photos", "run"]


def test_parquet_holds_the_same(tmp_path, workdir):
    main([*arguments(workdir, tmp_path / "f.npz"), "--regions"])
    main([*arguments(workdir, tmp_path / "f.parquet"), "--regions"])
    arrays = np.load(tmp_path / "f.npz")
    file = pq.ParquetFile(tmp_path / "f.parquet")
    assert file.metadata.num_row_groups == 3
    table = file.read()
    assert table["id"].to_pylist() == arrays["id"].tolist()
    assert arrays["id"][9].endswith("__9")
    np.testing.assert_array_equal(table["label"].to_numpy(), arrays["label"])
    np.testing.assert_array_equal(
        np.stack(table["view_features"].to_numpy()), arrays["view_features"]
    )
    about = json.loads(table.schema.metadata[b"about"])
    regions = np.stack(table["region_features"].to_numpy()).reshape(
        -1, *about["shapes"]["region_features"]
    )
    np.testing.assert_array_equal(regions, arrays["region_features"])
    assert arrays["region_features"].shape == (10, 2, 2, 16)


def test_a_broken_run_goes_on_where_it_was(tmp_path, workdir, monkeypatch, capsys):
    main(arguments(workdir, tmp_path / "whole.npz"))

    class BreaksInTheThirdBatch(FeatureExtractor):
        def batches(self, params, source, first_batch=0):
            for i, batch in enumerate(super().batches(params, source, first_batch)):
                if i == 2:
                    raise KeyboardInterrupt
                yield batch

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cache_module, "FeatureExtractor", BreaksInTheThirdBatch)
        main(arguments(workdir, tmp_path / "f.npz"))
    parts = tmp_path / "f.npz.parts"
    assert not (tmp_path / "f.npz").exists()
    assert sorted(p.name for p in parts.iterdir()) == ["00000000.npz", "00000001.npz", "about.json"]
    (parts / "00000002.tmp").write_bytes(b"cut off")  # as a killed process leaves it
    (parts / "whole.tmp").write_bytes(b"cut off")

    decoded = []

    def counted(source, **fields):
        for batch in eval_batches(source, **fields):
            decoded.extend(batch["id"])
            yield batch

    monkeypatch.setattr("esvit_jax.evaluate.features.eval_batches", counted)
    capsys.readouterr()
    main(arguments(workdir, tmp_path / "f.npz"))
    assert "2 of 3 batches are there already" in capsys.readouterr().out
    assert [name.rpartition("__")[2] for name in decoded] == ["8", "9", "", ""]
    assert not parts.exists()
    whole, resumed = np.load(tmp_path / "whole.npz"), np.load(tmp_path / "f.npz")
    for name in ("view_features", "label", "id"):
        np.testing.assert_array_equal(whole[name], resumed[name])


def test_parts_of_another_network_are_refused(tmp_path, workdir, tiny_config, monkeypatch):
    left_by_an_interruption(tmp_path, workdir, monkeypatch)
    other = save_random(tmp_path / "other", tiny_config, seed=2)
    with pytest.raises(UserError, match=r"parts of another embedding: params_sha1 .*remove it"):
        main(arguments(other, tmp_path / "f.npz"))
    with pytest.raises(UserError, match=r"split 'test\[:10\]' \(now 'test\[:8\]'\), records 10"):
        main(arguments(workdir, tmp_path / "f.npz", split="test[:8]"))
    main(arguments(workdir, tmp_path / "f.npz"))
    assert np.load(tmp_path / "f.npz")["view_features"].shape == (10, 16)


def test_refusals(tmp_path, workdir, photos):
    (tmp_path / "f.npz").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"--out=\S+f.npz: it exists already; remove it"):
        main(arguments(workdir, tmp_path / "f.npz"))
    assert (tmp_path / "f.npz").read_bytes() == b"mine"
    with pytest.raises(UserError, match=r"it must end in \.npz or \.parquet"):
        main(arguments(workdir, tmp_path / "f.csv"))
    with pytest.raises(UserError, match="--batch_size=5: 4 devices cannot share"):
        main([*arguments(workdir, tmp_path / "g.npz"), "--batch_size=5"])
    with pytest.raises(UserError, match="batch_size = 5: 4 devices cannot share"):
        embed(workdir, batch_size=5)
    for file in photos.glob("*/*.jpg"):
        file.write_text("no image")
    with pytest.raises(UserError, match="none of 5 records is an image"):
        main(arguments(workdir, tmp_path / "g.npz", data=f"folder:{photos}", split="train"))
    with pytest.raises(UserError, match="none of 5 records is an image"):
        embed(workdir, f"folder:{photos}", console=QUIET)
    assert not list(tmp_path.glob("g.npz*"))


@pytest.mark.parametrize("name", ["missing/f.npz", "file/f.npz", f"{'x' * 300}.npz"])
def test_what_cannot_be_written_is_refused_before_computing(tmp_path, workdir, name, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(FeatureExtractor, "batches", None)
    out = tmp_path / name
    with pytest.raises(UserError, match=r"^--out=.*(there is no folder|File name too long)"):
        main(arguments(workdir, out))
    with pytest.raises(UserError, match=r"^out = .*(there is no folder|File name too long)"):
        embed(workdir, BUNDLED, out, split="test[:4]", console=QUIET)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "run"]


def left_by_an_interruption(tmp_path, workdir, monkeypatch):
    """The folder of parts of an embedding whose batches are all done."""

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setitem(parts_module.WRITERS, ".npz", interrupted)
        main(arguments(workdir, tmp_path / "f.npz"))
    return tmp_path / "f.npz.parts"


@pytest.mark.parametrize("how", ["cut", "empty", "damaged", "no zip"])
def test_a_part_that_cannot_be_read_is_computed_again(tmp_path, workdir, monkeypatch, capsys, how):
    main(arguments(workdir, tmp_path / "whole.npz"))
    folder = left_by_an_interruption(tmp_path, workdir, monkeypatch)
    part = folder / "00000001.npz"
    content = bytearray(part.read_bytes())
    content[len(content) // 3] ^= 255
    new = {"cut": content[:-30], "empty": b"", "damaged": content, "no zip": b"x" * 99}[how]
    part.write_bytes(bytes(new))

    computed = []
    original = FeatureExtractor.batches

    def counted(self, params, source, first_batch=0):
        for i, batch in enumerate(original(self, params, source, first_batch)):
            computed.append(first_batch + i)
            yield batch

    monkeypatch.setattr(FeatureExtractor, "batches", counted)
    capsys.readouterr()
    main(arguments(workdir, tmp_path / "f.npz"))
    said = capsys.readouterr().out
    assert f"cannot be read and computed again: 00000001.npz in {folder}" in said
    assert "2 of 3 batches are there already" in said
    assert computed == [1]
    whole, mended = np.load(tmp_path / "whole.npz"), np.load(tmp_path / "f.npz")
    for name in ("view_features", "label", "id"):
        np.testing.assert_array_equal(whole[name], mended[name])


def test_any_flipped_bit_of_a_part_is_found_or_changes_nothing(tmp_path):
    columns = {"view_features": np.arange(6, dtype=np.float32).reshape(3, 2)}
    columns |= {"label": np.arange(3, dtype=np.int32), "id": np.array(["a", "b", "c"])}
    about = {"columns": ["view_features"]}

    parts = Parts(epath.Path(tmp_path / "f.npz"), about, 1)
    assert parts.begin(print) == [0]
    parts.write(0, columns)
    file = parts.folder / "00000000.npz"
    content, found = file.read_bytes(), 0
    for bit in range(0, 8 * len(content), 3):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(bytes(flipped))
        if parts.begin(lambda message: None):
            found += 1
            continue
        with np.load(file) as part:
            for name, array in columns.items():
                np.testing.assert_array_equal(part[name], array)
    assert found > 8 * len(content) / 3 / 2


@pytest.mark.parametrize("torn", [b"", b'{"network": "tea', b"\xff\xfe", b"[]"])
def test_a_torn_about_begins_anew(tmp_path, workdir, monkeypatch, capsys, torn):
    folder = left_by_an_interruption(tmp_path, workdir, monkeypatch)
    (folder / "about.json").write_bytes(torn)
    capsys.readouterr()
    main(arguments(workdir, tmp_path / "f.npz"))
    said = capsys.readouterr().out
    assert "about.json cannot be read, so nobody knows whose parts these are: begun anew" in said
    assert "there already" not in said
    assert np.load(tmp_path / "f.npz")["view_features"].shape == (10, 16)


def test_parts_of_an_earlier_version_are_refused(tmp_path, workdir, monkeypatch):
    """Their columns had other names."""
    folder = left_by_an_interruption(tmp_path, workdir, monkeypatch)
    about = json.loads((folder / "about.json").read_text())
    del about["columns"]
    (folder / "about.json").write_text(json.dumps(about | {"regions": False}))
    with pytest.raises(UserError, match=r"parts of another embedding: columns None \(now"):
        main(arguments(workdir, tmp_path / "f.npz"))


def test_what_is_missing(tmp_path):
    parts = Parts(epath.Path(tmp_path / "f.npz"), {}, 7)
    columns = {"label": np.zeros(1, np.int32), "id": np.array(["a"])}
    assert parts.begin(print) == [0, 1, 2, 3, 4, 5, 6]
    for i in (1, 2, 5):
        parts.write(i, columns)
    assert parts.begin(print) == [0, 3, 4, 6]
    (parts.folder / "00000002.npz").write_bytes(b"cut")
    assert parts.begin(print) == [0, 2, 3, 4, 6]
    for i in (0, 2, 3, 4, 6):
        parts.write(i, columns)
    assert parts.begin(print) == []


def test_arrays_in_memory_are_those_of_the_file(tmp_path, workdir, photos, capsys):
    found = esvit_jax.embed(workdir, f"folder:{photos}", regions=True)
    about = esvit_jax.embed(workdir, f"folder:{photos}", tmp_path / "f.npz", regions=True)
    written = np.load(tmp_path / "f.npz")
    for name in ("view_features", "region_features", "label", "id"):
        np.testing.assert_array_equal(getattr(found, name), written[name])
    assert json.loads(str(written["about"])) == about == found.about
    assert (about["images"], about["unreadable"], about["records"]) == (4, 1, 5)
    # Four images are no batch of a hundred, which is what the run's config asks for.
    assert about["batch_size"] == 32


def test_what_the_run_trained_on_is_the_default(workdir, tiny_config):
    loaded = checkpoint.load_model(workdir)
    loaded.config.data.train_split = "test[:5]"
    found = embed(loaded, console=QUIET)
    assert (found.about["data"], found.about["split"]) == (BUNDLED, "test[:5]")
    assert found.region_features is None and found.label is not None
    assert found.label.shape == (5,) and found.view_features.shape == (5, 16)
    source = open_source(BUNDLED, "test[5:7]")
    found = embed(loaded, source, console=QUIET)
    assert [name.rpartition("__")[2] for name in found.id] == ["5", "6"]
    assert loaded.config.evaluate.batch_size == 100


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["--data=folder:/nowhere"], "--data"),
        (["--split=fly"], "--split"),
        ([f"--data={BUNDLED}"], "--split"),
        ([], "config.data.train_split"),
    ],
)
def test_wrong_data_is_refused_by_the_flag(tmp_path, workdir, flags, name, monkeypatch):
    def refuse(name, split, data_dir):
        argument = "name" if "nowhere" in name else "split"
        raise UserError("there is none", argument=argument, value="x")

    monkeypatch.setattr(embed_module, "open_source", refuse)
    with pytest.raises(UserError, match=f"^{name}(=x| = 'x'): there is none"):
        main([f"--workdir={workdir}", f"--out={tmp_path / 'f.npz'}", *flags])


def test_without_labels_there_is_no_such_column(tmp_path, workdir):
    args = arguments(workdir, tmp_path / "f.npz", data=f"folder:{PHOTOS}", split="train")
    main(args)
    assert set(np.load(tmp_path / "f.npz").files) == {"view_features", "id", "about"}


@pytest.mark.parametrize("name", ["f.npz", "f.parquet"])
def test_memory_does_not_grow_with_the_data(tmp_path, name, monkeypatch):
    rows, dim = 64, 4096  # 1 MiB a batch

    def peak_of(batches):
        parts = Parts(epath.Path(tmp_path / f"{batches}{name}"), {}, batches)
        parts.begin(print)
        rng = np.random.default_rng(0)
        for i in range(batches):
            ids = np.array([f"{'long ' * (i == 1)}{i}/{row}.jpg" for row in range(rows)])
            view = rng.standard_normal((rows, dim), np.float32)
            parts.write(i, {"view_features": view, "label": np.full(rows, i, np.int32), "id": ids})
        tracemalloc.start()
        parts.make_whole({"images": rows * batches})
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    few, many = peak_of(4), peak_of(32)
    assert many < few + 2**20, (few, many)
    if name == "f.npz":
        found = np.load(tmp_path / "32f.npz")
        assert found["view_features"].shape == (32 * rows, dim)
        assert found["id"][rows] == "long 1/0.jpg" and found["id"][-1] == "31/63.jpg"
    else:
        assert pq.read_metadata(tmp_path / "32f.parquet").num_row_groups == 32


def test_features_of_the_chosen_network(tmp_path, tiny_config):
    student, teacher = random_params(tiny_config, 1), random_params(tiny_config, 2)
    centers = {"view": np.zeros(32, np.float32), "region": np.zeros(32, np.float32)}
    views = []
    for origin in ({"key": "student"}, {}):
        directory = tmp_path / f"run{len(origin)}"
        checkpoint.save_model(
            directory, config=tiny_config, origin=origin, student=student, teacher=teacher,
            centers=centers,
        )  # fmt: skip
        loaded = checkpoint.load_model(directory)
        loaded.config.evaluate.batch_size = 4
        out = tmp_path / f"{len(origin)}.npz"
        about = embed(loaded, open_source(BUNDLED, "test[:4]"), out, console=QUIET)
        assert about["images"] == 4
        views.append(np.load(out)["view_features"])
    assert np.abs(views[0] - views[1]).max() > 0.1
