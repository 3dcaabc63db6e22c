"""`esvit report`: all that is known of a run on one page."""

import os

from esvit_jax.commands.arguments import Parser, check_writable, path, quiet_libraries, whole_number
from esvit_jax.errors import renamed


def main(argv: list[str]) -> None:
    """`esvit report`."""
    parser = Parser(
        "report",
        "Writes one HTML file on a run: what was trained, its curves, a diagnosis, and all that "
        "evaluations have left in the workdir. It loads nothing from elsewhere.",
    )
    parser.add_argument(
        "--workdir", required=True, type=path,
        help="of a run, or a converted or exported checkpoint",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=path, help="HTML file to write (default: report.html in the workdir)"
    )
    parser.add_argument(
        "--images", type=whole_number, default=3, metavar="N",
        help="of the training data whose views are shown (default: 3)",
    )  # fmt: skip
    arguments = parser.parse_args(argv)

    from rich.console import Console

    from esvit_jax.analyze.report import report
    from esvit_jax.runlog.alive import say, signs_of_life

    quiet_libraries()
    console = Console()
    if arguments.out:
        check_writable(arguments.out, "--out")
    with signs_of_life(lambda: "reading what there is", console), renamed(workdir="--workdir"):
        found = report(arguments.workdir, arguments.images)
    out = arguments.out or os.path.join(arguments.workdir, "report.html")
    if not arguments.out:
        check_writable(out, "--out")
    size = found.write(out)
    for finding in found.findings:
        if finding.level in ("bad", "watch"):
            say(console, f"{finding.title}: {finding.what}")
    say(console, f"written to {out}, {size / 1e6:.1f} MB; open it in a browser")
