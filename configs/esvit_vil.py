"""ViL (Vision Longformer) in three depths, as published: ten views, 65,536 prototypes.

    esvit train --config=esvit_vil:region=false --workdir=VIEWS
    esvit train --config=esvit_vil:continued=true --workdir=gs://… --config.init_from=VIEWS

Published on ImageNet-1K for 2262, linear / k-NN top-1, in percent; not trained here: views 77.3 /
73.9; views and regions, continued from a run of views alone at its epoch 200, 77.5 / 74.5 (k-NN at
an epoch that is not known). The other two depths have no published row. 300 epochs of 2262 with
both losses are planned to take 162 hours (docs/measurements.md, Plans; no chip was asked).
"""

from esvit_jax.config import ConfigDict, config_arguments, published_run


def get_config(arguments: str = "") -> ConfigDict:
    """`arguments`: variant=2262|1281|14121, region=true|false, continued=false|true."""
    given = config_arguments(
        arguments,
        variant=(2262, 1281, 14121),
        region=(True, False),
        continued=(False, True),
    )
    return published_run(
        f"vil_{given['variant']}",
        region=bool(given["region"]),
        continued_at=200 if given["continued"] else None,
    )
