"""Shape checks and virtual devices for every test."""

import os

# Four devices, so that layouts can be compared; before jax is imported.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)
os.environ["JAX_PLATFORMS"] = "cpu"

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook("esvit_jax", "beartype.beartype")
