"""What the published runs on ImageNet-1K have in common, for the recipes in `configs/`."""

from esvit_jax.config.fields import ConfigDict, default_config

IMAGENET_IMAGES = 1_281_167  # of the training split of ImageNet-1K
VIEWS_BATCH = 1024  # images a step of the runs that match views alone


def published_run(
    backbone: str, *, region: bool, continued_at: int | None = None, batch_size: int = 512
) -> ConfigDict:
    """The config of a published run: 300 epochs, ten views, 65,536 prototypes.

    A run of views alone keeps a checkpoint every 20 epochs for good, so that one with regions can
    go on from there; that one takes `config.init_from`, and begins with the epoch's schedules, a
    new region head and new moments (see `interop.initialize.init_from`).

    Args:
      backbone: one of `models.PRESETS`.
      region: match regions too.
      continued_at: epoch of a run of views alone, with batches of `VIEWS_BATCH`, at which this one
        begins; None begins anew.
      batch_size: of a run with regions.
    """
    config = default_config()
    config.backbone.name = backbone
    config.loss.region = region
    config.batch_size = batch_size if region else VIEWS_BATCH
    epoch = IMAGENET_IMAGES // VIEWS_BATCH  # steps
    if not region:
        config.checkpoint_every_steps = epoch
        config.checkpoint_keep_every_steps = 20 * epoch
    elif continued_at is not None:
        config.init_parts = "run"
        config.init_step = continued_at * epoch
    return config
