"""`config.init_from`: what is taken from another network, and what does not fit."""

import contextlib

import jax
import numpy as np
import pytest
import tiny
from rich.console import Console
from test_convert import (
    assert_same,
    both_centers,
    published,
    random_params,
    small_config,
    supervised,
    write,
)

from esvit_jax import checkpoint, loop
from esvit_jax.errors import UserError
from esvit_jax.interop.convert import convert
from esvit_jax.interop.initialize import init_from
from esvit_jax.run import prepare
from esvit_jax.runlog.writer import read_metrics
from esvit_jax.state import create_state, init_params

QUIET = Console(quiet=True)


def test_init_from(tmp_path):
    tensors, _, teacher = published(small_config(), **both_centers())
    path = str(tmp_path / "a")
    convert(write(tmp_path / "a.safetensors", tensors), path)
    params = random_params(small_config(), 5)

    start = init_from(params, path, "all")
    for new in (start.student, start.teacher):
        assert_same(new, teacher)
    assert start.report.startswith("loaded backbone, region_head, view_head (")
    assert (start.centers, start.epochs) == ({}, 0)
    start = init_from(params, path, "backbone")
    assert_same(start.student["backbone"], teacher["backbone"])
    assert_same(start.student["view_head"], params["view_head"])
    assert "; random: region_head, view_head" in start.report

    view_only = {part: params[part] for part in ("backbone", "view_head")}
    start = init_from(view_only, path, "all")
    assert set(start.student) == {"backbone", "view_head"}
    assert start.report.endswith("; not used: region_head")


def test_a_run_of_views_alone_goes_on_with_regions(tmp_path):
    """Both networks, the view's center and the epoch are taken; the region head is new."""
    tensors, student, teacher = published(small_config(region=False), **both_centers())
    del tensors["dino_loss.center_grid"]
    file = write(tmp_path / "a.safetensors", tensors)
    convert(file, tmp_path / "a")
    params = random_params(small_config(), 5)
    with pytest.raises(UserError, match="does not tell the epoch"):
        init_from(params, str(tmp_path / "a"), "run")

    checkpoint.save_model(
        tmp_path / "b", config=small_config(region=False), origin={"steps_per_epoch": 8},
        teacher=teacher, student=student, centers={"view": both_centers()["center"][0]}, step=20,
    )  # fmt: skip
    start = init_from(params, str(tmp_path / "b"), "run", 20)
    for new, old in ((start.student, student), (start.teacher, teacher)):
        assert_same({part: new[part] for part in old}, old)
        assert_same(new["region_head"], params["region_head"])
    assert set(start.centers) == {"view"} and start.epochs == 2.5
    np.testing.assert_array_equal(start.centers["view"], both_centers()["center"][0])
    assert "; random: region_head; goes on at epoch 2.5, with new moments" in start.report
    with pytest.raises(UserError, match=r"^init_step = 3|step 3"):
        init_from(params, str(tmp_path / "b"), "run", 3)


def test_init_from_refuses_what_does_not_fit(tmp_path):
    tensors, params = supervised(small_config(), "microsoft")
    path = str(tmp_path / "a")
    convert(write(tmp_path / "a.safetensors", tensors), path)
    with pytest.raises(UserError, match="init_parts = 'backbone' leaves the heads") as error:
        init_from(random_params(small_config(), 5), path, "all")
    assert "missing: view_head/last_layer/weight_g" in str(error.value)
    start = init_from(random_params(small_config(), 5), path, "backbone")
    assert_same(start.student["backbone"], params["backbone"])

    with pytest.raises(UserError) as error:
        init_from(random_params(small_config(window_size=8), 5), path, "backbone")
    _, *lines = str(error.value).splitlines()
    table = "attn/relative_position_bias_table"
    assert [line.strip() for line in lines] == [
        f"wrong shape: backbone/layers_0/blocks_0/{table} is [49, 1], not [225, 1]",
        f"wrong shape: backbone/layers_0/blocks_1/{table} is [49, 1], not [225, 1]",
        f"wrong shape: backbone/layers_1/blocks_0/{table} is [49, 2], not [225, 2]",
    ]
    with pytest.raises(UserError, match="is no workdir"):
        init_from({}, str(tmp_path / "nothing"), "all")


def test_init_from_names_its_arguments(tmp_path):
    tensors, _ = supervised(small_config(), "microsoft")
    path = str(tmp_path / "a")
    convert(write(tmp_path / "a.safetensors", tensors), path)
    params = random_params(small_config(), 5)
    with pytest.raises(UserError) as error:
        init_from(params, path, "all")
    assert (error.value.argument, error.value.value) == ("init_from", path)
    with pytest.raises(UserError, match=r"^init_parts = 'head': it must be one of all, backbone"):
        init_from(params, path, "head")


def test_init_from_refuses_nan(tmp_path):
    config = small_config()
    teacher = random_params(config, 1)
    teacher["backbone"]["norm"]["bias"][3] = np.nan
    origin = {"parts": "backbone"}
    checkpoint.save_model(
        tmp_path / "run", config=config, origin=origin, teacher={"backbone": teacher["backbone"]}
    )
    with pytest.raises(UserError, match="backbone/norm/bias: 1 of its 32 values are not finite"):
        init_from(random_params(config, 2), str(tmp_path / "run"), "backbone")


@pytest.mark.parametrize("field, value", [("parts", "run"), ("parts", "backbone"), ("step", 0)])
def test_what_to_take_from_nowhere_is_refused(tmp_path, tiny_config, field, value):
    tiny_config[f"init_{field}"] = value
    words = f"config.init_{field} = {value!r}: name the run to begin from in config.init_from"
    with pytest.raises(UserError, match=f"^{words}$"):
        prepare(tiny_config, tmp_path, QUIET)


@pytest.mark.usefixtures("known_size")
def test_schedules_go_on_where_a_view_only_run_was(tmp_path):
    """Its last steps and those of the run with regions have the same schedules."""
    tiny_config, views, both = tiny.tiny_config(), tmp_path / "views", tmp_path / "both"
    tiny_config.loss.region = False
    loop.train(tiny_config, views, console=QUIET)
    tiny_config.loss.region = True
    tiny_config.init_from, tiny_config.init_parts = str(views), "run"
    with pytest.raises(UserError, match="has the 6 of this run's 6 steps behind it"):
        loop.train(tiny_config, both, console=QUIET)
    tiny_config.init_step = 3
    loop.train(tiny_config, both, console=QUIET)

    lines = {run: read_metrics(run / "metrics.jsonl") for run in (views, both)}
    lines = {run: {x["step"]: x for x in own if "loss" in x} for run, own in lines.items()}
    assert sorted(lines[both]) == [4, 5, 6]
    for step, line in lines[both].items():
        for name in ("learning_rate", "weight_decay", "teacher_momentum", "teacher_temp"):
            assert line[name] == lines[views][step][name]
    # The moments are new: Adam has counted the steps of this run alone.
    run = prepare(tiny_config, both, QUIET)
    with contextlib.closing(run.lock), contextlib.closing(run.checkpoints):
        state = run.checkpoints.restore(
            jax.eval_shape(lambda: create_state(
                run.recipe.model, run.recipe.optimizer,
                init_params(run.recipe.model, jax.random.key(0)),
            ))
        )  # fmt: skip
    (count,) = {int(x) for x in jax.tree.leaves(state.opt_state) if x.dtype == np.int32}
    assert (count, int(state.step)) == (3, 6)

    # Of batches twice as large the same epoch has half as many steps.
    tiny_config.batch_size = 16
    run = prepare(tiny_config, tmp_path / "larger", QUIET)
    with contextlib.closing(run.lock), contextlib.closing(run.checkpoints):
        assert run.first_step == 2
