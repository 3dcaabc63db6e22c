"""Compiled programs are kept where they are told to be, and a later start finds them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from esvit_jax import programs
from esvit_jax.runlog.writer import read_metrics

CONFIG = Path(__file__).parent / "tiny.py"


@pytest.fixture(name="no_cache")
def _no_cache():
    """As if JAX_COMPILATION_CACHE_DIR were not set."""
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)
    programs.compilation_cache.reset_cache()


def test_what_is_set_already_is_left_alone(tmp_path):
    before = jax.config.values["jax_compilation_cache_dir"]
    assert before is not None  # conftest.py
    with programs.kept_in(str(tmp_path)):
        assert jax.config.values["jax_compilation_cache_dir"] == before


def test_it_ends_with_the_block(no_cache, tmp_path):
    with programs.kept_in(None):
        assert jax.config.values["jax_compilation_cache_dir"] is None
    for name in ("a", "b"):  # two runs in one process
        with programs.kept_in(str(tmp_path / name)):
            jax.jit(lambda x: x * 2).lower(1.0).compile()
            assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path / name)
        assert jax.config.values["jax_compilation_cache_dir"] is None


@pytest.mark.slow
def test_a_second_start_does_not_compile_again(tmp_path):
    """With a cache of its own in the workdir, in processes of their own."""
    kept, seconds = [], []
    for _ in range(2):
        environment = dict(os.environ) | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        environment["PYTHONPATH"] = f"{CONFIG.parent}:{os.environ.get('PYTHONPATH', '')}"
        del environment["JAX_COMPILATION_CACHE_DIR"]
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)  # the same from the beginning
        subprocess.run(
            [sys.executable, "-m", "esvit_jax", "train", f"--config={CONFIG}",
             f"--workdir={tmp_path}", "--config.total_steps=2"],
            env=environment, check=True,
        )  # fmt: skip
        programs_kept = {path.name for path in (tmp_path / "cache").glob("*-cache")}
        kept.append(programs_kept)
        seconds.append(read_metrics(tmp_path / "metrics.jsonl")[-1]["spent_compile"])
    print(f"compiled in {seconds[0]:.1f} s, then in {seconds[1]:.1f} s")
    assert kept[0] and kept[0] == kept[1]
    assert seconds[1] < seconds[0]
