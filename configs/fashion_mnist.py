"""The quickstart for longer, until k-NN and the probe tell more apart than raw pixels do.

    esvit train --config=fashion_mnist --workdir=runs/fashion
    esvit train --config=fashion_mnist:images=70000 --workdir=runs/fashion_all

The first trains on the 6,000 bundled training pictures, the second on the 60,000 of TFDS's
`fashion_mnist` (not yet measured), which it evaluates on the other 10,000. docs/measurements.md has
the numbers.
"""

from esvit_jax.config import ConfigDict, config_arguments, load_config


def get_config(arguments: str = "") -> ConfigDict:
    """`arguments`: images=7500|70000, bundled or of TFDS."""
    images = config_arguments(arguments, images=(7_500, 70_000))["images"]
    config = load_config("quickstart")
    config.total_steps = 3_000
    # The teacher of the quickstart, a mean of the last 100 steps, forgets again after 500 steps.
    config.optimizer.teacher_momentum = 0.996
    if images == 70_000:
        config.data.name = "fashion_mnist"
    return config
