"""Arrays of the published implementation's CvT, replayed, also by way of `esvit convert`."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from replay_golden import Replay, given_views, normalize, relative_error, tensors
from safetensors.numpy import save_file

from esvit_jax import checkpoint
from esvit_jax.interop.convert import convert
from esvit_jax.interop.formats.base import load_exportable
from esvit_jax.interop.formats.esvit import published_content
from esvit_jax.interop.names.published import state_dict_from_params
from esvit_jax.models.cvt import FIRST, ConvEmbed, Norm
from esvit_jax.models.depthwise import by_groups

GOLDEN = Path(__file__).parent / "data" / "cvt_nano.npz"


@pytest.fixture(scope="module")
def replay():
    """Two devices, over which batch norms count as one."""
    return Replay(GOLDEN, devices=2)


def assert_below(bound, errors):
    assert all(error is not None and error < bound for error in errors.values()), errors


def test_outputs(replay):
    """In training mode, student and teacher."""
    assert_below(1e-5, replay.outputs())


def test_features(replay):
    """By running statistics."""
    errors = replay.features()
    assert {name for name, error in errors.items() if error is not None} == {"last4_features"}
    assert_below(1e-5, {"last4_features": errors["last4_features"]})


def test_one_step(replay):
    errors = replay.one_step()
    # The batch norm behind it nearly cancels the scale of this norm; its gradient is 1e-4 of
    # the others'.
    assert_below(5e-4, {"max_grad": errors.pop("max_grad")})
    for name in ("max_student_after", "max_teacher_after"):
        assert_below(1e-4, {name: errors.pop(name)})
    assert_below(1e-5, errors)
    gradients = state_dict_from_params(replay.stepped()[0].opt_state[0])
    for name, expected in tensors(replay.golden, "grad/").items():
        if not name.endswith(".0.norm.weight"):
            assert_below(1e-4, {name: relative_error(gradients[name], expected)})


@pytest.mark.parametrize("network", ["student", "teacher"])
def test_running_statistics(replay, network):
    """Of the first batch norm: the padding counts, the global views come first, in 0.9s."""
    params = replay.params(network)["backbone"]
    block = params["stage0_1"]["layers_0_0"]
    expected = {name: block["fn"]["qkv"]["bn"][name] for name in ("running_mean", "running_var")}
    views = given_views(None, replay.batch())
    for stack in [views["global"], views["local"]][: 2 if network == "student" else 1]:
        images = jnp.asarray(stack.reshape(-1, *stack.shape[2:]))
        x = ConvEmbed(8, *FIRST).apply({"params": params["stage0_0"]}, images)
        x = np.asarray(Norm().apply({"params": block["norm"]}, x))
        padding = (0, -x.shape[1] % 7)
        x = jnp.asarray(np.pad(x, ((0, 0), padding, padding, (0, 0))))
        kernel = jnp.asarray(block["fn"]["qkv"]["dw"]["kernel"])
        rows = np.asarray(by_groups(x, kernel), np.float64).reshape(-1, 8)
        seen = {"running_mean": rows.mean(0), "running_var": rows.var(0, ddof=1)}
        expected = {name: 0.9 * x + 0.1 * seen[name] for name, x in expected.items()}
    state, _ = replay.stepped()
    after = (state.params if network == "student" else state.teacher)["backbone"]
    for name, x in expected.items():
        ours = after["stage0_1"]["layers_0_0"]["fn"]["qkv"]["bn"][name]
        assert relative_error(ours, x) < 1e-5


def test_trajectory(replay):
    assert replay.count == 20
    assert_below(1e-4, replay.trajectory())


def test_by_way_of_the_converter(replay, tmp_path):
    """Every tensor of the file arrives once, the heads are told right, and what leaves is it."""
    golden = replay.golden
    content = {}
    for network, prefix in (("student", "student.module."), ("teacher", "teacher.")):
        for name, x in tensors(golden, f"{network}/").items():
            content[prefix + name] = x
            if name.endswith("running_var"):
                counter = name.replace("running_var", "num_batches_tracked")
                content[prefix + counter] = np.asarray(5)
    for name in ("center", "center_grid"):
        content[f"dino_loss.{name}"] = golden[name]
    save_file(content, tmp_path / "checkpoint.safetensors")
    found = convert(tmp_path / "checkpoint.safetensors", tmp_path / "converted")
    assert "embed_dims (8, 24, 24, 48), depths (1, 1, 2, 1), heads (1, 3, 3, 6)" in found[0]

    loaded = checkpoint.load_model(tmp_path / "converted")
    out = jax.jit(loaded.model.backbone.forward)(
        loaded.teacher["backbone"], normalize(golden["crops/0"])
    )
    means = np.concatenate(out.block_means[-4:], axis=-1)
    assert relative_error(means, golden["last4_features"]) < 1e-5

    source = load_exportable(
        tmp_path / "converted", key=None, image_size=None, step=None, strict=True
    )
    written = {
        f"{part}.{name}": x
        for part, entries in published_content(source).items()
        for name, x in entries.items()
    }
    assert written.keys() == content.keys()
    for name, x in content.items():
        if not name.endswith("num_batches_tracked"):  # which nobody counts here
            np.testing.assert_array_equal(written[name], x, err_msg=name)
