"""Compiled programs on disk, so that a run that goes on does not compile again."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
from jax.experimental.compilation_cache import compilation_cache


@contextmanager
def kept_in(folder: str | None) -> Iterator[None]:
    """Within the block, what takes more than a second to compile is kept in a folder, and found.

    A cache that is set already (by JAX_COMPILATION_CACHE_DIR, say) is used instead.

    Args:
      folder: made if it is not there; None keeps nothing.
    """
    if folder is None or jax.config.values["jax_compilation_cache_dir"] is not None:
        yield
        return
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()  # jax looks for one once, unless told so
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()
