"""The published recipe: Swin T, S, B or L, window 7 or 14, ten views, 65,536 prototypes.

esvit train --config=configs/esvit_swin.py:variant=base,window=14 --workdir=gs://…
"""

from esvit_jax.config import ConfigDict, default_config
from esvit_jax.errors import UserError
from esvit_jax.models import PRESETS


def get_config(arguments: str = "") -> ConfigDict:
    """`arguments`: variant=tiny|small|base|large, window=7|14, region=true|false."""
    given = {"variant": "tiny", "window": "7", "region": "true"}
    for item in filter(None, arguments.split(",")):
        name, _, value = item.partition("=")
        if name not in given:
            raise UserError(f"--config=…:{item}: known are {', '.join(given)}")
        given[name] = value
    if f"swin_{given['variant']}" not in PRESETS:
        raise UserError(f"variant={given['variant']}: choose tiny, small, base or large")
    if given["window"] not in ("7", "14") or given["region"] not in ("true", "false"):
        raise UserError(f"--config=…:{arguments}: window is 7 or 14, region is true or false")

    config = default_config()
    config.backbone.name = f"swin_{given['variant']}"
    config.backbone.window_size = int(given["window"])
    config.loss.region = given["region"] == "true"
    if not config.loss.region:  # the view-only runs were published with this batch
        config.batch_size = 1024
    return config
