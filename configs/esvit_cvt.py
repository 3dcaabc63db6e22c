"""CvT with windows, tiny or small, as published: ten views, 65,536 prototypes.

    esvit train --config=esvit_cvt:region=false --workdir=VIEWS
    esvit train --config=esvit_cvt:continued=true --workdir=gs://… --config.init_from=VIEWS

Published on ImageNet-1K for tiny, linear / k-NN top-1, in percent; not trained here: views 77.6 /
74.8; views and regions, continued from a run of views alone at its epoch 200, 78.5 / 76.7 (k-NN at
an epoch that is not known). The small one has no published row. On eight chips of a v5e 300 epochs
of tiny with both losses are planned to take 60 hours (docs/measurements.md, Plans; no chip was
asked).
"""

from esvit_jax.config import ConfigDict, config_arguments, published_run


def get_config(arguments: str = "") -> ConfigDict:
    """`arguments`: variant=tiny|small, region=true|false, continued=false|true."""
    given = config_arguments(
        arguments,
        variant=("tiny", "small"),
        region=(True, False),
        continued=(False, True),
    )
    return published_run(
        f"cvt_{given['variant']}",
        region=bool(given["region"]),
        continued_at=200 if given["continued"] else None,
    )
