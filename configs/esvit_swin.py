"""The published recipe: Swin T, S, B or L, window 7 or 14, ten views, 65,536 prototypes.

esvit train --config=esvit_swin:variant=base,window=14 --workdir=gs://…
"""

from esvit_jax.config import ConfigDict, config_arguments, default_config


def get_config(arguments: str = "") -> ConfigDict:
    """`arguments`: variant=tiny|small|base|large, window=7|14, region=true|false."""
    given = config_arguments(
        arguments,
        variant=("tiny", "small", "base", "large"),
        window=(7, 14),
        region=(True, False),
    )
    config = default_config()
    config.backbone.name = f"swin_{given['variant']}"
    config.backbone.window_size = given["window"]
    config.loss.region = given["region"]
    if not config.loss.region:  # the view-only runs were published with this batch
        config.batch_size = 1024
    return config
