"""The folder that a conversion or an export makes: tried first, there whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from esvit_jax.errors import UserError


@contextmanager
def new_folder(directory: str | os.PathLike) -> Iterator[Path]:
    """A folder to write into, which becomes `directory` at the end, if nothing fails.

    It is made before anything is computed, so that a place where nobody can write is noticed then.
    What fails later leaves neither it nor the folders above it that it needed.

    Args:
      directory: to be made; `~` is the home folder.

    Raises:
      UserError: it is there already, is remote, or cannot be made.
    """

    def refusal(message: str) -> UserError:
        return UserError(message, argument="directory", value=os.fspath(directory))

    text = os.fspath(directory)
    if not text:
        raise refusal("give the folder to make")
    if "://" in text:
        raise refusal("make a local folder, then copy it there")
    folder = Path(os.path.abspath(os.path.expanduser(text)))
    with ExitStack() as stack:
        try:
            if os.path.lexists(folder):
                raise refusal("it exists already; remove it or take another name")
            for parent in reversed([p for p in folder.parents if not p.exists()]):
                stack.callback(_remove_if_empty, parent)
            temporary = stack.enter_context(_whole(folder))
        except OSError as error:
            raise refusal(f"it cannot be made: {error.strerror}") from error
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            raise refusal(f"it cannot be made: {error}") from error  # such as "embedded null byte"
        yield temporary


@contextmanager
def _whole(directory: Path) -> Iterator[Path]:
    """A folder beside `directory` that gets its name at the end, if nothing fails."""
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.rename(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()
