"""Tables for docs/measurements.md of what launch/measure_gpu.sh left in a folder.

python -m esvit_jax.bench.report FOLDER

For a measurement NAME there is NAME.json, the result of `esvit bench --json`, NAME.log, what it
said, and NAME.status, its exit status; NAME is BATCH-DTYPE-WHO, such as 32-bfloat16-torch.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from esvit_jax.errors import USER_ERROR, UserError
from esvit_jax.runlog.writer import read_metrics

NOT_YET = "not yet measured"
HEADINGS = (
    "dtype", "images", "ours, ms", "images/s", "GiB", "of the peak", "PyTorch, ms", "GiB",
    "ours / PyTorch", "compiled, ms", "GiB", "ours / compiled",
)  # fmt: skip
# What a log says where memory did not suffice: XLA, PyTorch.
OUT_OF_MEMORY = re.compile("RESOURCE_EXHAUSTED|OutOfMemoryError|out of memory")
STATUSES = {"124": "no time", "not-tried": "not tried"}  # 124 is that of timeout(1)


def report(folder: Path) -> str:
    """Markdown: a line of what measured it, a table of steps, a table of the training.

    Raises:
      UserError: there is nothing in the folder, or it is not all of one machine.
    """
    names = {path.stem for path in folder.glob("*-*-*.status")}
    metrics = folder / "train" / "metrics.jsonl"
    if not (folder / "where.json").exists() or not (names or metrics.exists()):
        message = "it has no measurements; launch/measure_gpu.sh makes some"
        raise UserError(message, argument="folder", value=str(folder))
    where = json.loads((folder / "where.json").read_text())["where"]
    blocks = [described(where)]
    if names:
        blocks.append(steps_table(folder, names, where))
    if metrics.exists():
        blocks.append(training_table(read_metrics(metrics)))
    return "\n\n".join(blocks)


def described(where: dict[str, Any]) -> str:
    """Device, date and versions on one line."""
    versions = (f"{name} {version}" for name, version in where["versions"].items())
    return f"({where['device']}, {where['date']}, {', '.join(versions)})"


def steps_table(folder: Path, names: set[str], where: dict[str, Any]) -> str:
    """A row for each dtype and batch that was tried."""
    kinds = {tuple(name.split("-")[:2]) for name in names}
    rows = [
        [dtype, batch, *cells(folder, f"{batch}-{dtype}", where)]
        for batch, dtype in sorted(kinds, key=lambda kind: (kind[1], int(kind[0])))
    ]
    return table(HEADINGS, rows)


def cells(folder: Path, name: str, where: dict[str, Any]) -> Iterator[str]:
    """The columns of HEADINGS after the first two; what is missing says why."""
    result = outcome(folder, f"{name}-ours", where)
    ours = result if isinstance(result, str) else result["step"]
    if isinstance(ours, str):
        yield from (ours, "", "", "")
    else:
        yield f"{1e3 * ours['step'][0]:.1f}"
        yield f"{ours['images_per_second']:.0f}"
        yield gibibytes(ours["peak_bytes"])
        yield "" if ours["mfu"] is None else f"{ours['mfu']:.1%}"
    for who in ("torch", "torch-compiled"):
        result = outcome(folder, f"{name}-{who}", where)
        peer = result if isinstance(result, str) else result["peer_alone"]
        if isinstance(peer, str):
            yield from (peer, "", "")
            continue
        yield f"{1e3 * peer['step'][0]:.1f}"
        yield gibibytes(peer["peak_bytes"])
        yield "" if isinstance(ours, str) else f"{ours['step'][0] / peer['step'][0]:.2f}"


def outcome(folder: Path, name: str, where: dict[str, Any]) -> dict[str, Any] | str:
    """The result of a measurement, or in a few words why there is none."""
    path = folder / f"{name}.json"
    if path.exists():
        result = json.loads(path.read_text())
        for what in ("device", "versions"):
            if result["where"][what] != where[what]:
                message = f"{path.name} is of another machine; give each a folder of its own"
                raise UserError(message, argument="folder", value=str(folder))
        return result
    log, status = folder / f"{name}.log", folder / f"{name}.status"
    if not status.exists():
        return NOT_YET
    if log.exists() and OUT_OF_MEMORY.search(log.read_text(errors="replace")):
        return "out of memory"
    return STATUSES.get(status.read_text().strip(), "failed")


def training_table(metrics: list[dict[str, Any]]) -> str:
    """The pace of a training, and what k-NN said of it at every evaluation."""
    paces = [line["img_per_s"] for line in metrics if "img_per_s" in line]
    waits = [line["data_wait_share"] for line in metrics if "data_wait_share" in line]
    blocks = []
    if paces:
        blocks.append(
            f"{max(line['step'] for line in metrics):,} steps at {statistics.median(paces):.0f} "
            f"images/s, of which it waited for data {statistics.median(waits):.1%} (medians)."
        )
    evaluations: list[tuple[str, dict[str, float]]] = []
    for line in metrics:
        for prefix, subject in (("raw_pixels/", "raw pixels"), ("", f"step {line['step']:,}")):
            start = f"{prefix}knn/top1/"
            if values := {k.removeprefix(start): x for k, x in line.items() if k.startswith(start)}:
                evaluations.append((subject, values))
    if evaluations:
        neighbours = list(evaluations[0][1])
        rows = [[subject, *(f"{x[k]:.1f}" for k in neighbours)] for subject, x in evaluations]
        headings = ("k-NN top-1, %", *(f"k = {k}" for k in neighbours))
        blocks.append(table(headings, rows))
    return "\n\n".join(blocks)


def gibibytes(count: int | None) -> str:
    """Bytes of a device; nothing where it does not say."""
    return "" if count is None else f"{count / 2**30:.1f}"


def table(headings: tuple[str, ...], rows: list[list[str]]) -> str:
    """Markdown; all columns but the first are numbers."""
    lines = [headings, ("---", *["---:"] * (len(headings) - 1)), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    """Prints the report of a folder."""
    parser = argparse.ArgumentParser(description="Markdown of a folder of measurements.")
    parser.add_argument("folder", type=Path, help="that launch/measure_gpu.sh was given")
    try:
        print(report(parser.parse_args().folder))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(USER_ERROR)


if __name__ == "__main__":
    main()
