"""`esvit train`: train a backbone, or go on with an interrupted run."""

from esvit_jax.commands.arguments import ConfigParser, path, quiet_libraries
from esvit_jax.errors import renamed


def main(argv: list[str]) -> None:
    """`esvit train`."""
    parser = ConfigParser("train", "Trains a backbone, or goes on with a run that was interrupted.")
    parser.add_argument("--workdir", required=True, type=path, help="where the run is kept")
    parser.add_argument(
        "--distributed", action="store_true", help="connect the processes of several hosts first"
    )
    config, arguments = parser.parse(argv)

    import jax
    from rich.console import Console

    from esvit_jax import parallel
    from esvit_jax.analyze.summary import summarize
    from esvit_jax.loop import train

    quiet_libraries()
    if arguments.distributed:
        parallel.start_distributed()
    with renamed(workdir="--workdir"):
        result = train(config, arguments.workdir)
    if jax.process_index() == 0:
        summarize(config, result.workdir, Console())
