"""Folders that are whole or not there, and places where none can be made."""

import errno
import os
from pathlib import Path

import pytest

from esvit_jax.errors import UserError
from esvit_jax.interop.folders import new_folder


def test_a_folder_is_there_at_the_end(tmp_path):
    with new_folder(tmp_path / "a" / "b") as folder:
        (folder / "file").write_text("whole")
        assert not (tmp_path / "a" / "b").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b"]
    assert (tmp_path / "a" / "b" / "file").read_text() == "whole"


def test_a_failure_leaves_nothing(tmp_path):
    (tmp_path / "kept").mkdir()
    for directory in (tmp_path / "a" / "b", tmp_path / "kept" / "b"):
        with pytest.raises(RuntimeError), new_folder(directory) as folder:
            (folder / "half").write_text("")
            raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]
    assert not list((tmp_path / "kept").iterdir())


@pytest.mark.parametrize(
    ("directory", "message"),
    [
        ("", "give the folder to make"),
        ("file", "it exists already; remove it or take another name"),
        ("dangling", "it exists already; remove it or take another name"),
        ("new/..", "it exists already; remove it or take another name"),
        ("file/out", "it cannot be made: Not a directory"),
        ("x" * 300, "it cannot be made: File name too long"),
        ("new/" + "x" * 300, "it cannot be made: File name too long"),
        ("a\0b", "it cannot be made: embedded null byte"),
        ("gs://bucket/out", "make a local folder, then copy it there"),
        ("/proc/esvit/out", "it cannot be made: "),
    ],
)
def test_places_where_none_can_be_made(tmp_path, monkeypatch, directory, message):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    os.symlink("nowhere", "dangling")
    with pytest.raises(UserError) as error, new_folder(directory):
        pytest.fail("it was made")
    assert str(error.value).startswith(f"directory = {directory!r}: {message}")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dangling", "file"]


def test_a_parent_that_cannot_be_written(tmp_path, monkeypatch):
    def denied(*arguments, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", denied)
    message = "out': it cannot be made: Read-only file system"
    with pytest.raises(UserError, match=message), new_folder(tmp_path / "out"):
        pytest.fail("it was made")


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with new_folder("~/a"):
        pass
    assert (tmp_path / "a").is_dir()
