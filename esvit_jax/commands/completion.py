"""`esvit completion`: print what completes commands, flags and config fields in a shell.

The script that it prints holds all the words, so that the TAB key starts no Python.
"""

import argparse
import contextlib
import importlib
import io
import re
import shlex

from esvit_jax.__main__ import COMMANDS
from esvit_jax.commands.arguments import Parser
from esvit_jax.config import default_config, flatten

# bash takes `=` for the end of a word: what follows it is completed as the name of a file.
BASH = """\
_esvit() {{
    local words fields="{fields}"
    COMPREPLY=()
    [[ ${{COMP_WORDS[COMP_CWORD]}} == = || ${{COMP_WORDS[COMP_CWORD - 1]}} == = ]] && return
    if [[ $COMP_CWORD == 1 ]]; then
        words="{commands}"
    else
        case ${{COMP_WORDS[1]}} in
{cases}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$2"))
    [[ ${{COMPREPLY[0]-}} == *= ]] && compopt -o nospace
}}
complete -o default -F _esvit esvit
"""
ZSH = """\
_esvit() {{
    local -a own fields=({fields})
    if (( CURRENT == 2 )); then
        compadd -- {commands}
    elif [[ $PREFIX == *=* ]]; then
        compset -P '*='
        _files
    else
        case $words[2] in
{cases}
        esac
        compadd -S '' -- ${{(M)own:#*=}}
        compadd -- ${{own:#*=}}
    fi
}}
compdef _esvit esvit
"""
SHELLS = {
    "bash": 'eval "$(esvit completion bash)" in ~/.bashrc',
    "zsh": 'eval "$(esvit completion zsh)" in ~/.zshrc, after compinit',
    "fish": "esvit completion fish > ~/.config/fish/completions/esvit.fish",
}


def main(argv: list[str]) -> None:
    """`esvit completion`."""
    how = "\n".join(f"  {line}" for line in SHELLS.values())
    parser = Parser(
        "completion", "Prints a script that completes commands, flags and config fields.",
        epilog=f"To use it:\n{how}", formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("shell", choices=tuple(SHELLS), help="that is to run the script")
    shell = parser.parse_args(argv).shell
    fields = [f"--config.{name}=" for name in flatten(default_config())]
    words = {command: words_of(command) for command in COMMANDS}
    print(fish(words, fields) if shell == "fish" else script(shell, words, fields), end="")


def words_of(command: str) -> list[str]:
    """The words of a command, as its --help lists them; flags that take a value end in `=`."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        importlib.import_module(COMMANDS[command][0]).main(["--help"])
    text = printed.getvalue()
    flags = re.findall(r"^  (?:-\w, )?(--\w+)( [A-Z{])?", text, re.MULTILINE)
    words = [f"{name}=" if value else name for name, value in flags]
    for choices in re.findall(r"^  \{([\w,]+)\}", text, re.MULTILINE):  # not of a flag
        words += choices.split(",")
    return [*words, "--config="] if "--config=" in text else words


def script(shell: str, words: dict[str, list[str]], fields: list[str]) -> str:
    """The script of bash or zsh."""
    template, assign = {"bash": (BASH, 'words="{}"'), "zsh": (ZSH, "own=({})")}[shell]
    cases = []
    for command, own in words.items():
        own = [*own, "$fields"] if "--config=" in own else own
        cases.append(f"            {command}) {assign.format(' '.join(own))} ;;")
    return template.format(
        fields=" ".join(fields), commands=" ".join(words), cases="\n".join(cases)
    )


def fish(words: dict[str, list[str]], fields: list[str]) -> str:
    """The script of fish, a line a word."""
    lines = []
    for command, own in words.items():
        about = shlex.quote(COMMANDS[command][1])
        lines.append(f"complete -c esvit -n __fish_use_subcommand -f -a {command} -d {about}")
        seen = f"complete -c esvit -n '__fish_seen_subcommand_from {command}'"
        for word in [*own, *fields] if "--config=" in own else own:
            flag = word.startswith("--")
            value = " -r" if word.endswith("=") else ""
            how = f"-l {word.removeprefix('--').removesuffix('=')}{value}"
            lines.append(f"{seen} {how if flag else f'-f -a {word}'}")
    return "\n".join(lines) + "\n"
