"""ResNet-50, as published: ten views, 65,536 prototypes, batches of 1,024.

    esvit train --config=resnet50:region=false --workdir=VIEWS
    esvit train --config=resnet50:continued=true --workdir=gs://… --config.init_from=VIEWS

Published on ImageNet-1K, linear / k-NN top-1, in percent; not trained here: views 75.0 / 69.1;
views and regions, continued from a run of views alone at its epoch 200, 75.7 / 71.3 (k-NN at an
epoch that is not known; linear with a learning rate of 0.01). On eight chips of a v5e 300 epochs
with both losses are planned to take 57 hours (docs/measurements.md, Plans; no chip was asked).
"""

from esvit_jax.config import ConfigDict, config_arguments, published_run


def get_config(arguments: str = "") -> ConfigDict:
    """`arguments`: region=true|false, continued=false|true."""
    given = config_arguments(arguments, region=(True, False), continued=(False, True))
    return published_run(
        "resnet50",
        region=bool(given["region"]),
        continued_at=200 if given["continued"] else None,
        batch_size=1024,
    )
