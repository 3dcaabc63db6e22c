"""Shape checks, virtual devices and a shared compilation cache for every test."""

import gc
import os
import tempfile

# Before jax is imported. Compilation is most of what tests take: LLVM may do without its
# expensive passes, and gets a program in one piece; pieces are for cores that are idle. XLA's
# newer fusion emitters make three times the work of it. On a busy machine a device may come late to
# a collective: XLA would abort after 40 s. Four devices, so that layouts can be compared. Processes
# that tests start inherit the cache, and compile what was compiled before only once: small programs
# too, of which there are hundreds.
QUICK_COMPILE = (
    "--xla_llvm_disable_expensive_passes=true --xla_backend_optimization_level=0 "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1 "
    "--xla_cpu_collective_call_terminate_timeout_seconds=600"
)
os.environ["XLA_FLAGS"] = f"{QUICK_COMPILE} --xla_force_host_platform_device_count=4"
os.environ["JAX_PLATFORMS"] = "cpu"
# Mixed dtypes are an error: what is promoted is promoted in words.
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    cache = tempfile.TemporaryDirectory(prefix="jax_cache")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook("esvit_jax", "beartype.beartype")

import pytest  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def _few_programs():
    """Gives compiled programs back between files: a process may have 65,530 pieces of memory.

    Each program has a few; where one more cannot be had, XLA dies of it.
    """
    yield
    with open("/proc/self/maps") as maps:
        pieces = sum(1 for _ in maps)
    if pieces > 15_000:
        import jax

        jax.clear_caches()
        gc.collect()


@pytest.fixture(name="tiny_config")
def _tiny_config():
    import tiny

    return tiny.tiny_config()


@pytest.fixture(name="known_size")
def _known_size(monkeypatch):
    """Runs do not trace their step for what it needs, which takes as long as for the compiler."""
    from esvit_jax.planning.estimate import StepCost

    monkeypatch.setattr("esvit_jax.preflight.step_cost", lambda *_: StepCost(1, 1))


@pytest.fixture(scope="session", name="server")
def _server():
    bucket = pytest.importorskip("bucket")
    server = bucket.Server()
    os.environ.update(server.environment)
    yield server
    server.stop()


@pytest.fixture(name="remote")
def _remote(server, tmp_path):
    """A folder in a bucket that nobody else uses."""
    from etils import epath

    from esvit_jax import buckets

    buckets.make_ready()
    return epath.Path("gs://bucket") / "/".join(tmp_path.parts[-2:])
