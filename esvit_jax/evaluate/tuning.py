"""How a backbone is fine-tuned: its numbers, loss, and optimiser."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from esvit_jax import optim
from esvit_jax.config import ConfigDict
from esvit_jax.errors import UserError
from esvit_jax.evaluate.fit import classifier_views
from esvit_jax.evaluate.mixing import draw_mix, mix_images, targets
from esvit_jax.evaluate.sweep import head_logits
from esvit_jax.models import Backbone
from esvit_jax.optim import Schedule

CLIP_NORM = 5.0  # largest norm of all gradients together


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How a backbone is fine-tuned.

    Attributes:
      epochs: of training.
      batch_size: images a step, over all devices; less where the training split is smaller.
      learning_rate: of AdamW at its peak, of the head, for 256 images a step.
      min_learning_rate: at the end; not scaled.
      warmup_epochs: over which it rises from 0; then it falls in a cosine.
      weight_decay: of tensors with more than one axis.
      layer_decay: a layer's learning rate over that of the layer above it.
      label_smoothing: share of a target that is spread over all classes.
      mixup, cutmix: see `mixing.draw_mix`; 0 for none.
    """

    epochs: int | float = 100
    batch_size: int = 256
    learning_rate: int | float = 5e-4
    min_learning_rate: int | float = 1e-6
    warmup_epochs: int | float = 5
    weight_decay: int | float = 0.05
    layer_decay: int | float = 0.8
    label_smoothing: int | float = 0.1
    mixup: int | float = 0.8
    cutmix: int | float = 1.0

    def check(self) -> None:
        """Refuses what cannot be.

        Raises:
          UserError: names the field.
        """
        for name, value in dataclasses.asdict(self).items():
            least = "more than 0" if name in ("epochs", "learning_rate", "layer_decay") else None
            if not (value > 0 if least else value >= 0) or not value < math.inf:
                raise UserError(f"it must be {least or 'at least 0'}", argument=name, value=value)
        if self.batch_size < 1:
            raise UserError("it must be at least 1", argument="batch_size", value=self.batch_size)
        if self.warmup_epochs >= self.epochs:
            raise UserError(
                f"it must be less than epochs, which is {self.epochs:g}",
                argument="warmup_epochs", value=self.warmup_epochs,
            )  # fmt: skip
        if self.layer_decay > 1:
            raise UserError("it must be at most 1", argument="layer_decay", value=self.layer_decay)
        if self.label_smoothing >= 1:
            raise UserError(
                "it must be less than 1", argument="label_smoothing", value=self.label_smoothing
            )


def finetune_loss(
    backbone: Backbone, config: ConfigDict, tuning: Tuning
) -> Callable[..., tuple[Array, dict[str, PyTree]]]:
    """What `steps.classifier_step` makes small: the cross-entropy with smoothed, mixed targets."""

    def loss_of(params, frozen, batch, keys):
        view_keys, drop_keys = keys
        crop_keys, mix_keys = jax.vmap(jax.random.split, out_axes=1)(view_keys)
        images, mix = classifier_views(config, crop_keys, batch), None
        if tuning.mixup or tuning.cutmix:
            mix = draw_mix(mix_keys, images.shape[1], tuning.mixup, tuning.cutmix)
            images = mix_images(images, mix)
        draw = functools.partial(jax.random.uniform, shape=(backbone.num_draws,))
        out = backbone.forward(params["backbone"], images, drawn=jax.vmap(draw)(drop_keys))
        logits = head_logits(params["head"], out.view_features)
        wanted = targets(batch["label"], logits.shape[1], tuning.label_smoothing, mix)
        loss = jnp.mean(optax.softmax_cross_entropy(logits, wanted))
        return loss, {"loss": loss}

    return loss_of


def finetune_optimizer(
    backbone: Backbone, tuning: Tuning, learning_rate: Schedule
) -> optax.GradientTransformationExtraArgs:
    """Clip - AdamW - each layer's share of the learning rate."""

    def scale_layers(updates: PyTree, _: PyTree) -> PyTree:
        shares = layer_shares(backbone, updates, tuning.layer_decay)
        return jax.tree.map(jnp.multiply, shares, updates)

    return optax.chain(
        optax.clip_by_global_norm(CLIP_NORM),
        optim.scale_by_adam(0.9, 0.999, 1e-8),
        optim.add_weight_decay(lambda step: jnp.float32(tuning.weight_decay)),
        optax.stateless(scale_layers),
        optim.scale_by_schedule(learning_rate, sign=-1.0),
    )


def layer_shares(backbone: Backbone, params: PyTree, layer_decay: float) -> PyTree[float]:
    """layer_decay ** (layers above), for each tensor of {"backbone", "head"}.

    The head is above all layers of the backbone but the last one; see `Backbone.layer_of`.
    """
    last = backbone.num_blocks + 1

    def share(path: tuple, _: Any) -> float:
        part, *names = (key.key for key in path)
        layer = backbone.layer_of(names) if part == "backbone" else last
        return layer_decay ** (last - layer)

    return jax.tree_util.tree_map_with_path(share, params)
