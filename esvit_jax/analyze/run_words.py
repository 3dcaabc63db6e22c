"""What was trained, in words."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from esvit_jax.config import ConfigDict
from esvit_jax.models import create_model
from esvit_jax.preflight import count
from esvit_jax.runlog.clock import spent
from esvit_jax.state import init_params

# What config.json has of a run, of all `RunNumbers`, that the words need.
NUMBERS = ("num_images", "total_steps", "steps_per_epoch", "peak_learning_rate", "warmup_steps")


def is_run(origin: Mapping[str, Any]) -> bool:
    """Whether the facts of a config.json are those of a run, and whole; an export repeats them."""
    whole = all(isinstance(origin.get(name), int | float) for name in NUMBERS)
    return whole and "format" not in origin


def network_words(config: ConfigDict, heads: bool = True) -> str:
    """The backbone and its size, with its heads or without."""
    model = create_model(config)
    params = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    words = f"{config.backbone.name}, {count(params['backbone']) / 1e6:.3g} M parameters"
    if heads:
        each = "view and region heads" if config.loss.region else "a view head"
        words += (
            f"; {count(params) / 1e6:.3g} M with {each} of K = {config.head.num_prototypes:,} "
            "prototypes"
        )
    return f"{words}; matrix products in {config.dtype}"


def run_words(
    config: ConfigDict, origin: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    """What a training run is, by what is said of it.

    Args:
      config, origin: of a run (`is_run`).
      lines: of its metrics.
    """
    views, loss, optimizer = config.views, config.loss, config.optimizer
    total = origin["total_steps"]
    epochs = total / max(1, origin["steps_per_epoch"])
    done = max((line["step"] for line in lines), default=0)
    plural = "" if epochs == 1 else "s"
    words = {
        "network": network_words(config),
        "data": f"{config.data.name} {config.data.train_split}, {origin['num_images']:,} images",
        "views": f"2 global ones of {views.global_size} px"
        + (f" and {views.num_local} local ones of {views.local_size} px" if views.num_local else "")
        + " of each image",
        "loss": (_regions(loss.region_weight) if loss.region else "views are matched")
        + f"; student temperature {loss.student_temp:g}, teacher temperature {_temperature(config)}"
        f"; center momentum {loss.center_momentum:g}",
        "optimizer": f"{optimizer.name}; learning rate {origin['peak_learning_rate']:.3g} "
        f"({optimizer.learning_rate:.3g} for 256 images) after {origin['warmup_steps']:,} steps, "
        f"then a cosine to {optimizer.min_learning_rate:g}; weight decay "
        f"{optimizer.weight_decay:g} to {optimizer.final_weight_decay:g}; teacher momentum "
        f"{optimizer.teacher_momentum:g} to {optimizer.final_teacher_momentum:g}",
        "length": f"{total:,} steps of {config.batch_size} images, {epochs:.3g} epoch{plural}, "
        f"{total * config.batch_size:,} images seen",
    }
    if config.init_from:
        words["begun from"] = f"{config.init_from} ({config.init_parts})"
    if done < total:
        words["so far"] = f"{done:,} steps are logged"
    if times := [line for line in lines if line.get("spent_step") is not None]:
        words["time"] = spent(
            {name: x for name, x in times[-1].items() if name.startswith("spent_")}
        )
    return words


def _regions(weight: float) -> str:
    words = "views and regions are matched"
    return words if weight == 0.5 else f"{words}, regions with a weight of {weight:g}"


def _temperature(config: ConfigDict) -> str:
    loss = config.loss
    if not loss.warmup_teacher_temp_epochs or loss.warmup_teacher_temp == loss.teacher_temp:
        return f"{loss.teacher_temp:g}"
    return (
        f"{loss.warmup_teacher_temp:g} to {loss.teacher_temp:g} over "
        f"{loss.warmup_teacher_temp_epochs} epochs"
    )


def converted_words(config: ConfigDict, origin: Mapping[str, Any]) -> dict[str, str]:
    """What a checkpoint is that was converted, exported or fine-tuned."""
    heads = origin.get("parts") != "backbone"
    facts = {
        str(name).replace("_", " "): _text(value)
        for name, value in origin.items()
        if name != "parts" and value is not None
    }
    return {"network": network_words(config, heads)} | facts


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{name.replace('_', ' ')} {_text(x)}" for name, x in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
