"""The command line: `esvit COMMAND …`, or `python -m esvit_jax COMMAND …`."""

import difflib
import importlib
import importlib.metadata
import io
import os
import platform
import sys

from esvit_jax import __version__
from esvit_jax.errors import INTERRUPTED, USER_ERROR, RunError, Stalled, UserError, exit_status

COMMANDS = {
    "train": ("esvit_jax.commands.train", "train a backbone, or go on with an interrupted run"),
    "knn": ("esvit_jax.commands.knn", "classify by nearest neighbours in feature space"),
    "linear": ("esvit_jax.commands.linear", "train linear classifiers on a frozen backbone"),
    "fewshot": ("esvit_jax.commands.fewshot", "classify with few labels"),
    "transfer": ("esvit_jax.commands.transfer", "classify many data sets, one table"),
    "dense": ("esvit_jax.commands.dense", "tell what each pixel is, or how far"),
    "finetune": ("esvit_jax.commands.finetune", "train a backbone and a classifier on labels"),
    "correspond": (
        "esvit_jax.commands.correspond",
        "see whether regions find themselves again in the mirror image",
    ),
    "attention": ("esvit_jax.commands.attention", "draw where a backbone looks"),
    "neighbours": ("esvit_jax.commands.neighbours", "draw the images most like some image"),
    "map": ("esvit_jax.commands.map", "draw all images as points, like ones close together"),
    "report": ("esvit_jax.commands.report", "put all that is known of a run on one page"),
    "embed": ("esvit_jax.commands.embed", "write the features of every image to a file"),
    "convert": ("esvit_jax.commands.convert", "turn a published checkpoint into one of ours"),
    "export": ("esvit_jax.commands.export", "write a backbone for other libraries"),
    "config": ("esvit_jax.commands.config", "print a config, and the numbers of its run"),
    "doctor": ("esvit_jax.commands.doctor", "check whether this machine can do a run"),
    "bench": ("esvit_jax.commands.bench", "time the training step on this machine"),
    "plan": ("esvit_jax.commands.plan", "say what a run needs on a TPU that is not here"),
    "replay-bad-step": ("esvit_jax.commands.replay_bad_step", "show where a run began to diverge"),
    "completion": ("esvit_jax.commands.completion", "print what completes commands in a shell"),
}
NOBODY_READS = 141  # as a shell counts: 128 and the number of SIGPIPE


def restart_with_huge_pages() -> None:
    """Starts this process again with a malloc that asks for huge pages; glibc reads that once.

    XLA's CPU backend gets the memory of every step anew. In pages of 4 KiB, half a million of them
    for Swin-T, a step takes a fifth longer, and up to three tenths in the quickstart. Who sets
    GLIBC_TUNABLES, to nothing for instance, is left alone, and so is a process that runs more than
    this command (a notebook).
    """
    alone = sys.orig_argv[1 - len(sys.argv) :] == sys.argv[1:]
    if sys.platform == "linux" and alone and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def main() -> int:
    """Runs the command that the arguments name; returns the exit status."""
    restart_with_huge_pages()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    name, *argv = sys.argv[1:] or ["--help"]
    try:
        try:
            return run(name, argv)
        finally:
            sys.stdout.flush()  # here one can still catch that nobody reads it
    except BrokenPipeError:  # `esvit … | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NOBODY_READS
    except KeyboardInterrupt:
        complain(f"esvit {name}", "interrupted")
        return INTERRUPTED


def run(name: str, argv: list[str]) -> int:
    """Runs one command; returns the exit status. Bugs keep their traceback."""
    if name in ("-h", "--help"):
        print_help()
        return 0
    if name in ("-V", "--version"):
        versions = f"jax {importlib.metadata.version('jax')}, Python {platform.python_version()}"
        print(f"esvit {__version__} ({versions})")
        return 0
    if name not in COMMANDS:
        similar = difflib.get_close_matches(name, COMMANDS, n=1)
        advice = f"did you mean {similar[0]}?" if similar else f"there are {', '.join(COMMANDS)}"
        complain("esvit", f"{name!r} is no command; {advice}")
        return USER_ERROR
    try:
        importlib.import_module(COMMANDS[name][0]).main(argv)
    except (UserError, RunError) as error:
        complain(f"esvit {name}", str(error))
        if isinstance(error, Stalled):
            sys.stdout.flush()
            os._exit(exit_status(error))
        return exit_status(error)
    return 0


def print_help() -> None:
    """Prints the commands."""
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True)
    console.print("usage: esvit COMMAND …", highlight=False)
    width = max(map(len, COMMANDS))
    for key, (_, about) in COMMANDS.items():
        console.print(Text.assemble("  ", (key.ljust(width), "bold"), "  ", about))
    console.print("esvit COMMAND --help lists its flags; esvit --version", highlight=False)


def complain(who: str, message: str) -> None:
    """Says on standard error, in one line, what is wrong."""
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, soft_wrap=True).print(Text.assemble((f"{who}: ", "bold red"), message))


if __name__ == "__main__":
    sys.exit(main())
