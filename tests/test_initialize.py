"""`config.init_from`: what is taken from another network, and what does not fit."""

import numpy as np
import pytest
from test_convert import (
    assert_same,
    both_centers,
    published,
    random_params,
    small_config,
    supervised,
    write,
)

from esvit_jax import checkpoint
from esvit_jax.errors import UserError
from esvit_jax.interop.convert import convert
from esvit_jax.interop.initialize import init_from


def test_init_from(tmp_path):
    tensors, _, teacher = published(small_config(), **both_centers())
    path = str(tmp_path / "a")
    convert(write(tmp_path / "a.safetensors", tensors), path)
    params = random_params(small_config(), 5)

    new, report = init_from(params, path, "all")
    assert_same(new, teacher)
    assert report.startswith("loaded backbone, region_head, view_head (")
    new, report = init_from(params, path, "backbone")
    assert_same(new["backbone"], teacher["backbone"])
    assert_same(new["view_head"], params["view_head"])
    assert "; random: region_head, view_head" in report

    view_only = {part: params[part] for part in ("backbone", "view_head")}
    new, report = init_from(view_only, path, "all")
    assert set(new) == {"backbone", "view_head"}
    assert report.endswith("; not used: region_head")


def test_init_from_refuses_what_does_not_fit(tmp_path):
    tensors, params = supervised(small_config(), "microsoft")
    path = str(tmp_path / "a")
    convert(write(tmp_path / "a.safetensors", tensors), path)
    with pytest.raises(UserError, match="init_parts = 'backbone' leaves the heads") as error:
        init_from(random_params(small_config(), 5), path, "all")
    assert "missing: view_head/last_layer/weight_g" in str(error.value)
    new, _ = init_from(random_params(small_config(), 5), path, "backbone")
    assert_same(new["backbone"], params["backbone"])

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
    with pytest.raises(UserError, match=r"^init_parts = 'head': it must be 'all' or 'backbone'$"):
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
