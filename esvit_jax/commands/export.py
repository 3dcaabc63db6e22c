"""`esvit export`: write a backbone for other libraries."""

import argparse
import sys

from esvit_jax.errors import renamed
from esvit_jax.interop import export as export_module
from esvit_jax.interop.export import export
from esvit_jax.interop.formats import FORMATS


def main(argv: list[str]) -> None:
    """`esvit export`."""
    parser = argparse.ArgumentParser(prog="esvit export", description=export_module.__doc__)
    parser.add_argument("--workdir", required=True, help="a run or a converted checkpoint")
    parser.add_argument("--to", required=True, metavar="DIR", help="the folder to make")
    parser.add_argument("--format", required=True, choices=FORMATS, help="what reads it")
    parser.add_argument(
        "--key", choices=("teacher", "student"), help="whose weights (default: as in evaluation)"
    )
    parser.add_argument(
        "--image_size", type=int, help="pixels along a side of its images (default: as evaluated)"
    )
    parser.add_argument("--step", type=int, help="of the checkpoint (default: the newest)")
    arguments = parser.parse_args(argv)
    flags = {
        "workdir": "--workdir", "directory": "--to", "format": "--format", "key": "--key",
        "image_size": "--image_size", "step": "--step",
    }  # fmt: skip
    with renamed(**flags):
        errors = export(
            arguments.workdir, arguments.to, format=arguments.format, key=arguments.key,
            image_size=arguments.image_size, step=arguments.step,
            report=lambda message: print(message, file=sys.stderr, flush=True),
        )  # fmt: skip
    for reader, error in errors.items():
        print(f"features computed by {reader} differ by {error:.1e}")
    print(f"written: {arguments.to}")
