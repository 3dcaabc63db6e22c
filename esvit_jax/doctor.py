"""Whether a machine, or a slice of them, can do a run: short checks, each with its own answer.

All processes of a run make all checks together. Each is given a time, so that what hangs is named.
"""

import importlib.metadata
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from esvit_jax import parallel, preflight
from esvit_jax.config import ConfigDict, resolve
from esvit_jax.data.loader import train_batches
from esvit_jax.data.sources import Source, open_source
from esvit_jax.errors import UserError, renamed
from esvit_jax.planning.topology import host_memory
from esvit_jax.recipe import build
from esvit_jax.steps import AXIS

GIB, MIB = 2**30, 2**20
PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "flax", "orbax-checkpoint", "grain")
# What an accelerator looks like to the operating system, and the extra that makes jax use it.
ACCELERATORS = {"/dev/nvidia0": "cuda", "/dev/accel0": "tpu", "/dev/vfio/0": "tpu"}
LIMIT = 60.0  # seconds of one check
READING = 8.0  # seconds of reading the data set
MAX_SKEW = 2.0  # seconds between two clocks


class Finding(NamedTuple):
    """What a check has found.

    Attributes:
      check: its name.
      ok: whether a run can go on with that.
      text: in words, on one line.
      values: what was measured.
      hangs: it has not ended.
    """

    check: str
    ok: bool
    text: str
    values: dict[str, Any]
    hangs: bool = False


Check = Callable[[], tuple[bool, str, dict[str, Any]]]


def examine(workdir: str | None = None, config: ConfigDict | None = None) -> Iterator[Finding]:
    """Makes one check after the other, and yields what each has found.

    Args:
      workdir: of the run, which need not be there yet. None leaves its checks out.
      config: of the run. None leaves its data and what it needs out.
    """
    checks: dict[str, Check] = {"versions": versions, "devices": devices, "all-reduce": all_reduce}
    if config is not None:
        checks["data"] = lambda: data(config)
        checks["memory and disk"] = lambda: room(config, workdir)
    if workdir is not None:
        checks["checkpoint"] = lambda: checkpoint(workdir)
    checks["clocks"] = lambda: clocks(workdir)
    for name, check in checks.items():
        yield within(LIMIT, name, check)


def within(seconds: float, name: str, check: Check) -> Finding:
    """Makes a check; one that fails, or has not ended by then, is red.

    Python cannot stop what hangs: it goes on in a thread that no exit waits for.
    """
    outcome: queue.Queue[Finding] = queue.Queue()

    def run() -> None:
        try:
            outcome.put(Finding(name, *check()))
        except UserError as error:
            outcome.put(Finding(name, False, str(error), {}))
        except Exception as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())
            outcome.put(Finding(name, False, text[:500], {}))

    threading.Thread(target=run, daemon=True).start()
    try:
        return outcome.get(timeout=seconds)
    except queue.Empty:
        return Finding(name, False, f"no answer within {seconds:.0f} s", {}, hangs=True)


def versions() -> tuple[bool, str, dict[str, Any]]:
    """Of Python and of what a run stands on."""
    found = {"Python": ".".join(map(str, sys.version_info[:3]))}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    text = ", ".join(f"{name} {version}" for name, version in found.items())
    if found["jax"] != found["jaxlib"]:
        return False, f"{text}; jax and jaxlib are of two versions: install them anew", found
    return True, text, found


def devices() -> tuple[bool, str, dict[str, Any]]:
    """How many, of what kind and memory; and whether one that is there is not used."""
    first = jax.devices()[0]
    limit = preflight.device_memory()
    size = "" if limit is None else f" of {limit / GIB:.1f} GiB"
    here, processes = jax.device_count(), jax.process_count()
    text = f"{here} × {first.device_kind}{size}"
    if processes > 1:
        text += f", in {processes} processes"
    values = {
        "kind": first.device_kind, "platform": first.platform, "count": here,
        "processes": processes, "memory": limit,
    }  # fmt: skip
    unused = [extra for path, extra in ACCELERATORS.items() if os.path.exists(path)]
    if first.platform == "cpu" and unused:
        text += f", though there is an accelerator: pip install 'esvit_jax[{unused[0]}]'"
        return False, text, values
    return True, text, values


def all_reduce() -> tuple[bool, str, dict[str, Any]]:
    """The sum of an array of every device, on all of them: its value, and how fast it comes."""
    count = jax.device_count()
    size = (4 if jax.default_backend() == "cpu" else 64) * MIB
    ranks = {device.id: float(i + 1) for i, device in enumerate(jax.devices())}
    mine = np.array([ranks[device.id] for device in jax.local_devices()], np.float32)
    arrays = jax.pmap(lambda rank: jax.numpy.full(size // 4, rank))(mine)
    total = parallel.on_all_devices(lambda _, array: jax.lax.psum(array, AXIS), "pmap")
    result, expected = np.asarray(total((), arrays)), count * (count + 1) / 2
    if not (result == expected).all():
        return False, f"{count} devices add up to {result.flat[0]:g}, not {expected:g}", {}
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(total((), arrays))
        seconds.append(time.perf_counter() - start)
    # What each device sends and receives at the least, as NCCL's tests count it.
    bandwidth = 2 * (count - 1) / count * size / sorted(seconds)[2]
    text = f"{count} devices add up, {size // MIB} MiB of each in {1e3 * sorted(seconds)[2]:.1f} ms"
    if count > 1:
        text += f", {bandwidth / 1e9:.1f} GB/s"
    return True, text, {"seconds": sorted(seconds)[2], "bytes": size, "bandwidth": bandwidth}


def data(config: ConfigDict) -> tuple[bool, str, dict[str, Any]]:
    """Records that this process reads and decodes, as training does, a second."""
    source, processes = training_source(config), jax.process_count()
    batches = train_batches(
        source, batch_size=32 * processes, canvas_size=config.data.canvas_size, seed=config.seed,
        start_step=0, num_workers=config.data.num_workers, num_threads=config.data.num_threads,
        max_bad_records=config.data.max_bad_records, process_index=jax.process_index(),
        process_count=processes,
    )  # fmt: skip
    with closing(batches), renamed(max_bad_records="config.data.max_bad_records"):
        for _ in range(4):  # prepared while it started
            next(batches)
        start, count = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - start) < READING:
            count += len(next(batches)["size"])
    rate = count / elapsed
    text = f"{source.name} {source.split}: {len(source):,} records, {rate:,.0f} a second"
    if processes > 1:
        text += " in each process"
    return True, text, {"records": len(source), "records_per_second": rate}


def training_source(config: ConfigDict) -> Source:
    """What the config trains on."""
    fields = config.data
    with renamed(
        name="config.data.name", split="config.data.train_split", data_dir="config.data.data_dir"
    ):
        return open_source(fields.name, fields.train_split, fields.data_dir or None)


def room(config: ConfigDict, workdir: str | None) -> tuple[bool, str, dict[str, Any]]:
    """What the run needs of memory and disk, beside what there is."""
    numbers = resolve(
        config, num_images=len(training_source(config)), num_devices=jax.device_count()
    )
    size = preflight.measure_size(config, numbers, build(config, numbers))
    needed, free = host_bytes(config, size), available_memory()
    values: dict[str, Any] = {
        "step_bytes": size.step_bytes, "device_memory": size.memory, "host_bytes": needed,
        "host_memory": free,
    }  # fmt: skip
    of = "" if size.memory is None else f" of {size.memory / GIB:.1f}"
    text = (
        f"a step needs about {size.step_bytes / GIB:.1f} GiB a device{of}; the host about "
        f"{needed / GIB:.1f} GiB of {free / GIB:.1f}"
    )
    preflight.check_memory(config, size)
    if workdir is not None:
        disk = preflight.measure_disk(config, numbers, size, os.path.expanduser(workdir))
        values |= {"checkpoint_bytes": disk.checkpoint_bytes, "disk_free": disk.free}
        left = "" if disk.free is None else f" of {disk.free / GIB:.1f}"
        text += f"; checkpoints {disk.in_all * disk.checkpoint_bytes / GIB:.1f} GiB{left}"
        preflight.check_disk(config, disk)
    return needed <= free, text, values


def host_bytes(config: ConfigDict, size: preflight.Size) -> int:
    """Memory that a process takes of its host, about: batches under way, a checkpoint's copy."""
    share = config.batch_size // jax.process_count()
    under_way = 8 + 3 * config.data.num_workers
    total = under_way * share * 3 * config.data.canvas_size**2 + size.state_bytes
    if jax.default_backend() == "cpu":
        total += size.step_bytes * jax.local_device_count()
    return total


def available_memory() -> int:
    """Bytes of this machine's memory that nobody needs."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return host_memory()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable:"))


def checkpoint(workdir: str) -> tuple[bool, str, dict[str, Any]]:
    """Saves 16 MiB in the workdir as checkpoints are saved, reads them back, and removes them."""
    root, size = folder_of(workdir), 16 * MIB
    was_there, folder = root.exists(), root / ".doctor"
    values = np.random.default_rng(0).random(size // 4, np.float32)
    tree = parallel.replicate({"x": jax.numpy.asarray(values)}, "shard_map")
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            start = time.perf_counter()
            checkpointer.save(folder, tree, force=True)
            checkpointer.wait_until_finished()
            written = time.perf_counter() - start
            shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
            start = time.perf_counter()
            restored = checkpointer.restore(folder, shapes)
            read = time.perf_counter() - start
        same = np.array_equal(restored["x"].addressable_data(0), values)
    finally:
        multihost_utils.sync_global_devices("doctor has read its checkpoint")
        if jax.process_index() == 0:
            folder.rmtree(missing_ok=True)
            if not was_there and root.exists() and not any(root.iterdir()):
                root.rmdir()
    found = {"bytes": size, "write_seconds": written, "read_seconds": read}
    if not same:
        return False, f"what was saved in {root} came back as something else", found
    text = f"16 MiB in {root} written in {written:.1f} s, read in {read:.1f} s, and the same"
    return True, text, found


def clocks(workdir: str | None) -> tuple[bool, str, dict[str, Any]]:
    """How far the clocks of all processes, and that of the workdir's server, lie apart."""
    multihost_utils.sync_global_devices("doctor looks at the clock")
    now = time.time()
    # In two halves: jax has no float64, and float32 cannot count seconds since 1970.
    halves = np.array([int(now) % 10**6, int(now % 1 * 10**6)], np.int32)
    times = np.asarray(multihost_utils.process_allgather(halves)).reshape(-1, 2) @ [1, 1e-6]
    skew = {"processes": float(np.ptp(times))}
    if workdir is not None:
        root = folder_of(workdir)
        if "://" not in workdir:  # what of it is there
            root = next(path for path in (root, *root.parents) if path.exists())
        file = root / f".doctor-{jax.process_index()}"
        try:
            before = time.time()
            file.write_text("what time is it?")
            after = time.time()
            mtime = file.stat().mtime
        finally:
            file.unlink(missing_ok=True)
        skew["workdir"] = max(before - mtime, mtime - after, 0.0)
    text = ", ".join(f"{name} {seconds:.2f} s apart" for name, seconds in skew.items())
    ok = max(skew.values()) <= MAX_SKEW
    return ok, text if ok else f"{text}: set them by NTP", skew


def folder_of(workdir: str) -> epath.Path:
    """The workdir, absolute where it is local."""
    return epath.Path(workdir) if "://" in workdir else epath.Path(os.path.abspath(workdir))
