"""What a run is made of: the default config, and its resolution into the numbers of a run.

Configs hold inputs only. Everything derived (steps, the scaled learning rate, images a device) is
computed here, after the overrides, by `resolve`, which also refuses what cannot work before
anything is compiled.
"""

import dataclasses
import difflib
import itertools
import math
from typing import TYPE_CHECKING, Any

from absl import flags
from ml_collections import config_dict, config_flags

from esvit_jax.errors import UserError, renamed

if TYPE_CHECKING:
    # The real one types a field as a union of all that fields can hold, of which a checker can
    # make nothing.
    class ConfigDict(dict[str, Any]):
        """Fields by attribute or name."""

        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...
else:
    from ml_collections import ConfigDict


def default_config() -> ConfigDict:
    """The published recipe (Swin-T, window 7, ImageNet); `configs/` holds variations of it."""
    config = ConfigDict()
    config.seed = 0  # of initialisation, data order, augmentation and drop path
    config.dtype = "bfloat16"  # of matrix products: "float32" or "bfloat16"
    config.parallel = "pmap"  # how the step reaches the devices: "pmap" or "shard_map"
    config.batch_size = 512  # images a step, over all devices and processes
    config.accum_steps = 1  # parts a device's batch is run through in, one update after all
    config.remat = "none"  # recomputed in the backward pass: "none", "dots" or "block"
    config.total_epochs = 300  # length of the run and of its schedules
    config.total_steps = config_dict.placeholder(int)  # the same in steps; wins over epochs
    config.log_every_steps = 50  # steps between two lines of metrics
    config.checkpoint_every_steps = 1000  # steps between two checkpoints
    config.checkpoint_keep = 2  # latest checkpoints kept
    config.checkpoint_keep_every_steps = config_dict.placeholder(int)  # kept for good
    config.knn_every_steps = 0  # steps between two k-NN evaluations; 0 means never
    config.knn_baselines = False  # before the first step, also k-NN untrained and on raw pixels
    config.max_bad_steps = 5  # losses in a row that are not finite (and skipped) that end a run
    config.init_from = ""  # workdir or converted checkpoint to start from; "" means random
    config.init_parts = "all"  # what is taken from it: "all" or "backbone"

    config.backbone = ConfigDict()
    config.backbone.name = "swin_tiny"  # one of esvit_jax.models.BACKBONES
    # The fields below override the named backbone; None keeps its value.
    config.backbone.embed_dim = config_dict.placeholder(int)  # features of the first stage
    config.backbone.depths = config_dict.placeholder(tuple)  # blocks of each stage
    config.backbone.num_heads = config_dict.placeholder(tuple)  # attention heads of each stage
    config.backbone.window_size = config_dict.placeholder(int)  # tokens along a window's side
    config.backbone.patch_size = config_dict.placeholder(int)  # pixels along a patch's side
    config.backbone.image_size = config_dict.placeholder(int)  # pixels; fixes windows and shifts
    config.backbone.drop_path_rate = config_dict.placeholder(float)  # of the last block
    config.backbone.attention_dtype = config_dict.placeholder(str)  # of the attention logits

    config.head = ConfigDict()
    config.head.num_prototypes = 65536  # K, of each of the two heads
    config.head.hidden_dim = 2048  # features of the hidden layers
    config.head.bottleneck_dim = 256  # features compared with the prototypes
    config.head.norm_last_layer = False  # True keeps the prototypes' norms at 1

    config.views = ConfigDict()
    config.views.global_size = 224  # pixels along a side of the two global views
    config.views.local_size = 96  # pixels along a side of a local view
    config.views.num_local = 8  # local views of an image; may be 0
    config.views.global_scale = (0.4, 1.0)  # share of the image's area in a global view
    config.views.local_scale = (0.05, 0.4)  # share of the image's area in a local view
    config.views.ratio = (3 / 4, 4 / 3)  # width over height of the part a view shows
    config.views.flip = 0.5  # probability of a horizontal flip
    config.views.jitter_probability = 0.8  # probability of the four colour changes
    config.views.brightness = 0.4  # factors from 1 - x to 1 + x
    config.views.contrast = 0.4  # likewise
    config.views.saturation = 0.2  # likewise
    config.views.hue = 0.1  # turns of the hue circle, either way
    config.views.grayscale = 0.2  # probability
    config.views.blur_probability = (1.0, 0.1, 0.5)  # of global view 1, global 2, local
    config.views.blur_sigma = (0.1, 2.0)  # pixels
    config.views.solarize = (0.0, 0.2, 0.0)  # probability for global view 1, global 2, local
    config.views.mean = (0.485, 0.456, 0.406)  # subtracted from red, green, blue in 0..1
    config.views.std = (0.229, 0.224, 0.225)  # divided by

    config.loss = ConfigDict()
    config.loss.region = True  # match regions as well as views
    config.loss.student_temp = 0.1  # of the student's softmax
    config.loss.teacher_temp = 0.07  # of the teacher's softmax, after the warm-up
    config.loss.warmup_teacher_temp = 0.04  # of the first epoch
    config.loss.warmup_teacher_temp_epochs = 30  # epochs over which it rises, in a line
    config.loss.center_momentum = 0.9  # of the running means of the teacher's logits
    config.loss.prototype_chunk = 8192  # prototypes held at a time; 0 means all

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"  # "adamw", "sgd" or "lars"
    config.optimizer.learning_rate = 5e-4  # peak for 256 images a step; scaled with the batch
    config.optimizer.min_learning_rate = 1e-6  # at the end; not scaled
    config.optimizer.warmup_epochs = 10.0  # epochs over which the learning rate rises from 0
    config.optimizer.weight_decay = 0.04  # at the start
    config.optimizer.final_weight_decay = 0.4  # at the end
    config.optimizer.clip_norm = 3.0  # largest norm of one tensor's gradient; 0 means no limit
    config.optimizer.freeze_prototypes_epochs = 1.0  # epochs in which prototypes do not move
    config.optimizer.teacher_momentum = 0.996  # at the start
    config.optimizer.final_teacher_momentum = 1.0  # at the end

    config.data = ConfigDict()
    config.data.name = "imagenet2012"  # TFDS name[:version], TFDS folder, bundled/…, folder:/path
    config.data.data_dir = ""  # where TFDS data sets lie; "" means TFDS's own default
    config.data.train_split = "train"  # TFDS split; slices such as train[:90%] work
    config.data.test_split = "validation"  # of the k-NN evaluation
    config.data.canvas_size = 512  # pixels along the square uint8 canvas an image is fitted into
    config.data.num_workers = 0  # processes that decode; 0 means this one
    config.data.num_threads = 16  # threads that read and decode, in each
    config.data.max_bad_records = 100  # undecodable records after which the run stops

    config.evaluate = ConfigDict()
    config.evaluate.size = config_dict.placeholder(int)  # pixels; None: views.global_size
    config.evaluate.crop = 0.875  # share of the shorter side that the centre crop keeps
    config.evaluate.batch_size = 256  # images a batch, over all devices and processes
    config.evaluate.k = (10, 20, 100, 200)  # neighbours that vote
    return config.lock()  # a misspelt field is an error


def parse_config(argv: list[str]) -> tuple[ConfigDict, list[str]]:
    """Reads --config=FILE[:arguments] and --config.field=value, and returns what is left.

    Raises:
      UserError: no or an unreadable config file, an unknown field, a value of another type.
    """
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=["", *argv])
    try:
        rest = values(["", *argv], known_only=True)[1:]
        if holder.value is not None:
            holder.value.lock()  # a file that did not open is only reported when it is used
    except (flags.Error, OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        message = _unknown_field(argv) or " ".join(str(error).split())
        raise UserError(message) from error
    if holder.value is None:
        raise UserError("--config is missing; give a file, such as --config=configs/quickstart.py")
    return holder.value, rest


def _unknown_field(argv: list[str]) -> str:
    """Names the first --config.field that is none, and the field most like it; "" if all are."""
    config = default_config()
    fields = [f"config.{name}" for name in (*flatten(config), *config)]
    for argument in argv:
        name = argument.split("=")[0].removeprefix("--")
        if name.startswith("config.") and name not in fields:
            similar = difflib.get_close_matches(name, fields, n=1, cutoff=0.0)[0]
            return f"{name} is no field; the one most like it is {similar}"
    return ""


# What may differ between two starts of the same run: it changes how the run is done, not what
# it computes (beyond rounding).
FREE_FIELDS = (
    "parallel", "accum_steps", "remat", "log_every_steps", "checkpoint_every_steps",
    "checkpoint_keep", "checkpoint_keep_every_steps", "knn_every_steps", "knn_baselines",
    "max_bad_steps", "init_from", "init_parts", "loss.prototype_chunk", "data.data_dir",
    "data.test_split",
    "data.num_workers", "data.num_threads", "data.max_bad_records", "evaluate",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RunNumbers:
    """What follows from a config, a data set and the devices. Steps count from 0."""

    num_images: int
    steps_per_epoch: int
    total_steps: int
    images_per_device: int
    peak_learning_rate: float
    warmup_steps: int
    freeze_prototypes_steps: int


def resolve(config: ConfigDict, *, num_images: int, num_devices: int) -> RunNumbers:
    """Checks a config against data and devices, and computes the numbers of the run.

    Args:
      config: after all overrides; see `check`.
      num_images: in the training split.
      num_devices: over all processes.

    Raises:
      UserError: names the first field that cannot work.
    """
    check(config)
    images_per_device = _divide("batch_size", config.batch_size, num_devices, "devices")
    _divide("accum_steps", images_per_device, config.accum_steps, "accum_steps parts a device")
    _divide("evaluate.batch_size", config.evaluate.batch_size, num_devices, "devices")
    if num_images < 1:
        raise UserError(f"config.data.train_split = {config.data.train_split!r} has no images")
    steps_per_epoch = max(1, num_images // config.batch_size)
    total_steps = config.total_steps
    if total_steps is None:
        total_steps = round(config.total_epochs * steps_per_epoch)
    optimizer = config.optimizer
    return RunNumbers(
        num_images=num_images,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        images_per_device=images_per_device,
        peak_learning_rate=optimizer.learning_rate * config.batch_size / 256,
        warmup_steps=round(optimizer.warmup_epochs * steps_per_epoch),
        freeze_prototypes_steps=round(optimizer.freeze_prototypes_epochs * steps_per_epoch),
    )


def _divide(field: str, number: int, parts: int, what: str) -> int:
    if number % parts:
        raise UserError(f"config.{field}: {number} images cannot be divided among {parts} {what}")
    return number // parts


def check(config: ConfigDict) -> None:
    """Refuses what cannot work whatever the data and the devices are.

    Raises:
      UserError: names the field, its value, and what would do.
    """

    def one_of(field: str, *allowed: Any) -> None:
        require(field, lambda x: x in allowed, f"one of {', '.join(map(repr, allowed))}")

    def require(field: str, holds: Any, wanted: str) -> None:
        value = _get(config, field)
        try:
            holding = holds(value)
        except TypeError:  # such as text among numbers
            holding = False
        if not holding:
            raise UserError(f"config.{field} = {value!r}: it must be {wanted}")

    def at_least(low: int, *fields: str) -> None:
        for field in fields:
            require(field, lambda x: math.isfinite(x) and x >= low, f"at least {low}")

    def positive(*fields: str) -> None:
        for field in fields:
            require(field, lambda x: math.isfinite(x) and x > 0, "more than 0")

    def share(*fields: str) -> None:
        for field in fields:
            require(field, lambda x: 0 <= x <= 1, "between 0 and 1")

    def interval(field: str, low: float, high: float) -> None:
        require(
            field,
            lambda x: len(x) == 2 and low < x[0] <= x[1] <= high,
            f"two numbers, rising, more than {low} and at most {high}",
        )

    one_of("dtype", "float32", "bfloat16")
    one_of("parallel", "pmap", "shard_map")
    one_of("remat", "none", "dots", "block")
    one_of("init_parts", "all", "backbone")
    one_of("optimizer.name", "adamw", "sgd", "lars")
    one_of("backbone.attention_dtype", None, "float32", "bfloat16")
    at_least(
        1, "batch_size", "accum_steps", "max_bad_steps", "log_every_steps",
        "checkpoint_every_steps", "checkpoint_keep", "evaluate.batch_size", "head.num_prototypes",
        "head.hidden_dim", "head.bottleneck_dim", "data.num_threads", "views.global_size",
        "views.local_size",
    )  # fmt: skip
    at_least(
        0, "seed", "knn_every_steps", "views.num_local", "loss.prototype_chunk",
        "loss.warmup_teacher_temp_epochs", "optimizer.learning_rate",
        "optimizer.min_learning_rate", "optimizer.warmup_epochs", "optimizer.weight_decay",
        "optimizer.final_weight_decay", "optimizer.clip_norm",
        "optimizer.freeze_prototypes_epochs", "data.num_workers", "data.max_bad_records",
        "views.brightness", "views.contrast", "views.saturation",
    )  # fmt: skip
    positive(
        "total_epochs", "loss.student_temp", "loss.teacher_temp", "loss.warmup_teacher_temp",
        "evaluate.crop",
    )  # fmt: skip
    share(
        "views.flip", "views.jitter_probability", "views.grayscale", "loss.center_momentum",
        "optimizer.teacher_momentum", "optimizer.final_teacher_momentum", "evaluate.crop",
        "views.hue",
    )  # fmt: skip
    for field in (
        "total_steps", "checkpoint_keep_every_steps", "evaluate.size", "backbone.embed_dim",
        "backbone.window_size", "backbone.patch_size", "backbone.image_size",
    ):  # fmt: skip
        if _get(config, field) is not None:
            at_least(1, field)
    for field in ("backbone.depths", "backbone.num_heads"):
        if _get(config, field) is not None:
            require(
                field,
                lambda x: len(x) and all(isinstance(n, int) and n >= 1 for n in x),
                "whole numbers from 1, one for each stage",
            )
    if config.backbone.drop_path_rate is not None:
        require("backbone.drop_path_rate", lambda x: 0 <= x < 1, "at least 0 and less than 1")
    interval("views.global_scale", 0.0, 1.0)
    interval("views.local_scale", 0.0, 1.0)
    interval("views.ratio", 0.0, math.inf)
    interval("views.blur_sigma", 0.0, math.inf)
    for field in ("views.blur_probability", "views.solarize"):
        require(
            field,
            lambda x: len(x) == 3 and all(0 <= p <= 1 for p in x),
            "three numbers between 0 and 1 (global view 1, global 2, local)",
        )
    require("views.mean", lambda x: len(x) == 3 and all(map(math.isfinite, x)), "three numbers")
    require("views.std", lambda x: len(x) == 3 and all(v > 0 for v in x), "three positive numbers")
    require("evaluate.k", lambda x: len(x) and all(k >= 1 for k in x), "numbers of neighbours")
    size = max(config.views.global_size, config.views.local_size if config.views.num_local else 0)
    require(
        "data.canvas_size", lambda x: x >= size, f"at least {size}, the side of the largest view"
    )
    _check_backbone(config)


def _check_backbone(config: ConfigDict) -> None:
    from esvit_jax.models import create_backbone

    with renamed(**{name: f"config.backbone.{name}" for name in config.backbone}):
        create_backbone(**config.backbone)


def _get(config: ConfigDict, field: str) -> Any:
    for name in field.split("."):
        config = config[name]
    return config


def flatten(config: ConfigDict) -> dict[str, Any]:
    """{"optimizer.learning_rate": 5e-4, …}, as JSON would hold the values."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= {f"{name}.{rest}": x for rest, x in flatten(value).items()}
        else:
            flat[name] = list(value) if isinstance(value, tuple) else value
    return flat


def unflatten(flat: dict[str, Any]) -> ConfigDict:
    """The inverse of `flatten`.

    Raises:
      UserError: a name is not a field of the config.
    """
    config = default_config()
    for name, value in flat.items():
        try:
            *groups, last = name.split(".")
            group = _get(config, ".".join(groups)) if groups else config
            group[last] = tuple(value) if isinstance(value, list) else value
        except (KeyError, TypeError) as error:
            raise UserError(f"config.{name} = {value!r} is no field of this version") from error
    return config


def differences(old: ConfigDict, new: ConfigDict) -> list[str]:
    """The fields that make two configs different runs, a line each."""
    old_flat, new_flat = flatten(old), flatten(new)

    def free(name: str) -> bool:
        return any(name == field or name.startswith(field + ".") for field in FREE_FIELDS)

    names = dict.fromkeys(itertools.chain(old_flat, new_flat))
    return [
        f"config.{name} was {old_flat.get(name)!r} and is {new_flat.get(name)!r} now"
        for name in names
        if not free(name) and old_flat.get(name) != new_flat.get(name)
    ]
