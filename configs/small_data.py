"""Swin-T on a few hundred to a hundred thousand pictures of your own.

    esvit train --config=small_data:images=2000 --workdir=runs/photos \
        --config.data.name=folder:/path/to/photos --config.init_from=CONVERTED

docs/guide/settings.md says why each setting is what it is, and what it was tried on.
"""

import math

from esvit_jax.config import ConfigDict, config_arguments, default_config


def get_config(arguments: str = "") -> ConfigDict:
    """`arguments`: images=2000|200|500|1000|5000|10000|20000|50000|100000, whichever is nearest."""
    images = int(
        config_arguments(
            arguments, images=(2_000, 200, 500, 1_000, 5_000, 10_000, 20_000, 50_000, 100_000)
        )["images"]
    )
    config = default_config()
    config.batch_size = 64
    config.total_epochs = max(100, min(1_000, 600_000 / images))
    config.checkpoint_every_steps = 500
    config.log_every_steps = 20

    # As many images a prototype as published: 1,281,167 for 65,536.
    config.head.num_prototypes = max(32, 2 ** round(math.log2(images / 20)))
    config.head.batch_norm = True
    config.head.norm_last_layer = True
    config.loss.teacher_temp = 0.04
    config.loss.warmup_teacher_temp_epochs = 0
    config.optimizer.warmup_epochs = config.total_epochs / 20
    config.optimizer.freeze_prototypes_epochs = 0.0
    config.views.local_scale = (0.1, 0.5)
    return config
