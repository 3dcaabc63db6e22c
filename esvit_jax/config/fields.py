"""The table of fields: the default config, its checks and its reference page are made from it.

Configs hold inputs only; what follows from them is computed by `resolve`, after the overrides.
"""

import dataclasses
import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import ml_collections
from ml_collections import config_dict

from esvit_jax.config.rules import (
    Rule,
    interval,
    number,
    one_of,
    optional,
    share,
    text,
    three_numbers,
    true_or_false,
    whole,
    whole_interval,
    whole_numbers,
)
from esvit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Field:
    """A line of the table.

    Attributes:
      default: that of the published recipe.
      comment: what the field says, with its unit.
      rule: what it may hold.
      free: it may differ between two starts of the same run: it changes how the run is done, not
        what it computes (beyond rounding).
    """

    default: object
    comment: str
    rule: Rule
    free: bool = False


MAX_STEPS = 2**31 - 1  # a step is an int32 on the devices
STEPS = whole(1, MAX_STEPS)
PIXELS = whole(1, 8192)
FEATURES = whole(1, 1_000_000)
EPOCHS = number(0, 1_000_000)
DTYPE = one_of("float32", "bfloat16")
TEMPERATURE = number(0.0001, 100)
STRENGTH = number(0, 10)

# fmt: off
FIELDS: dict[str, Field] = {
    "seed": Field(0, "of initialisation, data order, augmentation, drop path", whole(0, 2**63 - 1)),
    "dtype": Field("bfloat16", "of matrix products", DTYPE),
    "parallel": Field(
        "pmap", "how the step reaches the devices; fsdp spreads the state over them",
        one_of("pmap", "shard_map", "fsdp"), free=True),
    "batch_size": Field(512, "images a step, over all devices and processes", whole(1, 1_000_000)),
    "accum_steps": Field(
        1, "parts a device's batch is run through in, one update after all",
        whole(1, 1_000_000), free=True),
    "remat": Field(
        "none", "recomputed in the backward pass: nothing, all but products with weights, or whole "
        "blocks", one_of("none", "dots", "block"), free=True),
    "total_epochs": Field(
        300.0, "length of the run and of its schedules", number(0, 1_000_000, without=0)),
    "total_steps": Field(None, "the same in steps; wins over epochs", optional(STEPS)),
    "log_every_steps": Field(50, "steps between two lines of metrics", STEPS, free=True),
    "checkpoint_every_steps": Field(1000, "steps between two checkpoints", STEPS, free=True),
    "checkpoint_keep": Field(2, "latest checkpoints kept", whole(1, 1_000_000), free=True),
    "checkpoint_keep_every_steps": Field(
        None, "checkpoints of its multiples are kept for good", optional(STEPS), free=True),
    "knn_every_steps": Field(
        0, "steps between two k-NN evaluations; 0 means never", whole(0, MAX_STEPS), free=True),
    "linear_every_steps": Field(
        0, "steps between two fast linear probes; 0 means never", whole(0, MAX_STEPS), free=True),
    "knn_baselines": Field(
        False, "before the first step, also k-NN (and the probe) untrained and on raw pixels",
        true_or_false(), free=True),
    "lock_seconds": Field(
        60.0, "without a sign of life, after which the run that has a workdir counts as dead",
        number(1, 86_400), free=True),
    "max_bad_steps": Field(
        5, "losses in a row that are not finite (and skipped) that end a run", STEPS, free=True),
    "compilation_cache": Field(
        True, "keep compiled programs in the workdir, for the next start (where "
        "JAX_COMPILATION_CACHE_DIR is set, they are kept there)", true_or_false(), free=True),
    "profile_steps": Field(
        None, "the first and the last step that are traced into the workdir",
        optional(whole_interval(1, MAX_STEPS)), free=True),
    "init_from": Field(
        "", "workdir, converted checkpoint or export to start from; empty means random", text(),
        free=True),
    "init_step": Field(
        None, "the checkpoint of it that is taken; None is the newest",
        optional(whole(0, MAX_STEPS)), free=True),
    "init_parts": Field(
        "all", "what is taken from it: the network, its backbone, or the run, which goes on with "
        "its epoch", one_of("all", "backbone", "run"), free=True),

    "backbone.name": Field("swin_tiny", "one of esvit_jax.models.PRESETS", text()),
    "backbone.embed_dim": Field(None, "features of the first stage", optional(FEATURES)),
    "backbone.embed_dims": Field(
        None, "features of each stage (CvT, ViL)", optional(whole_numbers(1, 1_000_000))),
    "backbone.base_width": Field(
        None, "features of a ResNet's stem; doubled by every stage", optional(FEATURES)),
    "backbone.depths": Field(None, "blocks of each stage", optional(whole_numbers(1, 1000))),
    "backbone.num_heads": Field(
        None, "attention heads of each stage", optional(whole_numbers(1, 10_000))),
    "backbone.window_size": Field(None, "tokens along a window's side", optional(whole(1, 1000))),
    "backbone.window_sizes": Field(
        None, "cells along a chunk's side in each of the first, sparse stages (ViL)",
        optional(whole_numbers(1, 1000, least=0))),
    "backbone.num_global": Field(
        None, "global tokens of each stage (ViL)", optional(whole_numbers(0, 1000))),
    "backbone.patch_sizes": Field(
        None, "cells of the stage before along a cell's side (ViL)",
        optional(whole_numbers(1, 1000))),
    "backbone.patch_size": Field(None, "pixels along a patch's side", optional(PIXELS)),
    "backbone.image_size": Field(
        None, "pixels; fixes windows and shifts, or the position embedding", optional(PIXELS)),
    "backbone.drop_path_rate": Field(None, "of the last block", optional(number(0, 1, without=1))),
    "backbone.attention_dtype": Field(None, "of the attention logits", optional(DTYPE)),
    "backbone.attention": Field(
        None, "by which code; auto is the kernel (pallas) on TPUs, of a ViT cuDNN's on GPUs",
        optional(one_of("xla", "pallas", "auto")), free=True),

    "head.num_prototypes": Field(65536, "K, of each of the two heads", whole(2, 100_000_000)),
    "head.hidden_dim": Field(2048, "features of the hidden layers", FEATURES),
    "head.bottleneck_dim": Field(256, "features compared with the prototypes", FEATURES),
    "head.norm_last_layer": Field(
        False, "whether the prototypes' norms are kept at 1", true_or_false()),
    "head.batch_norm": Field(
        False, "whether batch norms follow the hidden layers", true_or_false()),

    "views.global_size": Field(224, "pixels along a side of the two global views", PIXELS),
    "views.local_size": Field(96, "pixels along a side of a local view", PIXELS),
    "views.num_local": Field(8, "local views of an image; may be 0", whole(0, 1000)),
    "views.global_scale": Field(
        (0.4, 1.0), "share of the image's area in a global view", interval(0, 1, without=0)),
    "views.local_scale": Field(
        (0.05, 0.4), "share of the image's area in a local view", interval(0, 1, without=0)),
    "views.ratio": Field(
        (3 / 4, 4 / 3), "width over height of the part a view shows", interval(0.001, 1000)),
    "views.flip": Field(0.5, "probability of a horizontal flip", share()),
    "views.jitter_probability": Field(0.8, "probability of the four colour changes", share()),
    "views.brightness": Field(0.4, "x, for factors from 1 - x to 1 + x", STRENGTH),
    "views.contrast": Field(0.4, "likewise", STRENGTH),
    "views.saturation": Field(0.2, "likewise", STRENGTH),
    "views.hue": Field(0.1, "turns of the hue circle, either way", share()),
    "views.grayscale": Field(0.2, "probability", share()),
    "views.blur_probability": Field(
        (1.0, 0.1, 0.5), "of global view 1, global view 2, a local view", three_numbers(0, 1)),
    "views.blur_sigma": Field((0.1, 2.0), "pixels", interval(0, 1000, without=0)),
    "views.solarize": Field(
        (0.0, 0.2, 0.0), "probability for global view 1, global view 2, a local view",
        three_numbers(0, 1)),
    "views.mean": Field(
        (0.485, 0.456, 0.406), "subtracted from red, green, blue in 0..1",
        three_numbers(-1000, 1000)),
    "views.std": Field((0.229, 0.224, 0.225), "divided by", three_numbers(0.0001, 1000)),

    "loss.region": Field(True, "match regions as well as views", true_or_false()),
    "loss.region_weight": Field(
        0.5, "share of the region loss; the view loss has the rest", number(0, 1, without=0)),
    "loss.student_temp": Field(0.1, "of the student's softmax", TEMPERATURE),
    "loss.teacher_temp": Field(0.07, "of the teacher's softmax, after the warm-up", TEMPERATURE),
    "loss.warmup_teacher_temp": Field(0.04, "of the first epoch", TEMPERATURE),
    "loss.warmup_teacher_temp_epochs": Field(
        30, "epochs over which it rises, in a line", whole(0, 1_000_000)),
    "loss.center_momentum": Field(0.9, "of the running means of the teacher's logits", share()),
    "loss.prototype_chunk": Field(
        4096, "prototypes held at a time; 0 means all", whole(0, 100_000_000), free=True),

    "optimizer.name": Field(
        "adamw", "how gradients become updates", one_of("adamw", "sgd", "lars")),
    "optimizer.learning_rate": Field(
        5e-4, "peak for 256 images a step; scaled with the batch", number(0, 1000)),
    "optimizer.min_learning_rate": Field(1e-6, "at the end; not scaled", number(0, 1000)),
    "optimizer.warmup_epochs": Field(
        10.0, "epochs over which the learning rate rises from 0", EPOCHS),
    "optimizer.weight_decay": Field(0.04, "at the start", number(0, 1000)),
    "optimizer.final_weight_decay": Field(0.4, "at the end", number(0, 1000)),
    "optimizer.clip_norm": Field(
        3.0, "largest norm of one tensor's gradient; 0 means no limit", number(0, 1_000_000)),
    "optimizer.freeze_prototypes_epochs": Field(
        1.0, "epochs in which prototypes do not move", EPOCHS),
    "optimizer.teacher_momentum": Field(0.996, "at the start", share()),
    "optimizer.final_teacher_momentum": Field(1.0, "at the end", share()),

    "data.name": Field(
        "imagenet2012", "TFDS name[:version], TFDS folder, bundled/…, folder:/path", text()),
    "data.data_dir": Field(
        "", "where TFDS data sets lie; empty means TFDS's own default", text(), free=True),
    "data.train_split": Field("train", "TFDS split; slices such as train[:90%] work", text()),
    "data.test_split": Field("validation", "of the k-NN evaluation", text(), free=True),
    "data.canvas_size": Field(
        512, "pixels along the square uint8 canvas an image is fitted into", PIXELS),
    "data.num_workers": Field(
        0, "processes that decode; 0 means this one", whole(0, 1000), free=True),
    "data.num_threads": Field(
        16, "threads that read and decode, in each", whole(1, 1000), free=True),
    "data.max_bad_records": Field(
        100, "undecodable records after which the run stops", whole(0, MAX_STEPS), free=True),
    "data.max_wait_seconds": Field(
        300.0, "without a batch, after which the run stops: the data does not answer",
        number(1, 86_400), free=True),

    "evaluate.size": Field(
        None, "pixels; None means views.global_size", optional(PIXELS), free=True),
    "evaluate.crop": Field(
        0.875, "share of the shorter side that the centre crop keeps", number(0, 1, without=0),
        free=True),
    "evaluate.batch_size": Field(
        256, "images a batch, over all devices and processes", whole(1, 1_000_000), free=True),
    "evaluate.k": Field(
        (10, 20, 100, 200), "neighbours that vote", whole_numbers(1, 1_000_000), free=True),
}
# fmt: on


class ConfigDict(ml_collections.ConfigDict):
    """The config of a run: `config.optimizer.learning_rate = 1e-3`; see `default_config`."""

    if TYPE_CHECKING:  # what a field holds is known to the table, not to a type checker

        def __getattr__(self, attribute: str) -> Any: ...
        def __getitem__(self, key: str) -> Any: ...

    def __setattr__(self, attribute: str, value: object) -> None:
        if self.is_locked and attribute not in self:
            raise AttributeError(
                f"{attribute} is no field; the one most like it is {_most_like(attribute, self)}"
            )
        super().__setattr__(attribute, value)

    def __repr__(self) -> str:
        from esvit_jax.config.show import as_text

        return as_text(self)

    __str__ = __repr__

    def _repr_html_(self) -> str:
        from esvit_jax.config.show import as_html

        return as_html(self)


def default_config() -> ConfigDict:
    """The published recipe (Swin-T, window 7, ImageNet); `configs/` holds variations of it.

    It is locked: setting a misspelt field is an error, and so is a value of another type.
    """
    config = ConfigDict()
    for name, field in FIELDS.items():
        section, _, last = name.rpartition(".")
        if section and section not in config:
            config[section] = ConfigDict()
        default = field.default
        if field.rule.optional:
            default = config_dict.FieldReference(default, field_type=field.rule.type)
        (config[section] if section else config)[last] = default
    config.lock()
    return config


def set_field(config: ConfigDict, name: str, value: object) -> None:
    """Sets a field by its dotted name.

    Raises:
      UserError: there is no such field, or it may not hold this value.
    """
    if name not in FIELDS:
        raise UserError(_no_field(name))
    FIELDS[name].rule.require(f"config.{name}", value)
    section, _, last = name.rpartition(".")
    (config[section] if section else config)[last] = value


def field_values(config: ml_collections.ConfigDict) -> dict[str, object]:
    """The values of all fields by their dotted names, sorted within each section."""
    values: dict[str, object] = {}
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            values |= {f"{name}.{last}": x for last, x in field_values(value).items()}
        else:
            values[name] = value
    return values


def require_all_fields(config: ml_collections.ConfigDict) -> None:
    """Refuses a config that lacks a field, or has one that is none.

    Raises:
      UserError: names the first such field.
    """
    names = field_values(config)
    for name in names:
        if name not in FIELDS:
            raise UserError(_no_field(name))
    for name in FIELDS:
        if name not in names:
            raise UserError(f"config.{name} is missing; default_config() has every field")


def flatten(config: ConfigDict) -> dict[str, Any]:
    """{"optimizer.learning_rate": 5e-4, …}, as JSON would hold the values."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in field_values(config).items()
    }


def unflatten(flat: object) -> ConfigDict:
    """The inverse of `flatten`, for whatever a JSON file holds.

    Args:
      flat: names and values; a field that is not there keeps its default.

    Raises:
      UserError: these are no names and values, a name is not a field of the config, or a field
        may not hold its value.
    """
    if not isinstance(flat, dict):
        raise UserError(f"a config is an object of names and values, not {flat!r}")
    config = default_config()
    for name, value in flat.items():
        set_field(config, name, tuple(value) if isinstance(value, list) else value)
    return config


def _no_field(name: str) -> str:
    fields = [field for field in FIELDS if field.startswith(f"{name}.")]
    if fields:
        return f"config.{name} is a section; its fields are {', '.join(fields)}"
    return f"config.{name} is no field; the one most like it is config.{_most_like(name, FIELDS)}"


def _most_like(name: str, known: Iterable[str]) -> str:
    return difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)[0]
