"""`esvit convert`: turn a published checkpoint into one of ours."""

import sys

from esvit_jax.commands.arguments import Parser, path, positive, quiet_libraries
from esvit_jax.errors import renamed


def main(argv: list[str]) -> None:
    """`esvit convert`."""
    parser = Parser("convert", "Turns a published checkpoint into one of ours.")
    parser.add_argument(
        "--from", dest="source", required=True, type=path, metavar="FILE",
        help=".pth or .safetensors",
    )  # fmt: skip
    parser.add_argument(
        "--to", required=True, type=path, metavar="DIR", help="the directory to make"
    )
    parser.add_argument(
        "--key", choices=("teacher", "student"), default="teacher",
        help="which network evaluation, exports and config.init_from use (default: teacher)",
    )  # fmt: skip
    parser.add_argument("--window", type=positive, help="resize the bias tables to this window")
    parser.add_argument(
        "--image_size",
        type=positive,
        help="pixels it was trained with, where neither shapes nor a config.json beside it tell",
    )
    arguments = parser.parse_args(argv)

    from esvit_jax.interop.convert import convert

    quiet_libraries()
    flags = {
        "source": "--from", "directory": "--to", "key": "--key", "window_size": "--window",
        "image_size": "--image_size",
    }  # fmt: skip
    with renamed(**flags):
        found = convert(
            arguments.source,
            arguments.to,
            key=arguments.key,
            window_size=arguments.window,
            image_size=arguments.image_size,
            report=lambda message: print(message, file=sys.stderr, flush=True),
        )
    for line in found:
        print(line)
    print(f"written: {arguments.to}")
