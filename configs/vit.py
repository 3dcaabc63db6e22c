"""ViT in DeiT's sizes, patch 16 or 8, with the recipe of the published Swins: views alone is DINO.

    esvit train --config=vit:variant=small,patch=16 --workdir=gs://…

The paper compares with DINO's own runs, which had other settings and longer training; no row of it
is this recipe. Not trained here. On eight chips of a v5e 300 epochs of small, patch 16, with both
losses are planned to take 73 hours (docs/measurements.md, Plans; no chip was asked).
"""

from esvit_jax.config import ConfigDict, config_arguments, published_run


def get_config(arguments: str = "") -> ConfigDict:
    """`arguments`: variant=small|tiny|base, patch=16|8, region=true|false, continued=false|true."""
    given = config_arguments(
        arguments,
        variant=("small", "tiny", "base"),
        patch=(16, 8),
        region=(True, False),
        continued=(False, True),
    )
    config = published_run(
        f"vit_{given['variant']}",
        region=bool(given["region"]),
        continued_at=200 if given["continued"] else None,
    )
    config.backbone.patch_size = given["patch"]
    return config
