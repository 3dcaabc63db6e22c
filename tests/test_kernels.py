"""The TPU kernel of window attention, interpreted, against the code that runs elsewhere."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from replay_golden import Replay

from esvit_jax.models import Swin
from esvit_jax.models.attention import WindowAttention, shift_mask
from esvit_jax.models.kernels import chosen, compiling_for, programs, window_attention
from esvit_jax.models.kernels.layout import NEVER, Layout

# (maps, height, width), heads, features of a head, window, shift
CASES = {
    "windows": ((2, 8, 8), 2, 8, 4, 0),
    "shifted": ((2, 8, 8), 2, 8, 4, 2),
    "padded": ((2, 6, 6), 3, 4, 4, 1),  # along both axes, an odd number of heads
    "padded_one_axis": ((3, 4, 6), 1, 32, 4, 2),
    "last_program": ((19, 4, 4), 2, 8, 2, 1),  # has fewer maps than the others
    "one_window": ((3, 4, 4), 5, 8, 4, 0),
    "one_padded_window": ((3, 3, 3), 3, 8, 4, 0),
    "one_shifted_window": ((2, 2, 3), 2, 16, 4, 2),  # its tokens lie apart in the window
    "two_tiles": ((1, 4, 4), 5, 32, 2, 1),  # 160 features
    "seven": ((1, 7, 14), 3, 32, 7, 3),
    "wide_lines": ((1, 9, 9), 1, 8, 9, 0),  # that take two registers
    "fourteen": ((1, 14, 14), 1, 32, 14, 0),
}


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def relative_error(ours, theirs):
    ours, theirs = (np.asarray(x, np.float64).ravel() for x in (ours, theirs))
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def value_and_gradients(case, code, dtype=jnp.float32):
    """Output, and gradients of rows and of all parameters, by name."""
    shape, heads, dim, window, shift = CASES[case]
    module = WindowAttention(heads, window, shift, dtype, attention=code)
    rows = normal(0, np.prod(shape), heads * dim)
    return gradients_of(module, rows, shape)


def gradients_of(module, rows, shape):
    params = jax.eval_shape(lambda: module.init(jax.random.key(0), rows, shape))
    leaves, tree = jax.tree.flatten(params)
    params = tree.unflatten(0.2 * normal(i, *x.shape) for i, x in enumerate(leaves))

    @jax.jit
    def run(params, rows):
        out, backward = jax.vjp(lambda p, r: module.apply(p, r, shape)[0], params, rows)
        return out, backward(normal(9, *out.shape).astype(out.dtype))

    out, (d_params, d_rows) = run(params, rows)
    named = jax.tree_util.tree_leaves_with_path(d_params)
    return {"out": out, "rows": d_rows} | {jax.tree_util.keystr(k): x for k, x in named}


# The others take six seconds of compilation each.
QUICK = ("padded", "one_padded_window")
EACH = [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES]


@pytest.mark.parametrize("case", EACH)
def test_equals_the_code_elsewhere(case):
    ours, theirs = (value_and_gradients(case, code) for code in ("pallas", "xla"))
    assert len(ours) == 7
    for name, value in theirs.items():
        error = relative_error(ours[name], value)
        assert error < 1e-6, (name, error)


def test_bfloat16():
    """As near to float32 as the code elsewhere is."""
    exact = value_and_gradients("shifted", "xla")
    ours, theirs = (value_and_gradients("shifted", c, jnp.bfloat16) for c in ("pallas", "xla"))
    for name, value in exact.items():
        assert ours[name].dtype == theirs[name].dtype
        errors = [relative_error(x[name].astype(jnp.float32), value) for x in (ours, theirs)]
        assert errors[0] < 1.3 * errors[1] and errors[0] < 0.03, (name, errors)


def kernel_inputs(layout, maps):
    """qkv, padding, bias."""
    n = layout.lines * layout.columns
    return (
        normal(0, maps * layout.tokens, 3 * layout.features),
        normal(1, 1, 3 * layout.features),
        normal(2, layout.heads, n, n + layout.padding_key),
    )


def test_no_token_sees_across_the_border():
    """With the mask forgotten, or that of another window, this fails."""
    layout = Layout(4, 4, 2, 1, 1, 8)
    qkv, padding, bias = kernel_inputs(layout, 1)
    attend = jax.jit(lambda qkv: window_attention.attend(qkv, padding, bias, layout))
    out = attend(qkv)
    # Tokens (y, x) of row 0 and row 3 share windows of the shifted map, but must not meet.
    for token in range(16):
        moved = np.any(np.asarray(attend(qkv.at[token, 8:].add(1.0)) != out), axis=1)
        y, x = divmod(token, 4)
        band = [0, 1, 1, 2]
        expected = [band[i // 4] == band[y] and band[i % 4] == band[x] for i in range(16)]
        np.testing.assert_array_equal(moved, expected)


def test_bias_gradient_sums_over_all_windows():
    """By differences of the output's sum, one entry at a time; programs 2 and 3 count too."""
    layout = Layout(2, 2, None, 0, 2, 8)
    qkv, padding, bias = kernel_inputs(layout, 70)
    assert programs.maps_per_program(layout, 70, jnp.float32) == 32
    weights = normal(3, 280, 16)

    @jax.jit
    def total(bias):
        return jnp.sum(weights * window_attention.attend(qkv, padding, bias, layout))

    gradient = jax.jit(jax.grad(total))(bias)
    for at in [(0, 0, 0), (0, 3, 1), (1, 2, 2)]:
        step = 0.05
        difference = total(bias.at[at].add(step)) - total(bias.at[at].add(-step))
        assert abs(float(difference) / (2 * step) - float(gradient[at])) < 2e-2
    np.testing.assert_allclose(jnp.sum(gradient, axis=-1), 0.0, atol=1e-4)  # of a softmax


@pytest.mark.parametrize(
    "layout",
    [Layout(8, 12, 4, 2, 1, 8), Layout(7, 14, 7, 3, 2, 32), Layout(3, 3, None, 0, 3, 8, True)],
)
def test_layout(layout):
    """Biases and masks lie at (key's slot, head and query's slot)."""
    n = layout.lines * layout.columns
    bias = np.asarray(normal(0, layout.heads, n, n + layout.padding_key))
    laid = np.asarray(layout.bias_rows(jnp.asarray(bias)))
    assert laid.shape == (layout.units, layout.rows, layout.lanes)
    slots = [y * layout.slots + x for y, x in np.ndindex(layout.lines, layout.columns)]
    keys = slots + [layout.columns] * layout.padding_key
    for head in range(layout.heads):
        unit, place = divmod(head, layout.group)
        block = laid[unit, :, place * layout.rows : (place + 1) * layout.rows]
        np.testing.assert_array_equal(block[np.ix_(keys, slots)], bias[head].T)
        others = sorted(set(range(layout.rows)) - set(keys))
        assert np.all(block[np.ix_(others, slots)] == NEVER)
    if layout.shift:
        y, x = layout.windows
        masks = shift_mask(y * layout.lines, x * layout.columns, layout.lines, layout.shift)
        kinds = masks[[0, x - 1, (y - 1) * x, y * x - 1]]
        for laid, mask in zip(layout.masks()[1 if y == 1 else 0 :], kinds, strict=False):
            if y > 1:
                np.testing.assert_array_equal(laid[np.ix_(keys, slots)], mask.T)


def test_other_codes():
    """Weights are asked of the code elsewhere, "auto" is that too but for a TPU."""
    layout = Layout(4, 4, 2, 1, 1, 8)
    assert not chosen("auto", layout, 2, jnp.float32) and not chosen("xla", layout, 2, jnp.float32)
    assert chosen("pallas", layout, 2, jnp.float32)
    with pytest.raises(ValueError, match="attention must be"):
        chosen("cuda", layout, 2, jnp.float32)
    with compiling_for("TPU v5 lite"):
        assert chosen("auto", layout, 2, jnp.float32)
        assert not chosen("auto", Layout(4, 4, 2, 1, 1, 24), 2, jnp.float32)
        assert not chosen("auto", Layout(512, 512, 8, 4, 4, 32), 2, jnp.float32)  # too large a map
        assert chosen("auto", Layout(56, 56, 7, 3, 3, 32), 2, jnp.bfloat16)
    with compiling_for("TPU v4"):  # of little vector memory
        assert not chosen("auto", Layout(56, 56, 7, 3, 3, 32), 2, jnp.bfloat16)
        assert chosen("auto", Layout(28, 28, 7, 3, 6, 32), 2, jnp.bfloat16)
    with pytest.raises(ValueError, match="24 features"):
        odd = Layout(4, 4, 2, 1, 1, 24)
        window_attention.attend(*kernel_inputs(odd, 1), odd)


def test_swin_hands_its_choice_to_every_block():
    for code, calls in (("xla", 0), ("pallas", 2)):
        swin = Swin(8, (2,), (1,), window_size=2, image_size=16, attention=code)
        images = jnp.zeros((1, 16, 16, 3))
        params = jax.eval_shape(swin.init, jax.random.key(0), images)["params"]
        jaxpr = jax.make_jaxpr(lambda p, x, swin=swin: swin.forward(p, x))(params, images)
        found = str(jaxpr).count("pallas_call[")  # in a block also for other platforms
        assert found >= calls if calls else found == 0


def test_weights_come_from_the_code_elsewhere():
    shape, heads, dim, window, shift = CASES["shifted"]
    module = WindowAttention(heads, window, shift, return_weights=True, attention="pallas")
    rows = normal(0, np.prod(shape), heads * dim)
    (_, weights), _ = jax.eval_shape(
        lambda: module.init_with_output(jax.random.key(0), rows, shape)
    )
    assert weights.shape == (2, 4, heads, 16, 16)


def test_auto_is_the_code_elsewhere_on_a_cpu():
    """The very program: nothing of the kernel is in it."""
    shape, heads, dim, window, shift = CASES["shifted"]
    rows = normal(0, np.prod(shape), heads * dim)
    texts = []
    for code in ("auto", "xla"):
        module = WindowAttention(heads, window, shift, attention=code)
        params = jax.eval_shape(lambda m=module: m.init(jax.random.key(0), rows, shape))
        apply = jax.jit(lambda p, r, module=module: module.apply(p, r, shape)[0])
        texts.append(apply.lower(params, rows).as_text())
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_golden():
    """The published outputs and one published step, by the kernel in all stages."""
    replay = Replay(str(Path(__file__).parent / "data" / "swin_nano_w7.npz"), prototype_chunk=32)
    backbone = replay.model.backbone.clone(attention="pallas")
    replay.model = replay.model.clone(backbone=backbone)
    replay.optimizer, replay.step = replay.build("pmap", jax.devices()[:1])
    for name, error in replay.outputs().items():
        assert error is not None and error < 1e-5, (name, error)
    for name, error in replay.one_step().items():
        bound = 1e-4 if name in ("max_grad", "max_student_after", "max_teacher_after") else 1e-5
        assert error is not None and error < bound, (name, error)
