"""The table of fields: defaults, refusals, derived numbers, and configs read back from JSON."""

import copy
import json
import math
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ml_collections import config_flags

from esvit_jax import errors
from esvit_jax.config import (
    ConfigDict,
    check,
    default_config,
    differences,
    flatten,
    resolve,
    unflatten,
)
from esvit_jax.config.fields import FIELDS
from esvit_jax.config.reference import reference
from esvit_jax.errors import UserError

OLD_CONFIG = Path(__file__).parent / "data" / "config_0.1.0.json"


def changed(**fields: object) -> ConfigDict:
    """The default config with some fields set; "__" stands for the dot."""
    config = default_config()
    for field, value in fields.items():
        section, _, last = field.rpartition("__")
        (config[section] if section else config)[last] = value
    return config


def test_a_line_of_the_table_is_whole():
    for name, field in FIELDS.items():
        assert name.count(".") <= 1 and re.fullmatch(r"[a-z_.]+", name)
        assert field.comment and field.comment[0] != " " and field.comment[-1] != ".", name
        field.rule.require(name, field.default)
        assert field.default is None or type(field.default) is field.rule.type, name
        assert field.rule.words.endswith(", or None") == field.rule.optional, name


def test_a_section_stands_together():
    sections = [name.rpartition(".")[0] for name in FIELDS]
    assert sections == sorted(sections, key=sections.index)


def test_default_config_is_that_of_0_1_0():
    """But for fields that are new, which an old config leaves at their defaults, and for one."""
    old = json.loads(OLD_CONFIG.read_text())["config"]
    new = {
        "backbone.attention": None, "compilation_cache": True, "data.max_wait_seconds": 300.0,
        "lock_seconds": 60.0, "profile_steps": None, "init_step": None,
        "linear_every_steps": 0, "head.batch_norm": False, "loss.region_weight": 0.5,
        "backbone.base_width": None, "backbone.embed_dims": None, "backbone.num_global": None,
        "backbone.patch_sizes": None, "backbone.window_sizes": None,
    }  # fmt: skip
    faster = {"loss.prototype_chunk": 4096}
    assert flatten(default_config()) == old | new | faster
    assert [n for n in flatten(default_config()) if n not in new] == list(old)  # in their order
    loaded = unflatten(old)
    assert flatten(loaded) == old | new and differences(loaded, default_config()) == []
    assert old["total_epochs"] == 300 and type(loaded.total_epochs) is float


def test_default_passes():
    check(default_config())


ONE_OF = {
    "dtype": "float16",
    "parallel": "gspmd",
    "remat": "all",
    "init_parts": "heads",
    "optimizer.name": "adam",
    "backbone.attention_dtype": "float16",
    "backbone.attention": "cuda",
}
AT_LEAST_1 = (
    "batch_size", "accum_steps", "max_bad_steps", "log_every_steps", "checkpoint_every_steps",
    "checkpoint_keep", "lock_seconds", "data.max_wait_seconds",
    "evaluate.batch_size", "head.hidden_dim", "head.bottleneck_dim",
    "data.num_threads", "views.global_size", "views.local_size", "total_steps",
    "checkpoint_keep_every_steps", "evaluate.size", "backbone.embed_dim",
    "backbone.window_size", "backbone.patch_size", "backbone.image_size", "backbone.base_width",
)  # fmt: skip
AT_LEAST_0 = (
    "seed", "init_step", "knn_every_steps", "views.num_local", "loss.prototype_chunk",
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
    # What would be NaN, more than its counter holds, or end long after it could be known.
    ("head.num_prototypes", 1),
    ("optimizer.learning_rate", 1e300),
    ("optimizer.learning_rate", -math.inf),
    ("batch_size", 10**9),
    ("total_steps", 2**31),
    ("total_steps", 10**13),
    ("total_epochs", 1e300),
    ("log_every_steps", 10**13),
    ("seed", 2**63),
    ("evaluate.k", (1.5,)),
    ("evaluate.k", (10, True)),
    ("data.canvas_size", 0),
    ("data.canvas_size", 10**6),
    ("data.num_threads", 10**9),
    ("loss.student_temp", 1e-300),
    ("profile_steps", (0, 5)),
    ("profile_steps", (15, 10)),
    ("profile_steps", (10, 10.5)),
    ("profile_steps", (10, 15, 20)),
    ("views.mean", (0.5, 0.5, math.nan)),
    ("views.std", (0.2, 0.2, math.inf)),
    ("views.global_scale", (0.4, math.nan)),
    # A ConfigDict takes these for the field's own type.
    ("batch_size", True),
    ("backbone.window_size", True),
    ("evaluate.k", (True, 5)),
    ("views.flip", None),
    ("batch_size", None),
    ("loss.region", None),
    ("data.name", None),
]


@pytest.mark.parametrize("name", FIELDS)
def test_no_number_may_be_nan_or_infinite_or_a_switch(name: str):
    rule = FIELDS[name].rule
    for bad in (math.nan, math.inf, -math.inf, 10**400, True):
        if rule.type in (int, float):
            with pytest.raises(UserError):
                rule.require(name, bad)
        if rule.type is tuple:
            size = len(FIELDS[name].default or (2, 2))  # type: ignore
            with pytest.raises(UserError):
                rule.require(name, (1,) * (size - 1) + (bad,))


@pytest.mark.parametrize(("field", "value"), REFUSED)
def test_refused_by_name_and_value(field: str, value: object):
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
def test_limits_are_allowed(field: str, value: object):
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
        ({"batch_size": 510}, 1000, r"config\.batch_size = 510: 8 devices .* 504 or 512"),
        ({"batch_size": 5}, 1000, r"config\.batch_size = 5: 8 devices .* such as 8$"),
        ({"accum_steps": 5}, 1000, r"config\.accum_steps = 5: .* the 64 images of a device"),
        ({"evaluate__batch_size": 100}, 1000, r"config\.evaluate\.batch_size = 100: .* 96 or 104"),
        ({}, 0, r"config\.data\.train_split = 'train': it has no images"),
    ],
)
def test_refused_for_these_devices_and_data(
    fields: dict[str, object], num_images: int, message: str
):
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
    ("name", "value"),
    [("optimizer.lr", 1.0), ("momentum", 1.0), ("batch_size.x", 1), ("a.b", 1), ("views", {})],
)
def test_unflatten_names_what_is_unknown(name: str, value: object):
    with pytest.raises(UserError, match=rf"^config\.{re.escape(name)} is (no field|a section); "):
        unflatten(flatten(default_config()) | {name: value})


def test_differences_names_what_makes_another_run():
    old, new = default_config(), changed(optimizer__weight_decay=0.1, backbone__depths=(2, 2))
    assert differences(old, old) == []
    assert differences(old, new) == [
        "config.backbone.depths was None and is [2, 2] now",
        "config.optimizer.weight_decay was 0.04 and is 0.1 now",
    ]


FREE = {
    "backbone.attention", "compilation_cache", "profile_steps",
    "parallel", "accum_steps", "remat", "log_every_steps", "checkpoint_every_steps",
    "checkpoint_keep", "checkpoint_keep_every_steps", "knn_every_steps", "knn_baselines",
    "linear_every_steps", "lock_seconds", "max_bad_steps", "init_from", "init_step", "init_parts",
    "loss.prototype_chunk", "data.data_dir",
    "data.test_split", "data.num_workers", "data.num_threads", "data.max_bad_records",
    "data.max_wait_seconds",
    "evaluate.size", "evaluate.crop", "evaluate.batch_size", "evaluate.k",
}  # fmt: skip


@pytest.mark.parametrize("name", FIELDS)
def test_only_free_fields_make_no_difference(name: str):
    old, new = default_config(), default_config()
    other = {int: 3, str: "other", tuple: (3, 4), float: 0.123, bool: not old[name]}
    section, _, last = name.rpartition(".")
    (new[section] if section else new)[last] = other[FIELDS[name].rule.type]
    lines = differences(old, new)
    assert len(lines) == (name not in FREE)
    assert all(line.startswith(f"config.{name} was ") for line in lines)


HAND_EDITS: list[tuple[str, Any, str]] = [
    ("batch_size", "64", "a whole number"),
    ("batch_size", 64.0, "a whole number"),
    ("batch_size", None, "a whole number"),
    ("batch_size", [64], "a whole number"),
    ("batch_size", {"images": 64}, "a whole number"),
    ("seed", True, "a whole number"),
    ("total_steps", "soon", "a whole number .* or None"),
    ("total_epochs", [300], "a number"),
    ("optimizer.learning_rate", "5e-4", "a number"),
    ("optimizer.learning_rate", math.nan, "a number"),  # JSON as Python reads it has NaN
    ("optimizer.learning_rate", 10**400, "a number"),
    ("optimizer.name", 3, "'adamw', 'sgd' or 'lars'"),
    ("optimizer.name", None, "'adamw', 'sgd' or 'lars'"),
    ("dtype", ["float32"], "'float32' or 'bfloat16'"),
    ("loss.region", "yes", "True or False"),
    ("loss.region", 1, "True or False"),
    ("loss.region_weight", 0.0, "a number from 0 to 1"),
    ("data.name", None, "text"),
    ("data.name", {}, "text"),
    ("data.canvas_size", 0, "a whole number from 1"),
    ("views.ratio", 0.75, "two numbers"),
    ("views.ratio", [[0.75], [1.5]], "two numbers"),
    ("views.mean", "grey", "three numbers"),
    ("evaluate.k", 20, "one or more whole numbers"),
    ("evaluate.k", "10", "one or more whole numbers"),
    ("evaluate.k", [10, "20"], "one or more whole numbers"),
    ("backbone.depths", [2, 2.5], "one or more whole numbers .* or None"),
    ("backbone.name", 5, "text"),
    ("backbone.name", "swim", "known are swin_tiny"),
    ("backbone.image_size", 8, "at least 32"),
]


@pytest.mark.parametrize(("name", "value", "wanted"), HAND_EDITS)
def test_a_hand_edited_config_json_is_refused_in_one_line(name: str, value: Any, wanted: str):
    content = json.loads(OLD_CONFIG.read_text())
    content["config"][name] = value
    flat = json.loads(json.dumps(content))["config"]
    with pytest.raises(UserError) as error:
        check(unflatten(flat))
    shown = tuple(value) if isinstance(value, list) else value
    assert re.match(rf"config\.{re.escape(name)} = {re.escape(repr(shown))}: ", str(error.value))
    assert re.search(wanted, str(error.value)) and "\n" not in str(error.value)


@pytest.mark.parametrize("flat", [[], None, "config", 5])
def test_a_config_that_is_no_object_is_refused(flat: Any):
    with pytest.raises(UserError, match="an object of names and values, not "):
        unflatten(flat)


def test_a_config_that_lost_a_field_or_got_one_is_refused():
    config = default_config()
    with config.unlocked():
        del config.views["ratio"]
    with pytest.raises(UserError, match=r"^config\.views\.ratio is missing"):
        check(config)
    config = default_config()
    with config.unlocked():
        config.optimizer.momentum = 0.9
    with pytest.raises(UserError, match=r"^config\.optimizer\.momentum is no field"):
        check(config)
    config = default_config()
    config.head = None
    with pytest.raises(UserError, match=r"^config\.head is a section; its fields are head\.num"):
        check(config)


def test_steps_that_overflow_their_counter_are_refused():
    config = changed(total_epochs=1e5, optimizer__warmup_epochs=0.0)
    with pytest.raises(UserError, match=r"config\.total_epochs = 100000\.0: 2,500,000,000,000 s"):
        resolve(config, num_images=25_000_000 * 512, num_devices=1)
    config = changed(total_steps=100, optimizer__warmup_epochs=1e5)
    with pytest.raises(UserError, match=r"config\.optimizer\.warmup_epochs = 100000\.0: 2,500"):
        resolve(config, num_images=25_000_000 * 512, num_devices=1)


def test_parts_of_an_epoch_are_a_length():
    numbers = resolve(changed(total_epochs=0.1), num_images=100 * 512, num_devices=1)
    assert numbers.total_steps == 10
    with pytest.raises(UserError, match=r"config\.total_epochs = 0\.1: that is no step"):
        resolve(changed(total_epochs=0.1), num_images=512, num_devices=1)


def test_a_misspelt_field_is_named_with_the_one_most_like_it():
    config = default_config()
    with pytest.raises(AttributeError, match="^batchsize is no field; .* is batch_size$"):
        config.batchsize = 3
    with pytest.raises(AttributeError, match="^rate is no field; .* is ratio$"):
        config.views.rate = 3
    with pytest.raises(TypeError):
        config.batch_size = "many"


def test_copies_are_configs_of_ours():
    config = changed(total_steps=5)
    for again in (
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
        config.copy_and_resolve_references(),
        ConfigDict(config),  # type: ignore
        unflatten(flatten(config)),
    ):
        assert type(again) is ConfigDict and type(again.views) is ConfigDict
        assert again.is_locked and flatten(again) == flatten(config)
        check(again)


def test_a_config_is_a_flag_of_ml_collections_too():
    from absl import flags

    values, config = flags.FlagValues(), default_config()
    argv = ["", "--config.views.num_local=4", "--config.total_steps=7"]
    holder = config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    values(argv)
    assert holder.value.views.num_local == 4 and holder.value.total_steps == 7
    assert type(holder.value) is ConfigDict


def test_text_of_a_config_has_a_line_a_field_in_the_order_of_the_table():
    lines = str(changed(batch_size=8)).splitlines()
    assert repr(default_config()) == str(default_config())
    assert lines[:4] == ["seed: 0", "dtype: 'bfloat16'", "parallel: 'pmap'", "batch_size: 8"]
    at = lines.index("backbone:")
    assert lines[at + 1 : at + 3] == ["  name: 'swin_tiny'", "  embed_dim: None"]
    sections = {name.rpartition(".")[0] for name in FIELDS} - {""}
    assert len(lines) == len(FIELDS) + len(sections)
    assert str(default_config().loss).splitlines()[0] == "center_momentum: 0.9"  # a section alone
    assert str(ConfigDict()) == ""


def test_a_notebook_shows_what_is_not_the_default_in_bold():
    config = changed(batch_size=8, data__name="folder:<a>")
    shown = config._repr_html_()
    assert "<td>batch_size</td><td><b>8</b></td><td>512</td><td>images a step" in shown
    assert "<td>seed</td><td>0</td><td></td>" in shown
    assert "folder:&lt;a&gt;" in shown and "<a>" not in shown
    assert shown.count("<tr>") == len(FIELDS) + 1
    assert config.views._repr_html_().startswith("<pre>")


def test_the_reference_has_every_field():
    page = reference()
    rows = re.findall(r"^\| `([\w.]+)`( ↻)? \| `(.*?)` \| (.+?) \| (.+) \|$", page, re.M)
    assert [row[0] for row in rows] == list(FIELDS)
    assert {row[0] for row in rows if row[1]} == FREE
    assert ("batch_size", "", "512", "images a step, over all devices and processes",
            "a whole number from 1 to 1,000,000") in rows  # fmt: skip


def test_configs_need_no_jax():
    code = (
        "import sys, esvit_jax.config as c; c.load_config('esvit_swin:variant=base');"
        "c.parse_config(['--config=quickstart']); print(c.default_config()); "
        "assert 'jax' not in sys.modules and 'flax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_user_error_is_a_value_error():
    assert issubclass(errors.UserError, ValueError)


def test_a_kernel_is_not_spread():
    """Asked for by name, it is refused where it would be left out."""
    config = default_config()
    config.parallel, config.backbone.name = "fsdp", "resnet50"
    with pytest.raises(UserError, match=r"^config\.parallel = 'fsdp': .* of a ResNet .*pmap"):
        check(config)
    config.backbone.name, config.backbone.attention = "swin_tiny", "pallas"
    with pytest.raises(UserError, match=r"^config\.backbone\.attention = 'pallas': .*fsdp"):
        check(config)
    config.backbone.attention = "auto"
    check(config)
