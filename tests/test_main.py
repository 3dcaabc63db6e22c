"""The command line as a process of its own."""

import os
import subprocess
import sys

import pytest

from esvit_jax import __main__ as command_line


def esvit(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "esvit_jax", *arguments],
        env={k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_commands():
    asked, unknown = esvit("--help"), esvit("fly")
    assert asked.returncode == 0 and "train" in asked.stdout
    assert unknown.returncode == 2 and unknown.stderr.startswith("esvit: 'fly' is no command.")
    wrong = esvit("train", "--config=/nowhere.py")
    assert wrong.returncode == 2 and len(wrong.stderr.splitlines()) == 1
    assert "/nowhere.py" in wrong.stderr


@pytest.mark.parametrize(
    ("words", "tunables", "restarts"),
    [
        (["python", "-m", "esvit_jax", "knn", "--workdir=x y"], None, True),
        (["python", "/bin/esvit", "knn", "--workdir=x y"], None, True),
        (["python", "-m", "esvit_jax", "knn", "--workdir=x y"], "", False),
        (["python", "-m", "ipykernel_launcher", "-f", "connection.json"], None, False),
    ],
)
def test_restarts_once_for_huge_pages(monkeypatch, words, tunables, restarts):
    started = []
    monkeypatch.setattr(os, "execv", lambda *arguments: started.append(arguments))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(sys, "orig_argv", words)
    monkeypatch.setattr(sys, "argv", ["esvit", "knn", "--workdir=x y"])
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if tunables is not None:
        monkeypatch.setenv("GLIBC_TUNABLES", tunables)
    for _ in range(2):
        command_line.restart_with_huge_pages()
    assert started == [(sys.executable, [sys.executable, *words[1:]])] * restarts
    assert os.environ.get("GLIBC_TUNABLES") == ("glibc.malloc.hugetlb=1" if restarts else tunables)
