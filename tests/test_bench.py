"""What `esvit bench` times is what it says: the same losses, the same network, the same photos."""

import json
import time
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest

from esvit_jax.bench import inputs, rest
from esvit_jax.bench import step as bench_step
from esvit_jax.bench.block import Block, block_cost
from esvit_jax.bench.losses import bench_losses, plain_losses, random_outputs
from esvit_jax.bench.step import step_parts, workload
from esvit_jax.bench.timing import time_in_turns
from esvit_jax.commands import bench as command
from esvit_jax.config import flatten
from esvit_jax.errors import UserError
from esvit_jax.losses import esvit_loss
from esvit_jax.planning.topology import parse_topology

reads_a_file = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
PHOTOS = str(Path(__file__).parent / "data" / "photos")


def test_calls_are_timed_in_turns_after_a_warm_up():
    order = []

    def call(name, seconds):
        order.append(name)
        time.sleep(seconds)

    times = time_in_turns({"a": lambda: call("a", 0.03), "b": lambda: call("b", 0.0)}, rounds=3)
    assert order == ["a", "b"] * 4
    assert 0.03 <= times["a"].low <= times["a"].median <= times["a"].high
    assert times["b"].median < 0.03


@pytest.mark.parametrize("region", [True, False])
def test_plain_losses_are_the_chunked_ones(tiny_config, region):
    tiny_config.loss.region = region
    student, teacher, centers = random_outputs(tiny_config, images=3)
    temps = {"student_temp": 0.1, "teacher_temp": 0.05, "dtype": np.float32}
    plain, plain_grads = jax.value_and_grad(plain_losses)(student, teacher, centers, **temps)
    ours, grads = jax.value_and_grad(
        lambda s: esvit_loss(
            student=s, teacher=teacher, centers=centers, prototype_chunk=10, **temps
        )[0]
    )(student)
    np.testing.assert_allclose(plain, ours, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(plain_grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_losses_row(tiny_config):
    tiny_config.head.num_prototypes, tiny_config.loss.prototype_chunk = 4096, 256
    (row,) = bench_losses(tiny_config, [2], rounds=1)
    assert row.images == 2
    assert row.chunked.loss == pytest.approx(row.plain.loss, rel=1e-6)
    assert row.chunked.temp_bytes < row.plain.temp_bytes / 2


def one_device_config(config):
    config.batch_size = 2 * jax.device_count()
    config.evaluate.batch_size = jax.device_count()
    return config


def bench(capsys, tmp_path, config, *arguments):
    """Runs the command with a config of ours and returns what it printed."""
    path = tmp_path / "config.py"
    fields = "\n".join(
        f"    config.{name} = {tuple(value) if isinstance(value, list) else value!r}"
        for name, value in flatten(config).items()
        if value is not None
    )
    path.write_text(
        "from esvit_jax.config import default_config\n"
        f"def get_config():\n    config = default_config()\n{fields}\n    return config\n"
    )
    command.main([f"--config={path}", "--rounds=2", *arguments])
    return capsys.readouterr().out


@reads_a_file
def test_step_and_split_as_json(capsys, monkeypatch, tmp_path, tiny_config):
    monkeypatch.setattr(bench_step, "peak_flops", lambda kind, dtype: {"float32": 1e9}[dtype])
    config = one_device_config(tiny_config)
    result = json.loads(bench(capsys, tmp_path, config, "--json"))
    step = result["step"]
    median, low, high = step["step"]
    assert 0 < low <= median <= high
    assert step["images_per_second"] == pytest.approx(config.batch_size / median)
    assert step["product_share"] == pytest.approx(step["tflops"] / step["product_tflops"])
    assert step["mfu"] == pytest.approx(step["tflops"] / (jax.device_count() * 1e-3))
    assert step["peak_bytes"] is None  # a CPU does not say
    assert result["what"]["devices"] == jax.device_count()
    assert result["where"]["versions"]["jax"] == jax.__version__
    assert set(result["split"]) == {
        "augmentation", "teacher forward", "student forward", "losses, both ways",
        "student backward", "optimiser and teacher",
    }  # fmt: skip


@reads_a_file
def test_tables_have_all_parts(capsys, tmp_path, tiny_config):
    arguments = ["--parts=losses,input", "--loss_batches=2", f"--photos={PHOTOS}"]
    text = bench(capsys, tmp_path, tiny_config, *arguments)
    for wanted in ("decode, opencv", "all views with Pillow", "canvas 384", "chunked"):
        assert wanted in text


@reads_a_file
@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--parts=step,speed", "--parts=step,speed: 'speed' is unknown"),
        ("--rounds=0", "--rounds=0: it must be at least 1"),
        ("--parts=input", "--photos=FOLDER"),
        ("--loss_batches=8,x", "--loss_batches=8,x: whole numbers"),
        ("--alone", "--alone needs --peer=torch"),
    ],
)
def test_wrong_arguments_end_in_a_line(capsys, tmp_path, tiny_config, argument, words):
    with pytest.raises(UserError, match=words):
        bench(capsys, tmp_path, tiny_config, argument)


@reads_a_file
def test_a_folder_without_photos_is_named_by_the_flag(capsys, tmp_path, tiny_config):
    pytest.importorskip("PIL")
    with pytest.raises(UserError, match="^--photos=/nowhere: there are no images in it"):
        bench(capsys, tmp_path, tiny_config, "--parts=input", "--photos=/nowhere")


def test_photos_are_encoded_at_one_size():
    files = inputs.encoded_photos(PHOTOS)
    assert len(files) == inputs.NUM_PHOTOS
    for file in files[:5]:
        image = cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_COLOR)
        assert image is not None and image.shape == (375, 500, 3)
    with pytest.raises(UserError, match="photos = '/nowhere': there are no images"):
        inputs.encoded_photos("/nowhere")


def test_a_canvas_that_holds_the_photo_loses_nothing(tiny_config):
    errors = {side: inputs.fidelity(tiny_config, PHOTOS, side) for side in (64, 128, 512)}
    for kind in ("global", "local"):
        assert errors[512][kind] < 1e-3  # one box is given in whole pixels, one in floats
        assert errors[64][kind] > errors[128][kind] > 0.0


def test_peer_computes_the_same_loss(tiny_config):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from esvit_jax.bench import peer
    from esvit_jax.interop.names.published import state_dict_from_params
    from esvit_jax.interop.names.swin import to_transformers as to_huggingface

    config = one_device_config(tiny_config)
    config.backbone.drop_path_rate = 0.0
    config.loss.region_weight = 0.25
    work = workload(config, num_images=1000)
    other = peer.Peer(work, torch.device("cpu"), compiled=False)
    load_params(torch, other.student, work.state.params, to_huggingface, state_dict_from_params)
    load_params(torch, other.teacher, work.state.teacher, to_huggingface, state_dict_from_params)
    parts = step_parts(work)
    loss, _ = other.gradients(peer.to_torch(parts.augmentation(), other.device))
    gradients, scalars, *_ = parts.gradients()
    assert loss.item() == pytest.approx(float(scalars["loss"]), rel=1e-5)
    theirs = other.student.heads["region"].mlp[0].weight.grad.numpy()
    ours = np.asarray(gradients["region_head"]["mlp_0"]["kernel"]).T
    # Two norms of SwinModel have an eps of 1e-5 that no config changes.
    np.testing.assert_allclose(theirs, ours, atol=1e-3 * np.abs(ours).max())


def load_params(torch, network, params, to_huggingface, state_dict_from_params):
    """Our params into the peer's network."""
    from transformers import SwinModel

    backbone = to_huggingface(state_dict_from_params({"backbone": params["backbone"]}))
    tensors = {name: torch.tensor(np.asarray(x)) for name, x in backbone.items()}
    loaded = SwinModel.from_pretrained(None, config=network.swin.config, state_dict=tensors)
    missing, unexpected = network.swin.load_state_dict(loaded.state_dict(), strict=False)
    assert not missing and not unexpected
    for head, module in network.heads.items():
        ours = params[f"{head}_head"]
        state = {}
        for i in (0, 2, 4):
            state[f"mlp.{i}.weight"] = torch.tensor(np.asarray(ours[f"mlp_{i}"]["kernel"]).T)
            state[f"mlp.{i}.bias"] = torch.tensor(np.asarray(ours[f"mlp_{i}"]["bias"]))
        for name in ("weight_g", "weight_v"):
            state[name] = torch.tensor(np.asarray(ours["last_layer"][name]))
        module.load_state_dict(state)


def test_a_block_on_this_machine_has_no_estimates():
    with pytest.raises(UserError, match="^topology = 'cpu': it has no estimates"):
        block_cost(Block(2, 7, 16, 1, 0), parse_topology("cpu"), "float32")


@pytest.mark.slow
def test_a_block_on_a_tpu(monkeypatch):
    pytest.importorskip("libtpu")
    topology = parse_topology("v5e:1x1")
    for name, value in topology.environment().items():
        monkeypatch.setenv(name, value)
    small, large = (
        block_cost(Block(maps, 14, 96, 3, 3), topology, "float32") for maps in (32, 256)
    )
    rows, width = 32 * 14 * 14, 128 * 2  # features are padded to 128 places of two bytes
    assert small.bytes_accessed > 4 * rows * width  # in, out, their gradients
    assert 4 * small.cycles < large.cycles < 10 * small.cycles
    assert small.bytes_accessed < large.bytes_accessed


def test_parts_of_the_rest_have_gradients_of_all_they_take():
    """A part without a gradient would leave its backward pass out of the estimate."""
    for part in rest.parts(prototype_chunk=4096):
        results = jax.eval_shape(part.function, *part.arguments)
        shapes = {x.shape for x in jax.tree.leaves(results)}
        loss = part.name.startswith("prototypes")  # (student, teacher, own prototypes, …)
        wanted = part.arguments[:3:2] if loss else part.arguments
        assert {x.shape for x in jax.tree.leaves(wanted)} <= shapes, part.name


@pytest.mark.slow
def test_a_part_of_the_rest_on_a_tpu(monkeypatch):
    """The sum over rows for the bias's gradient costs less than the product beside it."""
    pytest.importorskip("libtpu")
    topology = parse_topology("v5e:1x1")
    for name, value in topology.environment().items():
        monkeypatch.setenv(name, value)
    part = rest.parts(prototype_chunk=4096)[0]
    assert topology.chip
    cost = rest.part_cost(part, topology.chip, topology.devices()[0])
    rows = part.arguments[1].shape[0]
    assert cost.bytes_accessed > 2 * rows * (96 + 288)  # x and the gradient are read
    assert 0 < cost.cycles < 2e6
