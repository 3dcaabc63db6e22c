"""A small Swin on the bundled images: a CPU, minutes, no network.

esvit train --config=quickstart --workdir=runs/quickstart
"""

from esvit_jax.config import ConfigDict, default_config


def get_config() -> ConfigDict:
    """28-px views of 28-px grey pictures of clothes, two stages, 256 prototypes.

    Pictures are small and few steps are taken, so four things differ from the published recipe
    beyond its size: views show most of a picture, as a twentieth of 28 pixels shows nothing; heads
    have batch norms, which spread the teacher's answers from the first step; the last map is 2 x 2,
    so that its mean keeps some of where things are; and its four regions, which say little that
    views do not, have a tenth of the loss.
    """
    config = default_config()
    config.dtype = "float32"
    config.batch_size = 64
    config.total_epochs = 20
    config.log_every_steps = 50
    config.checkpoint_every_steps = 500
    config.knn_every_steps = config.linear_every_steps = 10_000  # after the last step only
    config.knn_baselines = True

    config.backbone.patch_size = 7
    config.backbone.embed_dim = 96
    config.backbone.depths = (2, 2)
    config.backbone.num_heads = (3, 6)
    config.backbone.window_size = 4
    config.backbone.image_size = 28
    config.backbone.drop_path_rate = 0.0
    config.head.num_prototypes = 256
    config.head.hidden_dim = 128
    config.head.bottleneck_dim = 64
    config.head.norm_last_layer = True
    config.head.batch_norm = True

    config.views.global_size = 28
    config.views.local_size = 14
    config.views.num_local = 2
    config.views.global_scale = (0.6, 1.0)
    config.views.local_scale = (0.3, 0.7)
    config.views.saturation = 0.0  # the pictures are grey
    config.views.hue = 0.0
    config.views.grayscale = 0.0
    config.views.blur_probability = (0.0, 0.0, 0.0)
    config.views.solarize = (0.0, 0.0, 0.0)

    config.loss.prototype_chunk = 0
    config.loss.region_weight = 0.1
    config.loss.teacher_temp = 0.04
    config.loss.warmup_teacher_temp_epochs = 0
    config.optimizer.learning_rate = 6e-3
    config.optimizer.warmup_epochs = 0.5
    config.optimizer.final_weight_decay = 0.1
    config.optimizer.freeze_prototypes_epochs = 0.0

    config.data.name = "bundled/fashion_mnist_mini"
    config.data.test_split = "test"
    config.data.canvas_size = 28
    config.data.num_threads = 2
    config.evaluate.crop = 1.0
    config.evaluate.batch_size = 500
    return config
