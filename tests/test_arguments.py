"""Flags: what is wrong with them in one line, paths, files that cannot be written."""

import shutil
import subprocess

import pytest
import tiny

from esvit_jax.__main__ import COMMANDS
from esvit_jax.commands import completion
from esvit_jax.commands.arguments import (
    ConfigParser,
    Parser,
    check_folder,
    check_writable,
    path,
    positive,
)
from esvit_jax.errors import UserError


def parser():
    made = Parser("knn", "Classifies.")
    made.add_argument("--workdir", required=True, type=path)
    made.add_argument("--step", type=int)
    made.add_argument("--batch_size", type=positive)
    made.add_argument("--key", choices=("teacher", "student"))
    return made


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ([], "the following arguments are required: --workdir; esvit knn --help lists the flags"),
        (["--workdir=x", "--stpe=3"], "--stpe is no flag; did you mean --step?"),
        (["--workdir=x", "--stpe", "3"], "--stpe is no flag; did you mean --step?"),
        (["--workdir=x", "--zzz=3"], "--zzz is no flag; esvit knn --help lists the flags"),
        (["--workdir=x", "--work=y"], "--work is no flag; did you mean --workdir?"),
        (["x"], "the following arguments are required: --workdir; .*"),
        (["--workdir=x", "y"], "'y' is no flag; flags are written --name=value"),
        (["--workdir="], "--workdir: it is empty; name a file or folder"),
        (["--workdir=x", "--step=a"], "--step: invalid int value: 'a'"),
        (["--workdir=x", "--batch_size=0"], "--batch_size: '0' is no whole number from 1 up"),
        (["--workdir=x", "--batch_size=²"], "--batch_size: '²' is no whole number from 1 up"),
        (["--workdir=x", "--key=both"], r"--key: invalid choice: 'both' \(choose from .*"),
    ],
)
def test_wrong_flags_are_one_line(argv, line):
    with pytest.raises(UserError, match=f"^{line.replace('?', '[?]')}$"):
        parser().parse_args(argv)


def test_paths(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    assert path("~/runs") == "/home/ada/runs"
    assert path("gs://bucket/~x") == "gs://bucket/~x"
    assert parser().parse_args(["--workdir=~/a b"]).workdir == "/home/ada/a b"


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_a_config_beside_flags(capsys):
    made = ConfigParser("train", "Trains.")
    made.add_argument("--workdir", required=True)
    config, arguments = made.parse(
        [f"--config={tiny.__file__}", "--workdir=x", "--config.total_steps=3"]
    )
    assert (config.total_steps, config.batch_size, arguments.workdir) == (3, 8, "x")
    with pytest.raises(SystemExit):
        made.parse(["--workdir=x", "-h"])
    assert "--config.field=value" in capsys.readouterr().out


def test_check_writable(tmp_path):
    check_writable(str(tmp_path / "a.json"), "--out")
    assert not list(tmp_path.iterdir())
    file = tmp_path / "there.json"
    file.write_text("kept")
    check_writable(str(file), "--out")
    assert file.read_text() == "kept"
    check_writable("gs://bucket/x.json", "--out")
    for bad, why in (
        (tmp_path / "missing" / "a.json", f"there is no folder {tmp_path / 'missing'}"),
        (file / "a.json", f"there is no folder {file}"),
        (tmp_path, "it cannot be written: Is a directory"),
        (tmp_path / ("x" * 300), "it cannot be written: File name too long"),
    ):
        with pytest.raises(UserError) as caught:
            check_writable(str(bad), "--out")
        assert str(caught.value).startswith(f"--out={bad}: {why}")


HELP = """\
usage: esvit train [-h] --workdir WORKDIR {one,two}

positional arguments:
  {one,two}          which

options:
  -h, --help         show this help
  --workdir WORKDIR  where; see --other X
  --key {a,b}        whose
  --json             print JSON

--config=FILE[:arguments] and --config.field=value describe the run.
"""


def words(monkeypatch):
    class Command:
        @staticmethod
        def main(argv):
            assert argv == ["--help"]
            print(HELP)
            raise SystemExit(0)

    monkeypatch.setattr(completion.importlib, "import_module", lambda name: Command)
    return {name: completion.words_of(name) for name in ("train", "knn")}


def test_words_of_a_command(monkeypatch):
    assert words(monkeypatch)["train"] == [
        "--help", "--workdir=", "--key=", "--json", "one", "two", "--config=",
    ]  # fmt: skip


def test_completion_in_bash(monkeypatch, tmp_path):
    script = completion.script(
        "bash", words(monkeypatch), ["--config.seed=", "--config.data.name="]
    )
    ask = """
    compopt() { echo "compopt $*"; }
    try() {
        COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _esvit esvit "${@: -1}"; echo "${COMPREPLY[*]}"
    }
    try esvit tr; try esvit train --config.d; try esvit train --j; try esvit train --workdir = x
    try esvit fly --
    """
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("there is no bash")
    said = subprocess.run([bash, "-c", script + ask], capture_output=True, text=True, check=True)
    assert said.stderr == ""
    assert said.stdout.splitlines() == [
        "train", "compopt -o nospace", "--config.data.name=", "--json", "", "",
    ]  # fmt: skip


def test_completion_scripts_name_everything(monkeypatch):
    fields = ["--config.seed="]
    zsh = completion.script("zsh", words(monkeypatch), fields)
    assert "compadd -- train knn" in zsh and "compdef _esvit esvit" in zsh
    assert "train) own=(--help --workdir= --key= --json one two --config= $fields) ;;" in zsh
    fish = completion.fish(words(monkeypatch), fields).splitlines()
    knn = "complete -c esvit -n '__fish_seen_subcommand_from knn'"
    assert f"complete -c esvit -n __fish_use_subcommand -f -a knn -d '{COMMANDS['knn'][1]}'" in fish
    for end in ("-l workdir -r", "-l json", "-f -a one", "-l config.seed -r"):
        assert f"{knn} {end}" in fish


def test_a_folder_is_tried_and_not_left_behind(tmp_path):
    check_folder(str(tmp_path / "a" / "b"), "--out")
    check_folder(str(tmp_path), "--out")
    check_folder("gs://bucket/x", "--out")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("kept")
    for bad in (tmp_path / "file", tmp_path / "file" / "below", "/proc/x/y"):
        with pytest.raises(UserError, match=f"^--out={bad}: no file can be written there: "):
            check_folder(str(bad), "--out")
    assert (tmp_path / "file").read_text() == "kept"
