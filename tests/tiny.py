"""A run of seconds, for tests and, as a config file, for the processes that tests start."""

import functools
from typing import TYPE_CHECKING, Any, cast

from esvit_jax.config import ConfigDict, default_config

if TYPE_CHECKING:  # as a config, this file needs no jax
    from esvit_jax.models.esvit import EsViT


def tiny_config() -> ConfigDict:
    """A run of seconds: 16-px views of the bundled images, two one-block stages, 32 prototypes."""
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


get_config = tiny_config


def initial_params(model: "EsViT") -> Any:
    """`init_params` of key 0, compiled; once for each network."""
    return _initial_params(cast(Any, model))


@functools.cache
def _initial_params(model: Any) -> Any:
    import jax

    from esvit_jax.state import init_params

    return jax.jit(functools.partial(init_params, model))(jax.random.key(0))
