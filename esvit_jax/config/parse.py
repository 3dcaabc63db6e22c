"""Configs by name, from files, and from the command line."""

import inspect
import os
import traceback
from pathlib import Path

from esvit_jax.config.fields import FIELDS, ConfigDict, require_all_fields, set_field
from esvit_jax.errors import UserError, renamed


def parse_config(argv: list[str]) -> tuple[ConfigDict, list[str]]:
    """Reads --config=NAME[:arguments] and --config.field=value, and returns what is left.

    Args:
      argv: of a command line; "--config quickstart" will do as well as "--config=quickstart".

    Raises:
      UserError: no config or one that cannot be loaded, an unknown field, a value that a field
        may not hold.
    """
    source, overrides, rest = "", [], []
    waiting = list(reversed(argv))
    while waiting:
        argument = waiting.pop()
        flag, equals, value = argument.partition("=")
        field = flag.removeprefix("--config.")
        if flag != "--config" and field == flag:
            rest.append(argument)
            continue
        if not equals:
            if field in FIELDS and FIELDS[field].rule.type is bool:
                value = "true"
            elif waiting and not waiting[-1].startswith("--"):
                value = waiting.pop()
            else:
                raise UserError(f"{flag} needs a value: {flag}=…")
        if flag == "--config":
            source = value
        else:
            overrides.append((field, value))
    if not source:
        raise UserError(f"--config is missing; give {_wanted()}, such as --config=quickstart")
    with renamed(source="--config"):
        config = load_config(source)
    for field, value in overrides:
        set_field(config, field, FIELDS[field].rule.read(value) if field in FIELDS else value)
    return config, rest


def load_config(source: str) -> ConfigDict:
    """The config that `get_config` of a file returns.

    Args:
      source: a .py file, or the name of one of those that came with the package; arguments for
        its `get_config` may follow after a colon ("esvit_swin:variant=base,window=14").

    Raises:
      UserError: there is no such file, or it fails; names the file, the line and what went wrong.
    """
    name, colon, arguments = source.partition(":")
    try:
        path = _find(name)
        config = _call_get_config(path, [arguments] if colon else [])
        if not isinstance(config, ConfigDict):
            raise UserError(
                f"its get_config returns {_kind(config)}, not a config of default_config()"
            )
        require_all_fields(config)
    except UserError as error:
        raise UserError(str(error), argument="source", value=source) from error
    config.lock()
    return config


def config_arguments(
    text: str, **choices: tuple[str | int | bool, ...]
) -> dict[str, str | int | bool]:
    """Reads the arguments of a config file: "variant=base,window=14".

    >>> config_arguments("window=14", variant=("tiny", "base"), window=(7, 14))
    {'variant': 'tiny', 'window': 14}

    Args:
      text: what follows the colon.
      **choices: what each argument may be; the first is the default.

    Returns:
      One of the choices for each argument.

    Raises:
      UserError: names the argument and what it may be.
    """
    given = {name: values[0] for name, values in choices.items()}
    for item in filter(None, text.split(",")):
        name, _, value = item.partition("=")
        if name not in choices:
            raise UserError(f"there is no argument {name!r}; there is {', '.join(choices)}")
        by_text = {str(choice).lower(): choice for choice in choices[name]}
        if value.lower() not in by_text:
            raise UserError(f"it must be one of {', '.join(by_text)}", argument=name, value=value)
        given[name] = by_text[value.lower()]
    return given


def _call_get_config(path: Path, arguments: list[str]) -> object:
    """Runs the file, then its function."""
    variables: dict[str, object] = {"__name__": path.stem, "__file__": str(path)}
    try:
        exec(compile(path.read_bytes(), str(path), "exec", dont_inherit=True), variables)
        get_config = variables.get("get_config")
        if not callable(get_config):
            raise UserError("it has no function get_config")
        try:
            inspect.signature(get_config).bind(*arguments)
        except TypeError as error:
            what = "takes no arguments" if arguments else "needs arguments, after a colon"
            raise UserError(f"its get_config {what}") from error
        return get_config(*arguments)
    except UserError:
        raise
    except Exception as error:  # whatever the file does
        raise UserError(_place_and_reason(path, error)) from error


def _place_and_reason(path: Path, error: Exception) -> str:
    """The line of a config file where something went wrong, and what."""
    if isinstance(error, SyntaxError) and error.lineno:
        other = "" if error.filename == str(path) else f"{error.filename}, "
        return f"{other}line {error.lineno}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    line = f"line {lines[-1]}: " if lines else ""
    return line + " ".join(traceback.format_exception_only(error)[0].split())


def _kind(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def _folder() -> Path:
    """Where the configs that came with the package are: in it, or beside it in a checkout."""
    package = Path(__file__).parent.parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def _wanted() -> str:
    return f"a .py file or one of {', '.join(sorted(p.stem for p in _folder().glob('*.py')))}"


def _find(name: str) -> Path:
    """The file that is meant by a name or a path."""
    known = _folder() / f"{name}.py"
    if os.path.basename(name) == name and os.path.isfile(known):
        return known
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        raise UserError(f"it is a folder; give {_wanted()}")
    if not os.path.isfile(path):
        raise UserError(f"there is no such file; give {_wanted()}")
    if not path.endswith(".py"):
        raise UserError(f"it is no Python file; give {_wanted()}")
    return Path(path)
