"""`esvit export`: write a backbone for other libraries."""

import sys

from esvit_jax.commands.arguments import (
    Parser,
    add_key,
    add_network,
    path,
    positive,
    quiet_libraries,
)
from esvit_jax.errors import renamed


def main(argv: list[str]) -> None:
    """`esvit export`."""
    parser = Parser("export", "Writes a backbone for other libraries.")
    add_network(parser)
    add_key(parser)
    parser.add_argument("--to", required=True, type=path, metavar="DIR", help="the folder to make")
    # Not as choices, which would have to be imported: `export` names them where there is no such.
    parser.add_argument(
        "--format", required=True, help="what reads it: huggingface, timm, esvit or stablehlo"
    )
    parser.add_argument(
        "--image_size", type=positive,
        help="pixels along a side of its images (default: as evaluated)",
    )  # fmt: skip
    arguments = parser.parse_args(argv)

    from esvit_jax.interop.export import export

    quiet_libraries()
    flags = {
        "workdir": "--workdir", "directory": "--to", "format": "--format", "key": "--key",
        "image_size": "--image_size", "step": "--step",
    }  # fmt: skip
    with renamed(**flags):
        checks = export(
            arguments.workdir, arguments.to, format=arguments.format, key=arguments.key,
            image_size=arguments.image_size, step=arguments.step, strict=arguments.strict,
            report=lambda message: print(message, file=sys.stderr, flush=True),
        )  # fmt: skip
    for reader, error in checks.errors.items():
        print(f"features computed by {reader} differ by {error:.1e}")
    for line in checks.unchecked:
        print(line)
    print(f"written: {arguments.to}")
