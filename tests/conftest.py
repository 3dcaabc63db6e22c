"""Shape checks, virtual devices and a shared compilation cache for every test."""

import os
import tempfile

# Before jax is imported. Compilation is most of what tests take: LLVM may do without its
# expensive passes. Four devices, so that layouts can be compared. Processes that tests start
# inherit the cache, and compile what was compiled before only once.
QUICK_COMPILE = "--xla_llvm_disable_expensive_passes=true --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{QUICK_COMPILE} --xla_force_host_platform_device_count=4"
os.environ["JAX_PLATFORMS"] = "cpu"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    cache = tempfile.TemporaryDirectory(prefix="jax_cache")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook("esvit_jax", "beartype.beartype")

import pytest  # noqa: E402


@pytest.fixture
def tiny_config():
    """A run of seconds: 16-px views of the bundled images, two one-block stages, 32 prototypes."""
    from esvit_jax.config import default_config

    config = default_config()
    config.dtype = "float32"
    config.batch_size = 8
    config.total_steps = 6
    config.log_every_steps = 1
    config.checkpoint_every_steps = 3
    config.backbone.embed_dim = 8
    config.backbone.depths = (1, 1)
    config.backbone.num_heads = (1, 2)
    config.backbone.window_size = 2
    config.backbone.image_size = 16
    config.head.num_prototypes = 32
    config.head.hidden_dim = 16
    config.head.bottleneck_dim = 8
    config.loss.prototype_chunk = 0
    config.views.global_size = 16
    config.views.local_size = 8
    config.views.num_local = 2
    config.data.name = "bundled/fashion_mnist_mini"
    config.data.test_split = "test[:40]"
    config.data.canvas_size = 28
    config.data.num_threads = 1
    config.evaluate.batch_size = 100
    config.optimizer.warmup_epochs = 0.0
    config.optimizer.freeze_prototypes_epochs = 0.001
    return config
