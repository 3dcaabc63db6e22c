"""Folders of images: what is an image, of which split and label, in which order."""

import hashlib
import importlib.util
import json
import logging
import os
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from images import write_image

from esvit_jax.data import folders, sources
from esvit_jax.data.folders import printable, read_folder
from esvit_jax.errors import UserError


def write_images(root: Path, *paths: str) -> Path:
    for path in paths:
        write_image(root / path)
    return root


def labels(folder: Path, split: str = "train") -> dict[str, dict[str, str | None]]:
    """{split: {path: label}}."""
    found = read_folder(str(folder), split)
    return {name: {file.path: file.label for file in files} for name, files in found.items()}


@pytest.fixture
def log_lines(caplog: pytest.LogCaptureFixture) -> Callable[[int], list[str]]:
    """What was logged so far at a level and above; a test folder's lines are new to the process."""
    caplog.set_level(logging.INFO, logger="absl")
    return lambda level: [r.getMessage() for r in caplog.records if r.levelno >= level]


@pytest.fixture
def pillow_heif(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Says whether pillow-heif is installed."""
    find_spec = importlib.util.find_spec

    def installed(there: bool) -> None:
        spec = find_spec("json") if there else None
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name: spec if name == "pillow_heif" else find_spec(name),
        )

    return installed


# Splits and labels.


def test_flat_folder_has_no_labels(tmp_path: Path):
    write_images(tmp_path, "a.png", "b.JPG", "c.Tiff", ".hidden.png", "._a.png")
    assert labels(tmp_path) == {"train": {"a.png": None, "b.JPG": None, "c.Tiff": None}}


def test_label_folders(tmp_path: Path):
    write_images(tmp_path, "cat/0.png", "cat/1.png", "bird/0.png", ".cache/0.png")
    expected = {"cat/0.png": "cat", "cat/1.png": "cat", "bird/0.png": "bird"}
    assert labels(tmp_path) == {"train": expected}


@pytest.mark.parametrize("names", [("train", "test"), ("training", "valid"), ("Train", "Val")])
def test_folders_named_as_splits_are_splits(tmp_path: Path, names: tuple[str, str]):
    train, test = names
    flat = write_images(tmp_path / "flat", f"{train}/a.png", f"{test}/b.png")
    assert labels(flat) == {train: {f"{train}/a.png": None}, test: {f"{test}/b.png": None}}
    nested = write_images(tmp_path / "nested", f"{train}/cat/a.png", f"{test}/dog/b.png")
    assert labels(nested) == {
        train: {f"{train}/cat/a.png": "cat"},
        test: {f"{test}/dog/b.png": "dog"},
    }


def test_splits_of_own_names_are_asked_for(tmp_path: Path):
    write_images(tmp_path, "fold1/cat/a.png", "fold2/cat/b.png")
    assert labels(tmp_path).keys() == {"train"}
    for split in ("fold1", "fold1[:50%]+fold2", "fold2[:1]"):
        assert labels(tmp_path, split) == {
            "fold1": {"fold1/cat/a.png": "cat"},
            "fold2": {"fold2/cat/b.png": "cat"},
        }


def test_a_label_may_have_the_name_of_a_split(tmp_path: Path):
    write_images(tmp_path, "aeroplane/a.png", "train/b.png")
    assert labels(tmp_path)["train"] == {"aeroplane/a.png": "aeroplane", "train/b.png": "train"}


def test_folders_without_images_do_not_matter(tmp_path: Path):
    write_images(tmp_path, "train/a.png", "test/b.png")
    (tmp_path / "scripts" / "old").mkdir(parents=True)
    (tmp_path / "scripts" / "old" / "run.sh").write_text("exit")
    assert labels(tmp_path).keys() == {"train", "test"}


def test_one_stray_folder_in_a_label_folder(tmp_path: Path, log_lines: Callable[[int], list[str]]):
    write_images(tmp_path, "cat/a.png", "cat/old/b.png", "dog/c.png")
    assert labels(tmp_path)["train"] == {
        "cat/a.png": "cat",
        "cat/old/b.png": "cat",
        "dog/c.png": "dog",
    }
    assert log_lines(logging.WARNING) == [
        f"folder:{tmp_path}: 3 images, 2 labels (cat, dog); the labels are the top folders, "
        "also of images deeper down (cat/old/b.png)"
    ]


def test_nested_photos_have_the_top_folder_as_label(tmp_path: Path):
    write_images(tmp_path, "2024/june/a.png", "2024/june/lake/b.png", "2025/c.png")
    assert labels(tmp_path)["train"] == {
        "2024/june/a.png": "2024",
        "2024/june/lake/b.png": "2024",
        "2025/c.png": "2025",
    }


def test_images_beside_folders_have_no_labels(
    tmp_path: Path, log_lines: Callable[[int], list[str]]
):
    write_images(tmp_path, "2024/june/a.png", "2025/b.png", "c.png")
    assert set(labels(tmp_path)["train"].values()) == {None}
    assert log_lines(logging.WARNING) == [
        f"folder:{tmp_path}: 3 images, no labels; folders are no labels, as images lie "
        "beside them (c.png)"
    ]


def test_a_folder_around_the_others_is_looked_through(tmp_path: Path):
    splits = write_images(tmp_path / "a", "set/images/train/cat/a.png", "set/images/test/cat/b.png")
    (splits / "set" / "README.txt").write_text("about")
    assert labels(splits) == {
        "train": {"set/images/train/cat/a.png": "cat"},
        "test": {"set/images/test/cat/b.png": "cat"},
    }
    photos = write_images(tmp_path / "b", "DCIM/100/a.png", "DCIM/101/b.png")
    assert set(labels(photos)["train"].values()) == {"100", "101"}
    one_label = write_images(tmp_path / "c", "cat/a.png")
    assert labels(one_label) == {"train": {"cat/a.png": "cat"}}


def test_images_beside_splits_are_left_out_and_named(
    tmp_path: Path, log_lines: Callable[[int], list[str]]
):
    write_images(tmp_path, "train/cat/a.png", "test/cat/b.png", "overview.png")
    assert labels(tmp_path)["train"] == {"train/cat/a.png": "cat"}
    assert (
        "left out overview.png: beside the folders of the splits" in log_lines(logging.WARNING)[0]
    )


def test_splits_within_folders_are_refused(tmp_path: Path):
    write_images(tmp_path, "bottle/train/a.png", "bottle/test/b.png", "cable/train/c.png")
    with pytest.raises(UserError) as error:
        read_folder(str(tmp_path), "train")
    assert str(error.value) == (
        f"folder = {str(tmp_path)!r}: bottle holds splits (test and train), but splits must be on "
        f"top: read folder:{tmp_path}/bottle, or move them up"
    )


# The order.


def test_the_order_is_that_of_a_hash_of_the_path_below_the_split(tmp_path: Path):
    def ordered(paths: list[str]) -> list[str]:
        return sorted(paths, key=lambda path: hashlib.sha1(path.encode()).hexdigest())

    for root, inner in (
        ("flat", [f"{i}.png" for i in range(9)]),
        ("labels", [f"{'ab'[i % 2]}/ü{i}.png" for i in range(9)]),
        ("splits/train", [f"{'ab'[i % 2]}/{i}.png" for i in range(9)]),
    ):
        write_images(tmp_path / root, *inner)
        top, _, split = root.partition("/")
        files = read_folder(str(tmp_path / top), "train")["train"]
        expected = [f"{split}/{path}" if split else path for path in ordered(inner)]
        assert [file.path for file in files] == expected and expected != sorted(expected)


# What is no image.


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_only_regular_files_are_images(tmp_path: Path, log_lines: Callable[[int], list[str]]):
    write_images(tmp_path, "a.png", "album.jpg/b.png")
    os.mkfifo(tmp_path / "pipe.jpg")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "gone.jpg").symlink_to("nowhere")
    (tmp_path / "self.jpg").symlink_to("self.jpg")
    (tmp_path / "null.png").symlink_to("/dev/null")
    (tmp_path / "link.png").symlink_to("a.png")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(os.path.relpath(tmp_path / "socket.jpg"))
        assert labels(tmp_path) == {"train": {"a.png": None, "link.png": None}}
    kinds = ["album.jpg (folder)", "gone.jpg (broken link)", "null.png (device)"]
    assert log_lines(logging.WARNING) == [
        f"folder:{tmp_path}: 2 images, no labels; left out {', '.join(kinds)} and 3 more: "
        "no regular file"
    ]
    source = sources.open_source(f"folder:{tmp_path}", "train")
    assert isinstance(source, sources.IndexedSource)
    assert [source[i]["image"][:4] for i in range(len(source))] == [b"\x89PNG"] * 2


def test_links_to_folders_are_followed_but_not_around(
    tmp_path: Path, log_lines: Callable[[int], list[str]]
):
    write_images(tmp_path / "all", "a.png", "b.png")
    for label in ("cat", "dog"):  # twice the same, which is no loop
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / label).symlink_to("../all")
    (tmp_path / "all" / "up").symlink_to("../set")
    assert labels(tmp_path / "set")["train"] == {
        "cat/a.png": "cat",
        "cat/b.png": "cat",
        "dog/a.png": "dog",
        "dog/b.png": "dog",
    }
    assert (
        "left out cat/up, dog/up: a link to a folder that it lies in"
        in log_lines(logging.WARNING)[0]
    )


def test_other_files_are_counted(tmp_path: Path, log_lines: Callable[[int], list[str]]):
    write_images(tmp_path, "a.png", "b.mov", "c.MOV", "d.txt", "Makefile")
    read_folder(str(tmp_path), "train")
    assert log_lines(logging.WARNING) == [
        f"folder:{tmp_path}: 1 image, no labels; left out files of other kinds: 2 .mov, 1 .txt, "
        "1 without a suffix"
    ]


def test_a_plain_folder_is_no_warning_and_said_once(
    tmp_path: Path, log_lines: Callable[[int], list[str]]
):
    write_images(tmp_path, "train/cat/a.png", "train/dog/b.png", "test/cat/c.png")
    for split in ("train", "test"):
        read_folder(str(tmp_path), split)
    assert not log_lines(logging.WARNING)
    assert log_lines(logging.INFO) == [
        f"folder:{tmp_path}: splits test (1 image), train (2 images), 2 labels (cat, dog)"
    ]


def test_heic_needs_an_extra_and_says_so(
    tmp_path: Path,
    log_lines: Callable[[int], list[str]],
    pillow_heif: Callable[[bool], None],
):
    write_images(tmp_path, "a.png", "b.HEIC", "c.heif")
    pillow_heif(False)
    assert labels(tmp_path) == {"train": {"a.png": None}}
    assert log_lines(logging.WARNING) == [
        f"folder:{tmp_path}: 1 image, no labels; left out 2 HEIC images: pip install "
        "esvit_jax[heic] to read them"
    ]
    (tmp_path / "a.png").unlink()
    with pytest.raises(UserError, match=r"holds no images; left out 2 HEIC.*esvit_jax\[heic\]"):
        read_folder(str(tmp_path), "train")
    pillow_heif(True)
    assert labels(tmp_path) == {"train": {"b.HEIC": None, "c.heif": None}}


# What cannot be opened.


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing", "there is no such folder"),
        ("file.png", "this is a file"),
        ("empty", "it holds no images"),
        ("nul\0", "it cannot be opened: embedded null"),
        ("x" * 300, "it cannot be opened: File name too long"),
    ],
)
def test_folders_that_hold_nothing_are_one_line(tmp_path: Path, path: str, message: str):
    write_image(tmp_path / "file.png")
    (tmp_path / "empty").mkdir()
    folder = f"{tmp_path}/{path}"
    with pytest.raises(UserError, match=re.escape(message)) as error:
        read_folder(folder, "train")
    assert (error.value.argument, error.value.value) == ("folder", folder)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError) as error:
        sources.open_source(f"folder:{folder}", "train")
    assert (error.value.argument, error.value.value) == ("name", f"folder:{folder}")


def test_permission_denied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_lines: Callable[[int], list[str]]
):
    write_images(tmp_path, "cat/a.png", "dog/b.png")
    locked, scandir = str(tmp_path / "dog"), os.scandir

    def deny(path: str) -> Iterator[os.DirEntry[str]]:  # also where root runs the tests
        if os.path.abspath(path) == locked:
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", deny)
    assert labels(tmp_path) == {"train": {"cat/a.png": "cat"}}
    assert "left out dog (Permission denied): cannot be opened" in log_lines(logging.WARNING)[0]
    with pytest.raises(UserError, match="it cannot be opened: Permission denied"):
        read_folder(locked, "train")


def test_a_large_folder_shows_signs_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_lines: Callable[[int], list[str]]
):
    write_images(tmp_path, "a.png", "b.png")
    monkeypatch.setattr(folders, "SECONDS_BETWEEN_SIGNS", -1.0)
    read_folder(str(tmp_path), "train")
    assert log_lines(logging.WARNING) == [f"folder:{tmp_path}: 2 images so far"]


# Names.


def test_file_names_that_are_no_text(tmp_path: Path, log_lines: Callable[[int], list[str]]):
    folder = os.fsencode(tmp_path) + b"/\xe9t\xe9"
    for name in (
        b"caf\xe9.png",
        "café.png".encode(),
        b"line\nbreak.png",
        "nb\u202fsp.png".encode(),
    ):
        os.makedirs(folder + b"/\xff", exist_ok=True)
        write_image(Path(os.fsdecode(folder + b"/\xff/" + name)))
    source = sources.open_source(f"folder:{os.fsdecode(folder)}", "train")
    assert isinstance(source, sources.IndexedSource)
    records = [source[i] for i in range(4)]
    assert all(record["image"] for record in records)
    ids = [record["id"] for record in records]
    assert sorted(ids) == [
        "\\xff/caf\\xe9.png",
        "\\xff/café.png",
        "\\xff/line\\x0abreak.png",
        "\\xff/nb\u202fsp.png",
    ]
    assert source.class_names == ("\\xff",)
    for text in (json.dumps(ids, ensure_ascii=False), *log_lines(logging.INFO)):
        text.encode()


def test_printable_keeps_what_can_be_printed():
    assert printable("Grüße 東京/🐈 1.png") == "Grüße 東京/🐈 1.png"
    assert printable(os.fsdecode(b"\x80\x1b[0m")) == "\\x80\\x1b[0m"
