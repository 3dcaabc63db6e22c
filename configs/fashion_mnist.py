"""The quickstart for longer: past raw pixels in the probe, and nearly up to them in k-NN.

    esvit train --config=fashion_mnist --workdir=runs/fashion

With `--config=fashion_mnist:images=70000` it trains on the 60,000 images of TFDS's `fashion_mnist`,
for as many steps, and is evaluated on the other 10,000 (not yet measured). docs/measurements.md has
the numbers.
"""

from esvit_jax.config import ConfigDict, config_arguments, load_config


def get_config(arguments: str = "") -> ConfigDict:
    """`arguments`: images=7500|70000, bundled or of TFDS."""
    images = config_arguments(arguments, images=(7_500, 70_000))["images"]
    config = load_config("quickstart")
    config.total_steps = 6_000
    config.checkpoint_every_steps = 1_000
    config.views.num_local = 4
    if images == 70_000:
        config.data.name = "fashion_mnist"
    return config
