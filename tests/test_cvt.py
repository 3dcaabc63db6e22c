"""CvT against loops over tokens, in float64; its parts; and all that is done with a backbone."""

import functools
import json
import math
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from rich.console import Console
from safetensors.numpy import save_file
from test_swin import linear, normal, random_params
from tiny import tiny_config

from esvit_jax import checkpoint, loop
from esvit_jax.analyze.attention import window_tokens
from esvit_jax.commands import attention, knn
from esvit_jax.errors import UserError
from esvit_jax.evaluate.tuning import layer_shares
from esvit_jax.interop.convert import convert
from esvit_jax.interop.export import export
from esvit_jax.interop.names.cvt import CvTFamily
from esvit_jax.interop.names.published import state_dict_from_params
from esvit_jax.models import PRESETS, CvT, create_backbone
from esvit_jax.models.batch_norm import AXIS, STATISTICS
from esvit_jax.models.cvt import ConvAttention
from esvit_jax.models.depthwise import by_groups, by_shifts

TINY: dict[str, Any] = dict(embed_dims=(4, 8), depths=(2, 1), num_heads=(1, 2), window_size=3)


def positive_variances(params):
    """Random params, but for variances; as arrays of jax."""
    flat: dict[Any, Any] = traverse_util.flatten_dict(jax.tree.map(jnp.asarray, params))
    return traverse_util.unflatten_dict(
        {path: abs(x) + 0.5 if path[-1] == "running_var" else x for path, x in flat.items()}
    )


def on_one(function):
    """Compiled, with one device on the axis over which batch norms take their means."""
    return jax.jit(jax.vmap(function, None, None, axis_size=1, axis_name=AXIS))


def relative_error(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


# The reference: one cell at a time.


def norm(cell, p):
    deviation = cell - cell.mean()
    return deviation / math.sqrt((deviation**2).mean() + 1e-5) * p["scale"] + p["bias"]


def pointwise(cell, p):
    return linear(cell, {"kernel": p["kernel"][0, 0], "bias": p["bias"]})


def reference_embedding(x, p, size, stride, padding):
    height, width = (-(-n // stride) for n in x.shape[:2])
    out = np.zeros((height, width, p["proj"]["kernel"].shape[-1]))
    for y, c in np.ndindex(height, width):
        cell = p["proj"]["bias"].astype(np.float64)
        for i, j in np.ndindex(size, size):
            line, column = stride * y + i - padding, stride * c + j - padding
            if 0 <= line < x.shape[0] and 0 <= column < x.shape[1]:
                cell = cell + x[line, column] @ p["proj"]["kernel"][i, j]
        out[y, c] = norm(cell, p["norm"])
    return out


def reference_block(x, attend, transform, heads, window):
    """One image's map [h, w, d] after the block, and attention [windows, heads, n, n]."""
    height, width, dim = x.shape
    window = min(window, height, width)
    lines, columns = (-(-n // window) * window for n in (height, width))
    normed = np.zeros((lines + 2, columns + 2, dim))  # with the border that the convolution sees
    for y, c in np.ndindex(height, width):
        normed[y + 1, c + 1] = norm(x[y, c], attend["norm"])
    parts, qkv = attend["fn"]["qkv"], {}
    for y, c in np.ndindex(lines, columns):
        kernel = parts["dw"]["kernel"][:, :, 0].astype(np.float64)
        cell = (normed[y : y + 3, c : c + 3] * kernel).sum((0, 1)) - parts["bn"]["running_mean"]
        cell = cell / np.sqrt(parts["bn"]["running_var"] + 1e-5)
        cell = cell * parts["bn"]["scale"] + parts["bn"]["bias"]
        qkv[y, c] = np.split(pointwise(cell, parts["pw"]), 3)
    attention = np.zeros(((lines // window) * (columns // window), heads, window**2, window**2))
    merged = np.zeros((lines, columns, dim))
    for (y, c), (query, _, _) in qkv.items():
        top, left = y // window * window, c // window * window
        keys = [(top + i, left + j) for i, j in np.ndindex(window, window)]
        number = y // window * (columns // window) + c // window
        for head, features in enumerate(np.split(np.arange(dim), heads)):
            logits = [query[features] @ qkv[key][1][features] * dim**-0.5 for key in keys]
            weights = np.exp(logits) / np.exp(logits).sum()
            attention[number, head, y % window * window + c % window] = weights
            merged[y, c, features] = sum(
                w * qkv[key][2][features] for w, key in zip(weights, keys, strict=True)
            )
    out = x.astype(np.float64)
    for y, c in np.ndindex(height, width):
        out[y, c] += pointwise(merged[y, c], attend["fn"]["proj_out"])
        hidden = pointwise(norm(out[y, c], transform["norm"]), transform["fn"]["net_0"])
        hidden = hidden / (1 + np.exp(-1.702 * hidden))
        out[y, c] += pointwise(hidden, transform["fn"]["net_2"])
    return out, attention


@pytest.mark.parametrize(
    ("height", "width"),
    [(24, 16), (21, 34), (5, 9)],  # padded both ways; of any size; windows clipped to the map
)
def test_equals_loops_over_cells(height, width):
    backbone = create_backbone("cvt_tiny", **TINY)
    images = normal(1, 1, height, width, 3)
    params = positive_variances(random_params(backbone.init, images))
    outputs = jax.jit(lambda p, x: backbone.forward(p, x, outputs=("attention",)))(params, images)
    params, x = jax.tree.map(np.asarray, params), np.asarray(images[0], np.float64)
    means, attentions = [], []
    for i, depth in enumerate(backbone.depths):
        x = reference_embedding(x, params[f"stage{i}_0"], *((7, 4, 2) if i == 0 else (3, 2, 1)))
        stage = params[f"stage{i}_1"]
        for j in range(depth):
            x, found = reference_block(
                x, stage[f"layers_{j}_0"], stage[f"layers_{j}_1"], backbone.num_heads[i],
                backbone.window_size,
            )  # fmt: skip
            attentions.append(found)
            means.append(x.mean((0, 1)))
        if i == 0:
            assert relative_error(outputs.stage_maps[0][0], x) < 1e-5
    regions = np.apply_along_axis(norm, -1, x, params["norm"])
    means[-1] = regions.mean((0, 1))
    assert relative_error(outputs.region_features[0], regions) < 1e-5
    for ours, mean in zip(outputs.block_means, means, strict=True):
        assert relative_error(ours[0], mean) < 1e-5
    np.testing.assert_array_equal(outputs.view_features, outputs.block_means[-1])
    for block, ours, weights in zip(backbone.blocks, outputs.attention, attentions, strict=True):
        assert relative_error(ours[0], weights) < 1e-5
        _, height, width, _ = outputs.stage_maps[block.stage].shape
        tokens = window_tokens(height, width, block)
        assert tokens.shape == (weights.shape[0], weights.shape[-1])


def in_training(backbone, params, images, drawn=None):
    """What a backbone returns, and what its batch norms have seen, on one device."""
    variables = {"params": params}
    return backbone.apply(variables, images, drawn, mutable=[STATISTICS])


def test_products_in_bfloat16_are_near():
    """In training, where batch norms take part; what is returned stays float32."""
    images = normal(1, 2, 12, 16, 3)
    params = jax.jit(CvT(**TINY).init)(jax.random.key(0), images)["params"]
    expected, found = (
        on_one(functools.partial(in_training, CvT(**TINY, dtype=dtype)))(params, images)[0]
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype("float32")}
    assert 1e-4 < relative_error(found.region_features, expected.region_features) < 3e-2


# Its parts


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_two_depthwise_convolutions_agree(dtype):
    x, kernel, gradient = normal(0, 2, 5, 4, 6), normal(1, 3, 3, 1, 6), normal(2, 2, 5, 4, 6)
    bound = 1e-5 if dtype == "float32" else 1e-2
    results = []
    for function in (by_groups, by_shifts):
        out, backward = jax.vjp(function, x.astype(dtype), kernel.astype(dtype))
        results.append([out, *backward(gradient.astype(dtype))])
    for expected, found in zip(*results, strict=True):
        assert found.dtype == dtype
        assert relative_error(found.astype(jnp.float32), expected.astype(jnp.float32)) < bound


def training_gradients(backbone, params, images, drawn):
    """By a loss of the regions, with what batch norms have seen."""
    shape = jax.eval_shape(backbone.forward, params, images).region_features.shape
    target = normal(7, *shape)

    def loss(params):
        out, seen = in_training(backbone, params, images, drawn)
        return jnp.sum(jnp.square(out.region_features - target)), seen

    return on_one(jax.grad(loss, has_aux=True))(params)


def test_what_is_computed_again_is_the_same():
    """Gradients, and the statistics that batch norms put aside."""
    images, drawn = normal(1, 2, 12, 16, 3), jnp.full((2, 6), 0.5)
    plain, *again = (
        create_backbone("cvt_tiny", **TINY, remat=x) for x in ("none", "dots", "block")
    )
    params = positive_variances(random_params(plain.init, images))
    expected = training_gradients(plain, params, images, drawn)
    assert len(jax.tree.leaves(expected[1])) == 3 * sum(plain.depths)
    for backbone in again:
        found = training_gradients(backbone, params, images, drawn)
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


def test_the_kernel_attends_alike():
    """The TPU's, interpreted; it scales logits by the features of a head, a CvT by all of them."""
    shape, rows, gradient = (1, 3, 2), normal(0, 6, 64), normal(1, 6, 64)
    module = ConvAttention(num_heads=2, window_size=2)
    params = positive_variances(random_params(lambda key, x: module.init(key, x, shape), rows))

    def run(attention):
        def forward(params, rows):
            return module.clone(attention=attention).apply({"params": params}, rows, shape)[0]

        out, backward = jax.vjp(forward, params, rows)
        return out, backward(gradient)

    results = (jax.tree.leaves(jax.jit(run, static_argnums=0)(x)) for x in ("xla", "pallas"))
    for expected, found in zip(*results, strict=True):
        assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)


def test_drop_path_drops_each_branch_by_its_own_number():
    backbone = create_backbone("cvt_tiny", **TINY, drop_path_rate=0.5)
    images = normal(1, 1, 16, 16, 3)
    params = positive_variances(random_params(backbone.init, images))
    assert backbone.num_draws == 6
    kept = jnp.zeros((1, 6))

    def last_map(drawn):
        means = jax.jit(backbone.forward)(params, images, drawn=drawn).block_means
        return np.asarray(means[1])  # of the second block, whose rate is 0.25

    none = last_map(kept)
    attend, transform = (last_map(kept.at[0, number].set(0.9)) for number in (2, 3))
    both = last_map(kept.at[0, 2:4].set(0.9))
    first = np.asarray(jax.jit(backbone.forward)(params, images, drawn=kept).block_means[0])
    np.testing.assert_allclose(both, first, rtol=1e-6)
    for found in (none, attend, transform):
        assert relative_error(found, first) > 1e-2
    assert relative_error(attend, transform) > 1e-2 and relative_error(none, attend) > 1e-2


# By name


@pytest.mark.parametrize(("name", "millions"), [("cvt_tiny", 29.3), ("cvt_small", 22.6)])
def test_as_many_weights_as_published(name, millions):
    """29 M in the paper; of the other, counted from its file of settings."""
    backbone = create_backbone(name)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    shapes = jax.eval_shape(backbone.init, jax.random.key(0), images)["params"]
    flat: dict[Any, Any] = traverse_util.flatten_dict(shapes)
    count = sum(x.size for path, x in flat.items() if not path[-1].startswith("running_"))
    assert round(count / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depths": (2, 2)}, r"embed_dims = \(64, 192, 384, 768\): one number is needed for each"),
        ({"num_heads": (1, 3)}, r"num_heads = \(1, 3\): one number is needed for each of the 4"),
        ({"num_heads": (1, 3, 6, 11)}, r"num_heads = .*: 11 does not divide its stage's 768"),
        ({"embed_dim": 96}, "embed_dim = 96: cvt_tiny has no such field"),
    ],
)
def test_what_does_not_fit_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        create_backbone("cvt_tiny", **fields)


# Files


def published(backbone):
    images = jnp.zeros((1, 32, 32, 3))
    return state_dict_from_params(
        {"backbone": positive_variances(random_params(backbone.init, images))}
    )


@pytest.mark.parametrize("name", ["cvt_tiny", "cvt_small"])
def test_what_shapes_tell(name):
    preset = PRESETS[name][1]
    tensors = {
        f"stage{i}.0.proj.weight": np.zeros((dim, 3, 7, 7))
        for i, dim in enumerate(preset["embed_dims"])
    }
    tensors |= {
        f"stage{i}.1.layers.{j}.0.fn.qkv.dw.weight": np.zeros((dim, 1, 3, 3))
        for i, (dim, depth) in enumerate(zip(preset["embed_dims"], preset["depths"], strict=True))
        for j in range(depth)
    }
    inferred = CvTFamily().infer(tensors, None)
    expected = {key: preset[key] for key in ("embed_dims", "depths", "num_heads")}
    assert inferred.fields == expected | {"image_size": 224}
    assert f"num_heads and window_size: {preset['num_heads']} and 7 are assumed" in inferred.note
    del tensors["stage2.0.proj.weight"]
    with pytest.raises(UserError, match=r"blocks of the stages \[0, 1, 2, 3\], which no CvT has"):
        CvTFamily().infer(tensors, None)


@pytest.mark.parametrize(
    "name",
    [
        "stage0.blocks.0.attn.conv_proj_q.conv.weight",
        "cvt.encoder.stages.0.layers.0.attention.attention.convolution_projection_query."
        "convolution_projection.convolution.weight",
    ],
)
def test_a_supervised_cvt_is_refused(tmp_path, name):
    save_file({name: np.zeros((4, 1, 3, 3), np.float32)}, tmp_path / "cvt.safetensors")
    with pytest.raises(UserError, match="cvt.safetensors: it holds a supervised CvT") as error:
        convert(tmp_path / "cvt.safetensors", tmp_path / "out")
    assert len(str(error.value).splitlines()) == 1 and not (tmp_path / "out").exists()


def test_misfits_are_named(tmp_path):
    tensors = published(CvT(**TINY))
    tensors["stage1.1.layers.0.0.fn.rel_pos_bias_table"] = np.zeros((25, 2), np.float32)
    del tensors["stage0.1.layers.1.0.fn.qkv.bn.running_var"]
    save_file(tensors, tmp_path / "cvt.safetensors")
    with pytest.raises(UserError) as error:
        convert(tmp_path / "cvt.safetensors", tmp_path / "out")
    _, *lines = str(error.value).splitlines()
    assert lines == [
        "  unknown: model stage1.1.layers.0.0.fn.rel_pos_bias_table",
        "  missing: model stage0.1.layers.1.0.fn.qkv.bn.running_var",
    ]


# Training, evaluations, exports


def cvt_config(config):
    """Windows of 3 do not fit maps of 4 x 4 and 2 x 2."""
    config.backbone.update(
        name="cvt_tiny", embed_dim=None, embed_dims=(8, 16), depths=(1, 1), num_heads=(1, 2),
        window_size=3,
    )  # fmt: skip
    return config


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of two steps on four devices."""
    config = cvt_config(tiny_config())
    config.total_steps, config.checkpoint_every_steps = 2, 1
    config.data.train_split = "train[:160]"
    folder = tmp_path_factory.mktemp("cvt") / "run"
    loop.train(config, folder, console=Console(quiet=True))
    return folder


def test_a_run_goes_on_exactly(workdir, tmp_path):
    """Running statistics of student and teacher included, which have moved apart."""
    first, last = checkpoint.load_model(workdir, 1), checkpoint.load_model(workdir, 2)
    shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
    loop.train(last.config, tmp_path / "run", console=Console(quiet=True))
    again = checkpoint.load_model(tmp_path / "run", 2)
    networks = [(x.student, x.teacher) for x in (first, last, again)]
    norms = []
    for old, new, repeated in zip(*networks, strict=True):
        jax.tree.map(np.testing.assert_array_equal, new, repeated)
        before, after = (
            x["backbone"]["stage0_1"]["layers_0_0"]["fn"]["qkv"]["bn"] for x in (old, new)
        )
        for name in ("running_mean", "running_var"):
            assert np.any(before[name] != after[name])
        norms.append(after["running_mean"])
    assert np.any(norms[0] != norms[1])


def test_it_is_evaluated_and_drawn(workdir, tmp_path, capsys):
    knn.main([f"--workdir={workdir}", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["train_images"] == 160 and 0 <= report["top1/10"] <= 100
    attention.main(
        [f"--workdir={workdir}", "--count=1", "--at=0.9,0.9", f"--out={tmp_path}", "--json"]
    )
    blocks = json.loads(capsys.readouterr().out)
    assert [(block["window_size"], block["keys"]) for block in blocks] == [(3, 9), (2, 4)]
    assert (tmp_path / "block_1_image_0.png").exists()


def test_learning_rates_of_layers():
    """Three blocks and 0.5; a convolution between stages counts with the block before it."""
    backbone = CvT(**TINY)
    params = random_params(backbone.init, jnp.zeros((1, 16, 16, 3)))
    shares = layer_shares(backbone, {"backbone": params, "head": {"bias": np.zeros(3)}}, 0.5)
    expected = {
        "stage0_0": 0.5**4, "stage1_0": 0.5**2, "norm": 1.0,
        "stage0_1": {0.5**3, 0.5**2}, "stage1_1": 0.5,
    }  # fmt: skip
    for name, share in expected.items():
        found = set(jax.tree.leaves(shares["backbone"][name]))
        assert found == (share if isinstance(share, set) else {share}), name
    assert set(jax.tree.leaves(shares["backbone"]["stage0_1"]["layers_1_0"])) == {0.5**2}
    assert shares["head"]["bias"] == 1.0


def test_it_is_exported_where_nobody_misreads_it(workdir, tmp_path):
    errors = export(workdir, tmp_path / "stablehlo", format="stablehlo", image_size=20).errors
    assert errors and max(errors.values()) < 1e-5
    for format, library in (("huggingface", "transformers"), ("timm", "timm")):
        with pytest.raises(UserError, match=f"{library} has no CvT .*CvtModel, is another funct"):
            export(workdir, tmp_path / format, format=format)
