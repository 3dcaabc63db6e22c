"""`esvit train`: train a backbone, or go on with an interrupted run."""

from pathlib import Path

from esvit_jax.commands.arguments import ConfigParser, path, quiet_libraries
from esvit_jax.errors import UserError, renamed


def main(argv: list[str]) -> None:
    """`esvit train`."""
    parser = ConfigParser("train", "Trains a backbone, or goes on with a run that was interrupted.")
    parser.add_argument("--workdir", required=True, type=path, help="where the run is kept")
    parser.add_argument(
        "--distributed", action="store_true", help="connect the processes of several hosts first"
    )
    config, arguments = parser.parse(argv)
    workdir = arguments.workdir
    if "://" in workdir:
        raise UserError(
            "it is remote: mount the bucket as a folder", argument="--workdir", value=workdir
        )

    import jax
    from rich.console import Console

    from esvit_jax import parallel
    from esvit_jax.analyze.summary import draw_figures, knn_summary
    from esvit_jax.loop import train
    from esvit_jax.runlog.writer import read_metrics

    quiet_libraries()
    if arguments.distributed:
        parallel.start_distributed()
    with renamed(workdir="--workdir"):
        train(config, workdir)
    if jax.process_index() != 0:
        return
    if table := knn_summary(workdir):
        Console().print(table)
    if any("loss" in line for line in read_metrics(Path(workdir) / "metrics.jsonl")):
        loss, views = draw_figures(config, workdir)
        print(f"the loss: {loss}\nthe views of one image: {views}")
    else:
        print("no figures yet: there is no line of metrics with a loss")
