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
    """With logging, checkpoints and evaluations on; of each quarter of the run, after the first.

    Of memory the median. Of files and threads the least: a save in flight has some for a moment,
    and what a save or an evaluation left behind would be there at every later line.
    """
    process = start(tmp_path / "run", *OVERRIDES)
    assert process.stdout is not None
    quarters = [[], [], [], []]
    with process.stdout as lines:
        for line in lines:
            step = int(line[5:9]) if line.startswith("step ") and line[9:10] == "/" else 0
            if 0 < step < 2000:
                quarters[4 * step // 2000].append(usage(process.pid))
    assert process.wait(timeout=60) == 0
    assert max(losses(tmp_path / "run")) == 2000
    memory = np.array([np.median([seen[0] for seen in quarter]) for quarter in quarters])
    files, threads = (np.array([min(seen[i] for seen in q) for q in quarters]) for i in (1, 2))
    print("MiB, files, threads by quarter:", memory.tolist(), files.tolist(), threads.tolist())
    assert memory[1:].max() <= 1.02 * memory[1], memory
    assert files[1:].max() <= files[1], files
    assert threads[1:].max() <= threads[1], threads
