"""`esvit config`."""

import json
import re

import pytest

from esvit_jax.__main__ import COMMANDS
from esvit_jax.commands.config import main
from esvit_jax.config import flatten, load_config
from esvit_jax.config.fields import FIELDS
from esvit_jax.errors import UserError

Capture = pytest.CaptureFixture[str]


def test_it_is_a_command():
    assert COMMANDS["config"][0] == "esvit_jax.commands.config"


def test_it_prints_every_field_and_marks_what_is_not_the_default(capsys: Capture):
    main(["--config=quickstart", "--config.seed=3"])
    shown, _ = capsys.readouterr()
    rows = re.findall(r"^([ *]) ([a-z][\w.]+) {2,}(.+)$", shown, re.M)
    assert [name for _, name, _ in rows] == list(FIELDS)
    config = load_config("quickstart")
    config.seed = 3
    changed = {name for name, field in FIELDS.items() if config[name] != field.default}
    assert {name for mark, name, _ in rows if mark == "*"} == changed
    lines = {name: " ".join(rest.split()) for _, name, rest in rows}
    assert lines["seed"] == f"3 [default 0] {FIELDS['seed'].comment}"
    assert lines["backbone.attention_dtype"].startswith("None ['float32' in swin_tiny] of")
    assert lines["backbone.depths"].startswith("(2, 2) [default None] blocks")


def test_it_prints_the_numbers_of_the_run(capsys: Capture):
    main(["--config=quickstart"])
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[lines.index("The run:") + 1 :] == [
        "images to train on 6,000",
        "steps an epoch 93",
        "steps of the run 1,860",
        "steps in which the learning rate rises 46",
        "steps in which prototypes do not move 0",
        "peak of the learning rate 0.0015",
        "images a device 64",
    ]


def test_json_has_config_changes_and_numbers(capsys: Capture):
    main(["--config=esvit_swin", "--json", "--num_images=1281167", "--num_devices=8"])
    result = json.loads(capsys.readouterr().out)
    assert result["config"] == flatten(load_config("esvit_swin"))
    assert result["changed"] == {"backbone.window_size": None}
    assert result["numbers"] == {
        "num_images": 1_281_167, "steps_per_epoch": 2502, "total_steps": 750_600,
        "images_per_device": 64, "peak_learning_rate": 1e-3, "warmup_steps": 25_020,
        "freeze_prototypes_steps": 2502,
    }  # fmt: skip


def test_without_the_data_it_says_what_is_missing(capsys: Capture):
    main(["--config=quickstart", "--config.data.name=folder:/nowhere", "--json"])
    out, err = capsys.readouterr()
    assert json.loads(out)["numbers"] is None
    assert err.startswith("the numbers of the run need its data, or --num_images=…: config.data")
    assert "/nowhere" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("flag", "wanted"),
    [
        ("--config.backbone.num_heads=(3,5)", r"config\.backbone\.num_heads = \(3, 5\): 5 does"),
        ("--config.data.canvas_size=16", r"config\.data\.canvas_size = 16: it must be at least 28"),
        ("--num_images=0", "--num_images: '0' is no whole number from 1 up"),
        ("--num_devices=7", r"config\.batch_size = 64: 7 devices need a multiple of 7"),
    ],
)
def test_what_cannot_work_is_refused(flag: str, wanted: str, capsys: Capture):
    with pytest.raises(UserError, match=wanted):
        main(["--config=quickstart", flag])
    assert capsys.readouterr().out == ""
