"""The quickstart for longer, in two runs: up to raw pixels in k-NN, past them in the probe.

    esvit train --config=fashion_mnist:region=false --workdir=VIEWS
    esvit train --config=fashion_mnist:continued=true --workdir=runs/fashion \
        --config.init_from=VIEWS

Views alone learn for 3,000 steps; the second run goes on at step 2,000 of them with both losses, as
most published rows did. With `images=70000` they train on the 60,000 images of TFDS's
`fashion_mnist` and are evaluated on the other 10,000 (not yet measured). docs/measurements.md has
the numbers.
"""

from esvit_jax.config import ConfigDict, config_arguments, load_config


def get_config(arguments: str = "") -> ConfigDict:
    """`arguments`: images=7500|70000, bundled or of TFDS; region=true|false, continued=…."""
    given = config_arguments(
        arguments, images=(7_500, 70_000), region=(True, False), continued=(False, True)
    )
    config = load_config("quickstart")
    config.total_steps = 3_000
    config.checkpoint_keep_every_steps = 1_000
    # A mean of the last 100 steps, as the quickstart's teacher is, forgets again after 500 steps.
    config.optimizer.teacher_momentum = 0.996
    config.loss.region = given["region"]
    if given["continued"]:
        config.init_parts = "run"
        config.init_step = 2_000
    if given["images"] == 70_000:
        config.data.name = "fashion_mnist"
    return config
