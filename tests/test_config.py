"""Defaults, refusals, derived numbers, and the command line of configs."""

import inspect
import math
import re

import pytest

from esvit_jax import errors
from esvit_jax.config import (
    FREE_FIELDS,
    check,
    default_config,
    differences,
    flatten,
    parse_config,
    resolve,
    unflatten,
)
from esvit_jax.errors import UserError


def changed(**fields):
    """The default config with some fields set; "__" stands for the dot."""
    config = default_config()
    for field, value in fields.items():
        *groups, last = field.split("__")
        group = config
        for name in groups:
            group = group[name]
        group[last] = value
    return config


def test_every_field_has_a_comment():
    source = inspect.getsource(default_config)
    commented = re.findall(r"^ +config\.([\w.]+) = (?!ConfigDict\(\)).*\S  # \S", source, re.M)
    assert sorted(commented) == sorted(flatten(default_config()))


def test_default_passes():
    check(default_config())


ONE_OF = {
    "dtype": "float16",
    "parallel": "gspmd",
    "remat": "all",
    "init_parts": "heads",
    "optimizer.name": "adam",
    "backbone.attention_dtype": "float16",
}
AT_LEAST_1 = (
    "batch_size", "accum_steps", "max_bad_steps", "log_every_steps", "checkpoint_every_steps",
    "checkpoint_keep", "evaluate.batch_size", "head.num_prototypes", "head.hidden_dim",
    "head.bottleneck_dim", "data.num_threads", "views.global_size", "views.local_size",
    "total_steps", "checkpoint_keep_every_steps", "evaluate.size", "backbone.embed_dim",
    "backbone.window_size", "backbone.patch_size", "backbone.image_size",
)  # fmt: skip
AT_LEAST_0 = (
    "seed", "knn_every_steps", "views.num_local", "loss.prototype_chunk",
    "loss.warmup_teacher_temp_epochs", "data.num_workers", "data.max_bad_records",
    "optimizer.learning_rate", "optimizer.min_learning_rate", "optimizer.warmup_epochs",
    "optimizer.weight_decay", "optimizer.final_weight_decay", "optimizer.clip_norm",
    "optimizer.freeze_prototypes_epochs",
)  # fmt: skip
POSITIVE = (
    "total_epochs", "loss.student_temp", "loss.teacher_temp", "loss.warmup_teacher_temp",
    "evaluate.crop",
)  # fmt: skip
SHARES = (
    "views.flip", "views.jitter_probability", "views.grayscale", "views.hue",
    "loss.center_momentum", "optimizer.teacher_momentum", "optimizer.final_teacher_momentum",
    "evaluate.crop",
)  # fmt: skip
REFUSED = [
    *ONE_OF.items(),
    *((field, 0) for field in AT_LEAST_1),
    *((field, -1) for field in AT_LEAST_0),
    ("optimizer.learning_rate", math.nan),
    ("optimizer.weight_decay", math.inf),
    *((field, 0) for field in POSITIVE),
    ("loss.teacher_temp", math.inf),
    *((field, 1.01) for field in SHARES),
    *((field, -0.01) for field in SHARES if field != "evaluate.crop"),
    ("views.flip", math.nan),
    ("views.global_scale", (0.0, 1.0)),
    ("views.global_scale", (0.5, 1.1)),
    ("views.local_scale", (0.4, 0.05)),
    ("views.ratio", (0.75, 1.0, 1.25)),
    ("views.ratio", (0.0, 1.0)),
    ("views.blur_sigma", (2.0, 0.1)),
    ("views.blur_probability", (1.0, 0.1)),
    ("views.mean", (0.5, 0.5)),
    ("views.std", (0.2, 0.0, 0.2)),
    ("views.brightness", -0.1),
    ("views.solarize", (0.0, 1.5, 0.0)),
    ("evaluate.k", ()),
    ("evaluate.k", (10, 0)),
    ("views.ratio", ("two", "three")),
    ("data.canvas_size", 223),
    ("backbone.depths", ()),
    ("backbone.depths", (2, 2, 0, 2)),
    ("backbone.depths", (2, "two", 6, 2)),
    ("backbone.num_heads", (3, 6, 12, 0)),
    ("backbone.drop_path_rate", 1.0),
    ("backbone.drop_path_rate", -0.1),
    ("backbone.name", "swin_huge"),
    ("backbone.num_heads", (3, 6)),
    ("backbone.num_heads", (3, 6, 12, 25)),
    ("backbone.image_size", 31),
]


@pytest.mark.parametrize(("field", "value"), REFUSED)
def test_refused_by_name_and_value(field, value):
    config = changed(**{field.replace(".", "__"): value})
    value = flatten(config)[field]  # as the field's type holds it
    shown = tuple(value) if isinstance(value, list) else value
    with pytest.raises(UserError) as error:
        check(config)
    message = str(error.value)
    assert re.match(rf"config\.{re.escape(field)} = {re.escape(repr(shown))}", message)
    assert "\n" not in message
    with pytest.raises(UserError, match=re.escape(message)):
        resolve(config, num_images=1000, num_devices=1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("total_steps", 1), ("evaluate.size", 1), ("views.num_local", 0), ("evaluate.crop", 1.0),
        ("optimizer.clip_norm", 0.0), ("loss.prototype_chunk", 0), ("views.ratio", (1.0, 1.0)),
        ("data.canvas_size", 224), ("backbone.image_size", 32), ("remat", "dots"),
    ],
)  # fmt: skip
def test_limits_are_allowed(field, value):
    check(changed(**{field.replace(".", "__"): value}))


def test_local_views_count_for_the_canvas_only_where_there_are_any():
    check(changed(views__local_size=600, views__num_local=0))
    with pytest.raises(UserError, match=r"config\.data\.canvas_size = 512: .* at least 600"):
        check(changed(views__local_size=600))


def test_published_recipe_in_numbers():
    """ImageNet-1K, batch 512 on 8 devices."""
    numbers = resolve(default_config(), num_images=1_281_167, num_devices=8)
    assert numbers.num_images == 1_281_167
    assert numbers.steps_per_epoch == 2_502
    assert numbers.total_steps == 750_600
    assert numbers.images_per_device == 64
    assert numbers.peak_learning_rate == pytest.approx(1e-3, rel=1e-12)
    assert numbers.warmup_steps == 25_020
    assert numbers.freeze_prototypes_steps == 2_502


def test_total_steps_win_and_small_data_are_an_epoch():
    config = changed(total_steps=7, optimizer__warmup_epochs=0.5, batch_size=64)
    config.optimizer.freeze_prototypes_epochs = 1.5
    numbers = resolve(config, num_images=63, num_devices=1)
    assert numbers.steps_per_epoch == 1 and numbers.total_steps == 7
    numbers = resolve(config, num_images=64 * 10 + 63, num_devices=1)
    assert numbers.steps_per_epoch == 10
    assert numbers.warmup_steps == 5 and numbers.freeze_prototypes_steps == 15


@pytest.mark.parametrize(
    ("fields", "num_images", "message"),
    [
        ({"batch_size": 510}, 1000, r"config\.batch_size: 510 images .* 8 devices"),
        ({"accum_steps": 5}, 1000, r"config\.accum_steps: 64 images .* 5 accum_steps"),
        ({"evaluate__batch_size": 100}, 1000, r"config\.evaluate\.batch_size: 100 images"),
        ({}, 0, r"config\.data\.train_split = 'train' has no images"),
    ],
)
def test_refused_for_these_devices_and_data(fields, num_images, message):
    with pytest.raises(UserError, match=message):
        resolve(changed(**fields), num_images=num_images, num_devices=8)


def test_flatten_is_undone_by_unflatten():
    config = changed(
        backbone__depths=(2, 2), total_steps=5, views__ratio=(0.5, 2.0), optimizer__name="lars"
    )
    flat = flatten(config)
    assert flat["backbone.depths"] == [2, 2] and flat["backbone.num_heads"] is None
    again = unflatten(flat)
    assert flatten(again) == flat
    assert again.backbone.depths == (2, 2) and again.evaluate.k == (10, 20, 100, 200)


@pytest.mark.parametrize(
    ("name", "value"), [("optimizer.lr", 1.0), ("momentum", 1.0), ("batch_size.x", 1), ("a.b", 1)]
)
def test_unflatten_names_what_is_unknown(name, value):
    with pytest.raises(UserError, match=rf"config\.{re.escape(name)} = "):
        unflatten(flatten(default_config()) | {name: value})


def test_differences_names_what_makes_another_run():
    old, new = default_config(), changed(optimizer__weight_decay=0.1, backbone__depths=(2, 2))
    assert differences(old, old) == []
    assert differences(old, new) == [
        "config.backbone.depths was None and is [2, 2] now",
        "config.optimizer.weight_decay was 0.04 and is 0.1 now",
    ]


def test_free_fields_are_fields_and_make_no_difference():
    flat = flatten(default_config())
    names = {f: {n for n in flat if n == f or n.startswith(f + ".")} for f in FREE_FIELDS}
    assert all(names.values()), names
    free = set().union(*names.values())
    other = {int: 3, str: "other", list: [3, 4], float: 0.123, type(None): 7}

    def another(value):
        return not value if isinstance(value, bool) else other[type(value)]

    new = unflatten(flat | {name: another(flat[name]) for name in free})
    assert differences(default_config(), new) == []
    for name in flat.keys() - free - {n for n in flat if n.startswith("backbone.")}:
        lines = differences(default_config(), unflatten(flat | {name: another(flat[name])}))
        assert len(lines) == 1 and lines[0].startswith(f"config.{name} was "), name


# Of ml_collections' own reading of files.
reads_a_file = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(
        "from esvit_jax.config import default_config\n\n\n"
        "def get_config(batch='16'):\n"
        "    config = default_config()\n"
        "    config.batch_size = int(batch)\n"
        "    return config\n"
    )
    return path


@reads_a_file
def test_parse_reads_file_argument_and_overrides(config_file):
    config, rest = parse_config(
        [
            f"--config={config_file}:32", "--workdir=runs/x", "--config.backbone.depths=(2,2)",
            "--config.total_steps=5", "--config.backbone.drop_path_rate=0.3",
            "--config.views.ratio=(0.5,2.0)", "--config.loss.region=false",
            "--config.optimizer.name=sgd", "extra",
        ]
    )  # fmt: skip
    assert rest == ["--workdir=runs/x", "extra"]
    assert config.batch_size == 32 and config.total_steps == 5
    assert config.backbone.depths == (2, 2) and config.backbone.drop_path_rate == 0.3
    assert config.views.ratio == (0.5, 2.0) and config.optimizer.name == "sgd"
    assert config.loss.region is False
    assert parse_config([f"--config={config_file}"])[0].batch_size == 16


@reads_a_file
@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("--config.optimizer.lr=1", "lr"),
        ("--config.batch_size=many", "batch_size"),
        ("--config.total_steps=soon", "total_steps"),
        ("--config.loss.region=perhaps", "region"),
    ],
)
def test_parse_names_a_bad_override(config_file, override, named):
    with pytest.raises(UserError, match=named) as error:
        parse_config([f"--config={config_file}", override])
    assert "\n" not in str(error.value)


@reads_a_file
def test_unknown_field_is_named_with_the_one_most_like_it(config_file):
    with pytest.raises(UserError) as error:
        parse_config([f"--config={config_file}", "--config.optimizer.learning_rat=1.0"])
    assert str(error.value) == (
        "config.optimizer.learning_rat is no field; the one most like it is "
        "config.optimizer.learning_rate"
    )


@reads_a_file
def test_parse_names_a_missing_file(tmp_path):
    with pytest.raises(UserError, match="nowhere.py"):
        parse_config([f"--config={tmp_path}/nowhere.py"])
    with pytest.raises(UserError, match="--config is missing"):
        parse_config(["--workdir=x"])


@reads_a_file
def test_misspelt_field_in_a_file_is_named(config_file):
    config_file.write_text(config_file.read_text().replace("batch_size", "batchsize"))
    with pytest.raises(UserError, match="batchsize"):
        parse_config([f"--config={config_file}"])


def test_user_error_is_a_value_error():
    assert issubclass(errors.UserError, ValueError)
