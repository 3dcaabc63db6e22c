"""The published recipe: Swin T, S, B or L, window 7 or 14, ten views, 65,536 prototypes.

    esvit train --config=esvit_swin:variant=tiny,window=7 --workdir=gs://…
    esvit train --config=esvit_swin:variant=base,window=14,region=false --workdir=VIEWS
    esvit train --config=esvit_swin:variant=base,window=14,continued=true --workdir=gs://… \
        --config.init_from=VIEWS

Published on ImageNet-1K, linear / k-NN top-1, in percent; not trained here. Only T 7 and S 7 were
trained with regions from the start. The others went on, `continued=true`, with a run of views alone
at its epoch 200 (S 14: 180), and were evaluated by k-NN at the epoch that is given.

| Swin | views | views and regions | k-NN at epoch | planned, hours |
|---|---|---|---|---:|
| T 7 | 77.0 / 74.2 | 78.0 / 75.7 | 280 | 54 |
| S 7 | 79.2 / 76.9 | 79.5 / 77.7 | 280 | 75 |
| B 7 | 79.6 / 77.7 | 80.4 / 78.9, continued | 260 | 97 |
| T 14 | 77.9 / 75.5 | 78.7 / 77.0, continued | unknown | 59 |
| S 14 | 79.4 / 77.3 | 80.8 / 79.1, continued | 250 | 83 |
| B 14 | 80.5 / 78.3 | 81.3 / 79.3, continued, `norm_last_layer` | 240 | 110 |

L has no published row. "Planned" is for 300 epochs with both losses on eight chips of a v5e, 32
images a chip, as `esvit plan` estimates it (docs/measurements.md, Plans; no chip was asked). With
views alone T 7 is planned to take 48 hours.
"""

from esvit_jax.config import ConfigDict, config_arguments, published_run


def get_config(arguments: str = "") -> ConfigDict:
    """`arguments`: variant=tiny|small|base|large, window=7|14, region=true|false, continued=…."""
    given = config_arguments(
        arguments,
        variant=("tiny", "small", "base", "large"),
        window=(7, 14),
        region=(True, False),
        continued=(False, True),
    )
    row = given["variant"], given["window"]
    continued_at = 180 if row == ("small", 14) else 200
    config = published_run(
        f"swin_{given['variant']}",
        region=bool(given["region"]),
        continued_at=continued_at if given["continued"] else None,
    )
    config.backbone.window_size = given["window"]
    config.head.norm_last_layer = row == ("base", 14) and bool(given["continued"])
    return config
