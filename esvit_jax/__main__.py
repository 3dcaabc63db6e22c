"""The command line: `esvit COMMAND …`, or `python -m esvit_jax COMMAND …`."""

import importlib
import os
import sys

from esvit_jax.errors import UserError

COMMANDS = {
    "train": ("esvit_jax.commands.train", "train a backbone, or go on with an interrupted run"),
    "knn": ("esvit_jax.commands.knn", "classify by nearest neighbours in feature space"),
    "embed": ("esvit_jax.commands.embed", "write the features of every image to a file"),
    "convert": ("esvit_jax.commands.convert", "turn a published checkpoint into one of ours"),
    "export": ("esvit_jax.commands.export", "write a backbone for other libraries"),
    "config": ("esvit_jax.commands.config", "print a config, and the numbers of its run"),
    "bench": ("esvit_jax.commands.bench", "time the training step on this machine"),
    "plan": ("esvit_jax.commands.plan", "say what a run needs on a TPU that is not here"),
}


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
    name, *argv = sys.argv[1:] or ["--help"]
    if name not in COMMANDS:
        known = "\n".join(f"  {key:8} {about}" for key, (_, about) in COMMANDS.items())
        asked = name in ("-h", "--help")
        print(
            f"{'' if asked else f'esvit: {name!r} is no command. '}usage: esvit COMMAND …\n{known}",
            file=sys.stdout if asked else sys.stderr,
        )
        return 0 if asked else 2
    try:
        importlib.import_module(COMMANDS[name][0]).main(argv)
    except UserError as error:
        print(f"esvit {name}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
