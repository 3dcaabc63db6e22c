"""The command line as a process of its own."""

import errno
import os
import subprocess
import sys
import types

import jax
import pytest

import esvit_jax
from esvit_jax import __main__ as command_line
from esvit_jax.errors import RunError, UserError


def start(*arguments, **fields):
    return subprocess.Popen(
        [sys.executable, "-m", "esvit_jax", *arguments],
        env={k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **fields,
    )  # fmt: skip


def esvit(*arguments):
    process = start(*arguments)
    stdout, stderr = process.communicate(timeout=120)
    return process.returncode, stdout, stderr


def run(monkeypatch, capsys, *argv):
    """`main` in this process: exit status, standard output, standard error."""
    monkeypatch.setattr(sys, "argv", ["esvit", *argv])
    monkeypatch.setenv("GLIBC_TUNABLES", "")  # no restart
    status = command_line.main()
    return status, *capsys.readouterr()


def test_help_lists_the_commands():
    status, stdout, stderr = esvit("--help")
    assert (status, stderr) == (0, "")
    lines = stdout.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == list(command_line.COMMANDS)
    assert "\x1b" not in stdout  # colours are for terminals


def test_version(monkeypatch, capsys):
    status, stdout, _ = run(monkeypatch, capsys, "--version")
    assert status == 0
    assert stdout.startswith(f"esvit {esvit_jax.__version__} (jax {jax.__version__}, Python 3.")


@pytest.mark.parametrize(
    ("name", "advice"), [("trian", "did you mean train?"), ("fly", "there are train, knn, ")]
)
def test_unknown_commands(monkeypatch, capsys, name, advice):
    status, stdout, stderr = run(monkeypatch, capsys, name)
    assert (status, stdout) == (2, "")
    assert stderr.startswith(f"esvit: {name!r} is no command; {advice}")
    assert len(stderr.splitlines()) == 1


def raising(error):
    """A command that ends so."""

    def main(argv):
        print("before")
        raise error

    return types.SimpleNamespace(main=main)


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("too few", argument="--k", value=0), 2, "esvit knn: --k=0: too few"),
        (
            RunError("it diverged [bold]" + " x" * 99),
            3,
            "esvit knn: it diverged [bold]" + " x" * 99,
        ),
        (KeyboardInterrupt(), 130, "esvit knn: interrupted"),
    ],
)
def test_exit_statuses(monkeypatch, capsys, error, status, line):
    monkeypatch.setitem(sys.modules, "esvit_jax.commands.knn", raising(error))
    assert run(monkeypatch, capsys, "knn") == (status, "before\n", line + "\n")


def test_bugs_keep_their_traceback(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "esvit_jax.commands.knn", raising(KeyError("bug")))
    with pytest.raises(KeyError, match="bug"):
        run(monkeypatch, capsys, "knn")


def test_wrong_config_is_one_line():
    status, _, stderr = esvit("train", "--config=/nowhere.py", "--workdir=x")
    assert status == 2 and len(stderr.splitlines()) == 1
    assert "/nowhere.py" in stderr


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["completion", "--help"]])
def test_nobody_reads_on(arguments):
    """As with `| head`: silence, whatever a broken pipe does to Python's own output."""
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run(
        [sys.executable, "-m", "esvit_jax", *arguments], stdout=write, stderr=subprocess.PIPE,
        text=True, check=False,
    )  # fmt: skip
    os.close(write)
    assert process.stderr == ""
    assert process.returncode in (0, 1, 141)


def test_a_long_output_that_nobody_reads_on(monkeypatch, capsys):
    monkeypatch.setitem(
        sys.modules, "esvit_jax.commands.knn", raising(BrokenPipeError(errno.EPIPE, "pipe"))
    )
    with monkeypatch.context() as patch:
        closed = []
        patch.setattr(os, "dup2", lambda *files: closed.append(files))
        patch.setattr(sys.stdout, "fileno", lambda: 1, raising=False)
        status, _, stderr = run(patch, capsys, "knn")
    assert (status, stderr) == (141, "") and closed[0][1] == 1


def test_names_that_are_no_text_can_be_printed(tmp_path):
    code = (
        "import sys, types; from esvit_jax import __main__ as m; "
        "m.restart_with_huge_pages = lambda: None; "
        "knn = types.SimpleNamespace(main=lambda argv: print(argv[0])); "
        "sys.modules['esvit_jax.commands.knn'] = knn; sys.exit(m.main())"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, "knn", b"a\xff.jpg"], capture_output=True, check=False
    )
    assert (process.returncode, process.stderr) == (0, b"")
    assert process.stdout == b"a\\udcff.jpg\n"


@pytest.mark.parametrize("command", ["train", "knn", "linear", "finetune", "embed", "completion"])
def test_help_loads_nothing_heavy(command):
    code = (
        "import sys, contextlib, importlib; from esvit_jax.__main__ import COMMANDS\n"
        "with contextlib.suppress(SystemExit): "
        f"importlib.import_module(COMMANDS[{command!r}][0]).main(['--help'])\n"
        "print({'jax', 'numpy', 'tensorflow_datasets', 'orbax'} & set(sys.modules))"
    )
    text = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert text.startswith(f"usage: esvit {command}") and text.splitlines()[-1] == "set()"


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
