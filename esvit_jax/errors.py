"""What goes wrong in words: a user's mistakes, and what became of a run; and exit statuses.

A library function names its own argument in an error. Whoever took that argument from a config or
a command line catches the error with `renamed` and gives it the name that the user knows.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Exit statuses of the command line; 0 is success, and 1 is left to Python's own tracebacks.
BUG = 1
USER_ERROR = 2
RUN_ERROR = 3
INTERRUPTED = 130  # as a shell counts: 128 and the number of SIGINT


class UserError(ValueError):
    """Wrong input: one line that names the argument, field or file, the value, and what would do.

    Args:
      message: what is wrong and what would do; without an argument it is the whole line.
      argument: name of the argument, field or flag.
      value: what it was given.
    """

    def __init__(self, message: str, *, argument: str = "", value: Any = None):
        self.message, self.argument, self.value = message, argument, value
        line = message
        if argument.startswith("--"):
            typed = ",".join(map(str, value)) if isinstance(value, tuple) else value
            line = f"{argument}={typed}: {message}"
        elif argument:
            line = f"{argument} = {value!r}: {message}"
        super().__init__(line)


class RunError(RuntimeError):
    """What happened to a run that was asked for correctly: it diverged, an export disagrees."""


def exit_status(error: BaseException) -> int:
    """That of a command which ends with an error.

    >>> exit_status(RunError("it diverged")), exit_status(KeyError())
    (3, 1)
    """
    if isinstance(error, UserError):
        return USER_ERROR
    if isinstance(error, RunError):
        return RUN_ERROR
    return INTERRUPTED if isinstance(error, KeyboardInterrupt) else BUG


class Stalled(RunError):
    """Something did not come within the time that it was given; a thread still waits for it.

    An ordinary end of the process would wait for that thread: `os._exit` does not.
    """


class DiskFull(RunError):
    """A run could not write what it had to, as there is no room left."""


@contextmanager
def full_disk_in_words() -> Iterator[None]:
    """Within the block, an operating system's "no space left" is a DiskFull.

    Raises:
      DiskFull: the first of them, as what writes last on the way out fails once more.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error.__context__, DiskFull):
            raise error.__context__ from error
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f"{error.filename}: " if error.filename else ""
        raise DiskFull(
            f"{where}{error.strerror}; make room, and start it again to go on from the newest "
            "checkpoint"
        ) from error


@contextmanager
def renamed(**names: str) -> Iterator[None]:
    """Gives arguments in a UserError the names by which the user set them.

    >>> with renamed(name="config.data.name"):
    ...     raise UserError("there is no such folder", argument="name", value="folder:x")
    Traceback (most recent call last):
    ...
    esvit_jax.errors.UserError: config.data.name = 'folder:x': there is no such folder
    """
    try:
        yield
    except UserError as error:
        if error.argument not in names:
            raise
        raise UserError(error.message, argument=names[error.argument], value=error.value) from error
