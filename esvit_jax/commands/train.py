"""`esvit train`: train a backbone, or go on with an interrupted run."""

from esvit_jax.commands.arguments import (
    ConfigParser,
    add_processes,
    add_strict,
    ending_at_once,
    path,
    processes,
    quiet_libraries,
)
from esvit_jax.errors import renamed


def main(argv: list[str]) -> None:
    """`esvit train`."""
    parser = ConfigParser("train", "Trains a backbone, or goes on with a run that was interrupted.")
    parser.add_argument("--workdir", required=True, type=path, help="where the run is kept")
    add_processes(parser)
    add_strict(parser)
    config, arguments = parser.parse(argv)

    import jax
    from rich.console import Console

    from esvit_jax.analyze.summary import summarize
    from esvit_jax.buckets import reaching, waiting
    from esvit_jax.loop import train

    quiet_libraries()
    with ending_at_once("train"), processes(arguments, "train"), renamed(workdir="--workdir"):
        result = train(config, arguments.workdir, strict=arguments.strict)
        if jax.process_index() == 0:
            with reaching(result.workdir), waiting(result.workdir):
                summarize(config, result.workdir, Console())
