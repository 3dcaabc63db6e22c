"""A run of many steps takes no more of the machine at its end than at its beginning."""

from pathlib import Path

import numpy as np
import pytest
from test_loop import losses, start

OVERRIDES = [
    "--config.total_steps=2000",
    "--config.log_every_steps=10",
    "--config.checkpoint_every_steps=50",
    "--config.knn_every_steps=100",
    "--config.data.train_split=train[:400]",
]


def usage(pid: int) -> tuple[float, int, int]:
    """MiB in memory, open files and threads of a process."""
    process = Path("/proc") / str(pid)
    fields = dict(
        line.split(":", 1) for line in (process / "status").read_text().splitlines() if ":" in line
    )
    memory = int(fields["VmRSS"].split()[0]) / 1024
    return memory, len(list((process / "fd").iterdir())), int(fields["Threads"])


@pytest.mark.slow
def test_memory_files_and_threads_stay(tmp_path):
    """With logging, checkpoints and evaluations on; medians of quarters, after the first.

    A save has a thread for a moment, which the median of a quarter may or may not count; one that
    stayed would count at each of the ten saves and five evaluations of a quarter.
    """
    process = start(tmp_path / "run", *OVERRIDES)
    assert process.stdout is not None
    quarters = [[], [], [], []]
    for line in process.stdout:
        step = int(line[5:9]) if line.startswith("step ") and line[9:10] == "/" else 0
        if 0 < step < 2000:
            quarters[4 * step // 2000].append(usage(process.pid))
    assert process.wait(timeout=60) == 0
    assert max(losses(tmp_path / "run")) == 2000
    medians = np.array([np.median(quarter, axis=0) for quarter in quarters])
    print("MiB, files, threads by quarter:", medians.tolist())
    memory, files, threads = medians.T
    assert memory[1:].max() <= 1.02 * memory[1], memory
    assert len(set(files[1:])) == 1 and np.ptp(threads[1:]) <= 1, (files, threads)
