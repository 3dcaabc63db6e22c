"""Configs from files and the command line, and all that can be wrong with them."""

import subprocess
import sys
from pathlib import Path

import pytest

from esvit_jax.config import config_arguments, default_config, flatten, load_config, parse_config
from esvit_jax.config.fields import FIELDS
from esvit_jax.errors import UserError

ROOT = Path(__file__).parent.parent


@pytest.fixture(name="config_file")
def _config_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.py"
    path.write_text(
        "from esvit_jax.config import default_config\n\n\n"
        "def get_config(batch='16'):\n"
        "    config = default_config()\n"
        "    config.batch_size = int(batch)\n"
        "    return config\n"
    )
    return path


def refusal(*argv: str) -> str:
    """What `parse_config` says, which is one line."""
    with pytest.raises(UserError) as error:
        parse_config(list(argv))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_parse_reads_file_argument_and_overrides(config_file: Path):
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
    assert config.loss.region is False and config.is_locked
    assert parse_config([f"--config={config_file}"])[0].batch_size == 16


def test_values_may_follow_their_flags(config_file: Path):
    config, rest = parse_config(
        [
            "--config.knn_baselines", "--config.batch_size", "8", "--out", "x", "--config.seed=1",
            "--config", str(config_file), "--config.seed=2",
        ]
    )  # fmt: skip
    assert rest == ["--out", "x"]
    assert config.knn_baselines is True and config.batch_size == 8 and config.seed == 2
    assert refusal(f"--config={config_file}", "--config.seed", "--out") == (
        "--config.seed needs a value: --config.seed=…"
    )


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("total_epochs=0.1", 0.1),
        ("total_epochs=3", 3.0),
        ("optimizer.learning_rate=1e-3", 1e-3),
        ("batch_size=1_024", 1024),
        ("total_steps=none", None),
        ("backbone.depths=2,2", (2, 2)),
        ("backbone.depths=[2, 2]", (2, 2)),
        ("backbone.depths=None", None),
        ("evaluate.k=10", (10,)),
        ("backbone.attention_dtype=bfloat16", "bfloat16"),
        ("data.name=none", "none"),
        ("data.name=folder:/a=b,c", "folder:/a=b,c"),
        ("data.data_dir=", ""),
        ("loss.region=False", False),
    ],
)
def test_text_is_read_as_its_field_holds_it(config_file: Path, override: str, value: object):
    config, _ = parse_config([f"--config={config_file}", f"--config.{override}"])
    found = config[override.partition("=")[0]]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_reads_its_own_value(name: str):
    rule, value = FIELDS[name].rule, FIELDS[name].default
    assert rule.read(str(value)) == value


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("batch_size=many", "= 'many': it must be a whole number from 1 to 1,000,000"),
        ("batch_size=1e3", "= '1e3': it must be a whole number from 1 to 1,000,000"),
        ("batch_size=", "= '': it must be a whole number from 1 to 1,000,000"),
        ("batch_size=0", "= 0: it must be a whole number from 1 to 1,000,000"),
        (
            "total_steps=soon",
            "= 'soon': it must be a whole number from 1 to 2,147,483,647, or None",
        ),
        ("loss.region=perhaps", "= 'perhaps': it must be True or False"),
        ("optimizer.learning_rate=1e400", "= inf: it must be a number from 0 to 1,000"),
        ("views.ratio=(1,", "= '(1,': it must be two numbers, rising, from 0.001 to 1,000"),
        ("views.ratio=2", "= (2,): it must be two numbers, rising, from 0.001 to 1,000"),
        ("dtype=float16", "= 'float16': it must be 'float32' or 'bfloat16'"),
    ],
)
def test_a_bad_override_is_named_with_what_would_do(config_file: Path, override: str, wanted: str):
    name = override.partition("=")[0]
    assert refusal(f"--config={config_file}", f"--config.{override}") == f"config.{name} {wanted}"


def test_unknown_field_is_named_with_the_one_most_like_it(config_file: Path):
    assert refusal(f"--config={config_file}", "--config.optimizer.learning_rat=1.0") == (
        "config.optimizer.learning_rat is no field; the one most like it is "
        "config.optimizer.learning_rate"
    )
    assert refusal(f"--config={config_file}", "--config.head=5") == (
        "config.head is a section; its fields are head.num_prototypes, head.hidden_dim, "
        "head.bottleneck_dim, head.norm_last_layer, head.batch_norm"
    )


BAD_FILES = {
    "a syntax error": ("x = 1\ny = = 2\n", ": line 2: invalid syntax"),
    "an indentation error": ("def f():\nreturn 1\n", ": line 2: expected an indented block"),
    "a null byte": ("x = '\0'\n", "null byte"),
    "a missing module": ("\nimport nowhere\n", ": line 2: ModuleNotFoundError: No module named"),
    "a missing name": (
        "from esvit_jax.config import default_confi\n",
        ": line 1: ImportError: cannot import name 'default_confi'",
    ),
    "no function": ("config = 1\n", ": it has no function get_config"),
    "a function that is none": ("get_config = 1\n", ": it has no function get_config"),
    "nothing": ("def get_config(): pass\n", ": its get_config returns nothing, not a config"),
    "a dict": ("def get_config(): return {}\n", ": its get_config returns a dict, not a config"),
    "an exception": (
        "def helper():\n    return 1 / 0\n\n\ndef get_config():\n    return helper()\n",
        ": line 2: ZeroDivisionError: division by zero",
    ),
    "an exception with lines": (
        "def get_config():\n    raise RuntimeError('a\\nb')\n", ": line 2: RuntimeError: a b",
    ),
    "a failed assertion": ("def get_config():\n    assert False\n", ": line 2: AssertionError"),
    "a misspelt field": (
        "from esvit_jax.config import default_config\n"
        "def get_config():\n    config = default_config()\n    config.batchsize = 3\n",
        ": line 4: AttributeError: batchsize is no field; the one most like it is batch_size",
    ),
    "a wrong type": (
        "from esvit_jax.config import default_config\n"
        "def get_config():\n    config = default_config()\n    config.batch_size = 'x'\n",
        ": line 4: TypeError: Could not override field 'batch_size'",
    ),
    "a missing field": (
        "from esvit_jax.config import ConfigDict\n"
        "def get_config():\n    return ConfigDict({'seed': 1})\n",
        ": config.dtype is missing; default_config() has every field",
    ),
    "a field too many": (
        "from esvit_jax.config import default_config\n"
        "def get_config():\n    config = default_config().unlock()\n    config.momentum = 1\n"
        "    return config\n",
        ": config.momentum is no field; the one most like it is ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_FILES)
def test_a_bad_file_is_named_with_line_and_reason(tmp_path: Path, what: str):
    text, wanted = BAD_FILES[what]
    path = tmp_path / "mine.py"
    path.write_text(text)
    line = refusal(f"--config={path}")
    assert line.startswith(f"--config={path}: ") and wanted in line
    assert line.count(str(path)) == 1 and "Traceback" not in line
    assert list(tmp_path.iterdir()) == [path]  # reading leaves nothing behind


def test_files_that_are_none_are_named(tmp_path: Path):
    names = "esvit_cvt, esvit_swin, esvit_vil, fashion_mnist, quickstart, resnet50, small_data, vit"
    known = f"give a .py file or one of {names}"
    assert refusal(f"--config={tmp_path}/nowhere.py") == (
        f"--config={tmp_path}/nowhere.py: there is no such file; {known}"
    )
    assert refusal(f"--config={tmp_path}") == f"--config={tmp_path}: it is a folder; {known}"
    text = tmp_path / "config.json"
    text.write_text("{}")
    assert refusal(f"--config={text}") == f"--config={text}: it is no Python file; {known}"
    assert refusal("--config=quickstrt") == f"--config=quickstrt: there is no such file; {known}"
    assert refusal("--workdir=x") == f"--config is missing; {known}, such as --config=quickstart"
    assert refusal("--config=") == f"--config is missing; {known}, such as --config=quickstart"
    assert "there is no such file" in refusal(f"--config={'x' * 5000}")
    with pytest.raises(UserError, match=r"^source = 'quickstrt': there is no such file; give a"):
        load_config("quickstrt")


def test_arguments_of_a_file_that_takes_none(tmp_path: Path, config_file: Path):
    assert refusal("--config=quickstart:fast").endswith("its get_config takes no arguments")
    config_file.write_text("def get_config(size): pass\n")
    assert refusal(f"--config={config_file}").endswith(
        "its get_config needs arguments, after a colon"
    )
    config_file.write_text("def get_config(size): return int(size)\n")
    assert refusal(f"--config={config_file}:big").startswith(
        f"--config={config_file}:big: line 1: ValueError: invalid literal for int()"
    )


def test_arguments_are_one_of_their_choices():
    def read(text: str) -> dict[str, str | int | bool]:
        return config_arguments(
            text, variant=("tiny", "base"), window=(7, 14), region=(True, False)
        )

    assert read("") == {"variant": "tiny", "window": 7, "region": True}
    assert read("window=14,region=false") == {"variant": "tiny", "window": 14, "region": False}
    assert read("region=True,variant=base")["variant"] == "base"
    with pytest.raises(UserError, match=r"^variant = 'huge': it must be one of tiny, base$"):
        read("variant=huge")
    with pytest.raises(UserError, match=r"^there is no argument 'size'; there is variant, window"):
        read("variant=base,size=7")


def test_the_published_configs():
    assert refusal("--config=esvit_swin:variant=huge") == (
        "--config=esvit_swin:variant=huge: variant = 'huge': it must be one of tiny, small, base, "
        "large"
    )
    changes = {"backbone.window_size": 7}
    assert flatten(load_config("esvit_swin")) == flatten(default_config()) | changes
    changes = {"backbone.name": "swin_base", "backbone.window_size": 14, "batch_size": 1024}
    changes |= {"checkpoint_every_steps": 1251, "checkpoint_keep_every_steps": 25_020}
    config = load_config("esvit_swin:variant=base,window=14,region=false")
    assert flatten(config) == flatten(default_config()) | changes | {"loss.region": False}
    for row, step, fixed in (
        ("swin:variant=base,window=14", 250_200, True),
        ("swin:variant=small,window=14", 225_180, False),
        ("swin:variant=base,window=7", 250_200, False),
        ("vil", 250_200, False), ("cvt", 250_200, False),
    ):  # fmt: skip
        config = load_config(f"esvit_{row}{',' if ':' in row else ':'}continued=true")
        begin = config.init_parts, config.init_step, config.batch_size, config.head.norm_last_layer
        assert begin == ("run", step, 512, fixed)
    assert load_config("resnet50:continued=true").batch_size == 1024
    assert load_config("vit:variant=base,patch=8").backbone.patch_size == 8
    assert load_config("quickstart").data.name == "bundled/fashion_mnist_mini"
    longer = load_config("fashion_mnist:images=70000")
    assert (longer.total_steps, longer.data.name) == (6000, "fashion_mnist")
    for images, prototypes, epochs in ((200, 32, 1000), (2_000, 128, 300), (100_000, 4096, 100)):
        config = load_config(f"small_data:images={images}")
        assert (config.head.num_prototypes, config.total_epochs) == (prototypes, epochs)


def test_a_name_is_the_same_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    by_path = load_config(str(ROOT / "configs" / "quickstart.py"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()  # a workdir, say
    assert load_config("quickstart") == by_path


def test_the_installed_package_has_its_configs_and_its_page(tmp_path: Path):
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    code = "import esvit_jax.config.parse as p; print(p.load_config('quickstart').seed, p.__file__)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True,
        env={"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert run.stdout.split() == ["0", str(tmp_path / "esvit_jax" / "config" / "parse.py")]
    assert (tmp_path / "esvit_jax" / "analyze" / "report.html").is_file()
