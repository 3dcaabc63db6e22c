"""`esvit embed`: write the features of every image to a file."""

import sys
from typing import Any

from esvit_jax.commands.arguments import (
    Parser,
    add_data_dir,
    add_network,
    add_processes,
    check_writable,
    path,
    positive,
    processes,
    quiet_libraries,
)
from esvit_jax.errors import renamed


def main(argv: list[str]) -> None:
    """`esvit embed`."""
    parser = Parser("embed", "Writes the features of every image of a data set.")
    add_network(parser)
    parser.add_argument("--data", help="as config.data.name (default: what the run trained on)")
    add_data_dir(parser)
    parser.add_argument("--split", help="as in TFDS (default: train)")
    parser.add_argument("--out", required=True, type=path, help=".npz or .parquet file to make")
    parser.add_argument("--regions", action="store_true", help="write region features too")
    parser.add_argument("--batch_size", type=positive, help="over the devices of a process")
    add_processes(parser)
    arguments = parser.parse_args(argv)
    with processes(arguments, "embed"):
        run(arguments)


def run(arguments: Any) -> None:
    """Computes; of several processes, each its share, and one makes the file and speaks."""
    import jax

    first = jax.process_index() == 0
    if first:
        check_writable(arguments.out, "--out")

    from esvit_jax.evaluate.embed import embed

    quiet_libraries()
    flags = {name: f"--{name}" for name in ("data", "data_dir", "split", "out", "batch_size")}
    try:
        with renamed(network="--workdir", **flags):
            about = embed(
                arguments.workdir, arguments.data, arguments.out, split=arguments.split,
                data_dir=arguments.data_dir, step=arguments.step, strict=arguments.strict,
                regions=arguments.regions,
                batch_size=arguments.batch_size,
            )  # fmt: skip
    except KeyboardInterrupt:
        print("what is done is kept; the same command goes on from there", file=sys.stderr)
        raise
    if not first:
        return
    if about["unreadable"]:
        print(f"{about['unreadable']} of {about['records']} records could not be read as images")
    print(f"features of {about['images']} images: {arguments.out}")
