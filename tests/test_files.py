"""Files of torch and safetensors: read, refused when they are broken or would run code."""

import argparse
import errno
import os

import numpy as np
import pytest
from test_convert import assert_same, both_centers, published, small_config, supervised, write

from esvit_jax import checkpoint
from esvit_jax.errors import UserError
from esvit_jax.interop.convert import convert


def test_files_of_torch(tmp_path):
    torch = pytest.importorskip("torch")
    centers = both_centers()
    tensors, student, teacher = published(small_config(), **centers)

    def network(prefix):
        return {
            name.removeprefix(prefix): torch.tensor(np.ascontiguousarray(x))
            for name, x in tensors.items()
            if name.startswith(prefix)
        }

    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    content = {
        "student": network("student."),
        "teacher": network("teacher."),
        "dino_loss": {name: torch.tensor(x) for name, x in centers.items()},
        "optimizer": optimizer.state_dict(),
        "fp16_scaler": None,
        "epoch": 7,
        "args": argparse.Namespace(arch="swin_tiny", lr=0.1),
    }
    torch.save(content, tmp_path / "a.pth")
    lines = convert(tmp_path / "a.pth", tmp_path / "a")
    loaded = checkpoint.load_model(tmp_path / "a")
    assert_same(loaded.student, student)
    assert_same(loaded.teacher, teacher)
    assert loaded.origin["epoch"] == 7
    assert "left behind: optimizer, fp16_scaler, args" in lines

    model = {
        n: torch.tensor(np.ascontiguousarray(x))
        for n, x in supervised(small_config(), "microsoft")[0].items()
    }
    half = {n: x.to(torch.bfloat16) if x.is_floating_point() else x for n, x in model.items()}
    torch.save({"model": half}, tmp_path / "b.pth")
    convert(tmp_path / "b.pth", tmp_path / "b")
    bias = checkpoint.load_model(tmp_path / "b").network()["backbone"]["norm"]["bias"]
    np.testing.assert_array_equal(bias, half["norm.bias"].float().numpy())


class RunsCode:
    def __reduce__(self):
        return print, ("this file ran code",)


def test_files_that_run_code_or_are_none_are_refused(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    file = tmp_path / "a.pth"
    torch.save({"teacher": {}, "args": RunsCode()}, file)
    with pytest.raises(UserError, match=r"would run code when read \(\w*\.?print\)") as error:
        convert(file, tmp_path / "a")
    assert "\n" not in str(error.value)
    assert "ran code" not in capsys.readouterr().out
    for content in (b"", b"no pickle at all", file.read_bytes()[:100]):
        file.write_bytes(content)
        with pytest.raises(UserError, match="it is no file of torch.save") as error:
            convert(file, tmp_path / "a")
        assert "\n" not in str(error.value)
    torch.save([torch.zeros(3)], file)
    with pytest.raises(UserError, match="holds a list, not a dict of tensors"):
        convert(file, tmp_path / "a")


def test_files_without_torch(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    (tmp_path / "a.pth").write_bytes(b"")
    with pytest.raises(UserError, match=r"needs torch: pip install esvit_jax\[torch\]"):
        convert(tmp_path / "a.pth", tmp_path / "a")
    with pytest.raises(UserError, match="there is no such file"):
        convert(tmp_path / "b.pth", tmp_path / "a")
    (tmp_path / "a.safetensors").write_bytes(b"no header, just a sentence")
    with pytest.raises(UserError, match="it is no whole safetensors file"):
        convert(tmp_path / "a.safetensors", tmp_path / "a")
    write(tmp_path / "vit.safetensors", {"blocks.0.norm1.weight": np.zeros(4, np.float32)})
    with pytest.raises(UserError, match=r"holds no .*Swin.*its 1 names begin with blocks\.0"):
        convert(tmp_path / "vit.safetensors", tmp_path / "a")


def test_sources_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe.safetensors")
    file = write(tmp_path / "a.safetensors", published(small_config())[0])
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:5000])
    for name, message in (
        ("folder", "it is a folder; give the .pth or .safetensors file in it"),
        ("pipe.safetensors", "there is no such file"),
        ("missing.pth", "there is no such file"),
        ("x" * 300, "it cannot be read: File name too long"),
        ("a\0b", "there is no such file"),
        ("cut.safetensors", "it is no whole safetensors file"),
    ):
        with pytest.raises(UserError) as error:
            convert(tmp_path / name, tmp_path / "out" / "a")
        assert str(error.value).startswith(f"source = {str(tmp_path / name)!r}: {message}")
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()

    def denied(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("safetensors.numpy.load_file", denied)
    with pytest.raises(UserError, match="it cannot be read: Permission denied"):
        convert(file, tmp_path / "a")
