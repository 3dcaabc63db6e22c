"""Backbones out: names, features as other libraries compute them, refusals, model cards."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from esvit_jax import checkpoint
from esvit_jax.commands.export import main
from esvit_jax.config import default_config
from esvit_jax.errors import RunError, UserError
from esvit_jax.interop.card import sample_photos
from esvit_jax.interop.convert import convert
from esvit_jax.interop.export import export
from esvit_jax.interop.exported import PROGRAM, load_network
from esvit_jax.interop.formats import FORMATS, esvit, huggingface, timm_file
from esvit_jax.interop.formats.base import (
    Format,
    Reading,
    check_images,
    relative_error,
    size_ranges,
    write_tensors,
)
from esvit_jax.interop.load import load, preprocessor
from esvit_jax.interop.names import FAMILIES
from esvit_jax.interop.names.published import params_from_state_dict
from esvit_jax.interop.names.swin import SwinFamily
from esvit_jax.models import Swin, create_model
from esvit_jax.state import init_params

DATA = Path(__file__).parent / "data"
PHOTOS = ("astronaut.jpg", "chelsea.jpg", "coffee.jpg")
TENSOR_FORMATS = ("huggingface", "timm", "esvit")
MEAN, STD = np.array((0.485, 0.456, 0.406)), np.array((0.229, 0.224, 0.225))


def small_config():
    """32-px images, maps of 8 and 4, windows of 4; the first stage has shifted blocks."""
    config = default_config()
    config.dtype = "float32"
    config.backbone.embed_dim = 16
    config.backbone.depths = (2, 2)
    config.backbone.num_heads = (2, 4)
    config.backbone.window_size = 4
    config.backbone.image_size = 32
    config.views.global_size = 32
    config.head.num_prototypes = 12
    config.head.hidden_dim = 8
    config.head.bottleneck_dim = 6
    return config


def random_params(config, seed):
    """Params large enough that windows, shifts and bias tables show in the features."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        x = rng.normal(size=leaf.shape)
        if path[-1].key == "kernel":
            x /= np.prod(leaf.shape[:-1]) ** 0.5
        elif path[-1].key == "scale":
            x = 1 + 0.1 * x
        return x.astype(np.float32)

    model = create_model(config)
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    config = small_config()
    config.data.name = "folder:/photos"
    config.batch_size = 8
    origin = {"num_images": 100, "steps_per_epoch": 12, "total_steps": 60}
    rng = np.random.default_rng(3)
    centers = {head: rng.normal(size=12).astype(np.float32) for head in ("view", "region")}
    for step in (10, 30):
        networks = {
            "student": random_params(config, step),
            "teacher": random_params(config, step + 1),
        }
        checkpoint.save_model(
            directory, config=config, origin=origin, **networks, centers=centers, step=step
        )
    lines = [
        {"step": 20, "loss": 2.0, "knn/top1/10": 71.5, "knn/top5/10": 90.0, "knn/top1/20": 70.25},
        {"step": 30, "loss": 1.0},
        {"step": 40, "knn/top1/10": 99.0},
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return directory


@pytest.fixture(scope="module")
def golden():
    return np.load(DATA / "swin_nano_w7.npz")


@pytest.fixture(scope="module")
def nano(tmp_path_factory, golden):
    """Weights of the published implementation: four stages, windows of 7, 224 pixels."""
    names = [n for n in golden.files if n.startswith(("student/", "teacher/"))]
    tensors = {n.replace("/", ".", 1): np.ascontiguousarray(golden[n]) for n in names}
    directory = tmp_path_factory.mktemp("nano")
    save_file(tensors, directory / "nano.safetensors")
    convert(directory / "nano.safetensors", directory / "converted")
    return directory / "converted"


def normalized(images):
    """uint8[b, h, w, 3] as a backbone's input."""
    return ((np.asarray(images) / 255 - MEAN) / STD).astype(np.float32)


def photos(height, width):
    """Real photos, squeezed into a size."""
    images = [Image.open(DATA / "photos" / name).convert("RGB") for name in PHOTOS]
    return normalized([image.resize((width, height), Image.Resampling.BICUBIC) for image in images])


def own_outputs(workdir, images):
    """Of the teacher."""
    backbone, variables, _ = load(workdir)
    out: Any = jax.jit(backbone.apply)(variables, images)
    return out


def own_features(workdir, images):
    return own_outputs(workdir, images).view_features


def snippets(text):
    """The blocks of Python in a Markdown text."""
    return [part.split("```")[0] for part in text.split("```python\n")[1:]]


def snippet(text):
    """The first of them."""
    return snippets(text)[0]


def test_sizes_as_ranges():
    assert size_ranges([3, 5, 6, 7, 9]) == "3, 5 to 7, 9 pixels"


# Exports


@pytest.mark.parametrize(
    ("format", "key"),
    [("huggingface", "teacher"), ("timm", "student"), ("esvit", "teacher"), ("esvit", "student")],
)
def test_what_is_exported_is_loaded(workdir, tmp_path, format, key):
    checks = export(workdir, tmp_path / "out", format=format, key=key)
    assert max(checks.errors.values()) <= 1e-4
    backbone, variables, preprocess = load(tmp_path / "out")
    trained = checkpoint.load_model(workdir)
    expected = {"teacher": trained.teacher, "student": trained.student}[key]["backbone"]
    jax.tree.map(np.testing.assert_array_equal, variables["params"], expected)
    assert preprocess([DATA / "photos" / "coffee.jpg"]).shape == (1, 32, 32, 3)
    assert backbone.num_features == 32
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_published_names_and_shapes(nano, golden, tmp_path):
    export(nano, tmp_path / "out", format="esvit")
    tensors = load_file(tmp_path / "out" / "checkpoint.safetensors")
    for network, prefix in (("student", "student.module."), ("teacher", "teacher.")):
        names = [n for n in golden.files if n.startswith(network + "/")]
        expected = {n.replace(network + "/", prefix): golden[n] for n in names}
        found = {n: x for n, x in tensors.items() if n.startswith(prefix)}
        index = {n: found.pop(n) for n in list(found) if n.endswith(".relative_position_index")}
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            np.testing.assert_array_equal(found[name], tensor)
        assert len(index) == 8
        assert all(x.shape == (49, 49) and x.dtype == np.int64 for x in index.values())
        # From the top left to the bottom right of a window, and the same place.
        first = index[prefix + "layers.0.blocks.0.attn.relative_position_index"]
        assert (first[0, 48], first[0, 0], first[48, 0]) == (0, 84, 168)


def test_published_checkpoint_comes_back(workdir, tmp_path):
    export(workdir, tmp_path / "out", format="esvit")
    convert(tmp_path / "out" / "checkpoint.safetensors", tmp_path / "again")
    old, new = (checkpoint.load_model(path) for path in (workdir, tmp_path / "again"))
    for name in ("student", "teacher", "centers"):
        jax.tree.map(np.testing.assert_array_equal, getattr(new, name), getattr(old, name))


def test_backbone_alone_is_exported(workdir, tmp_path):
    export(workdir, tmp_path / "timm", format="timm", key="student")
    convert(tmp_path / "timm" / "model.safetensors", tmp_path / "backbone", image_size=32)
    export(tmp_path / "backbone", tmp_path / "out", format="esvit")
    names = load_file(tmp_path / "out" / "checkpoint.safetensors").keys()
    assert all(name.startswith("teacher.") and ".head" not in name for name in names)
    assert "unknown here: converted from model.safetensors" in card(tmp_path / "out")
    _, variables, _ = load(tmp_path / "out")
    expected = checkpoint.load_model(workdir).student["backbone"]
    jax.tree.map(np.testing.assert_array_equal, variables["params"], expected)


def test_a_backbone_without_names_goes_where_none_are_needed(workdir, tmp_path, monkeypatch):
    monkeypatch.delitem(FAMILIES, Swin)
    assert export(workdir, tmp_path / "out", format="stablehlo")
    assert "| architecture | Swin |" in card(tmp_path / "out")
    with pytest.raises(UserError, match="a Swin has no names in files yet"):
        export(workdir, tmp_path / "timm", format="timm")


def test_stablehlo_runs_without_this_package(workdir, tmp_path):
    export(workdir, tmp_path / "out", format="stablehlo", image_size=40)
    images = np.random.default_rng(0).normal(size=(5, 40, 40, 3)).astype(np.float32)
    np.save(tmp_path / "images.npy", images)
    program = f"""
import sys
sys.modules["esvit_jax"] = None  # importing it is an error
import numpy as np
images = np.load("images.npy")
{snippet(card(tmp_path / "out"))}
maps = {{f"map{{i}}": x for i, x in enumerate(out.pop("stage_maps"))}}
np.savez("out.npz", **out, **maps)
assert not any(name.startswith(("flax", "esvit_jax.")) for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    found, expected = np.load(tmp_path / "out.npz"), own_outputs(workdir, images)
    assert sorted(found) == ["map0", "map1", "region_features", "view_features"]
    for name in ("view_features", "region_features"):
        assert relative_error(found[name], getattr(expected, name)) <= 1e-5
    for i, stage_map in enumerate(expected.stage_maps):
        assert relative_error(found[f"map{i}"], stage_map) <= 1e-5
    exported = jax.export.deserialize(bytearray((tmp_path / "out" / PROGRAM).read_bytes()))
    assert exported.platforms == ("cpu", "cuda", "tpu")


def test_stablehlo_is_loaded(workdir, tmp_path):
    export(workdir, tmp_path / "out", format="stablehlo")
    backbone, variables, preprocess = load(tmp_path / "out")
    images = preprocess([DATA / "photos" / "coffee.jpg"])
    out: Any = jax.jit(backbone.apply)(variables, images)
    expected = own_outputs(workdir, images)
    for name in ("view_features", "region_features", "stage_maps"):
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5),
            getattr(out, name), getattr(expected, name),
        )  # fmt: skip
    assert backbone.stages == load(workdir).backbone.stages
    with pytest.raises(UserError, match=r"images = \(1, 40, 32, 3\): .* takes 32 x 32 pixels"):
        backbone.apply(variables, jax.numpy.zeros((1, 40, 32, 3)))
    with pytest.raises(UserError, match="outputs = .*: the program has none of it"):
        backbone.apply(variables, images, outputs=("attention",))
    with pytest.raises(UserError, match="holds a program and no weights, which only `esvit_jax"):
        load_network(tmp_path / "out")
    (tmp_path / "out" / PROGRAM).write_bytes(b"half")
    with pytest.raises(UserError, match="is no whole program of jax.export"):
        load(tmp_path / "out")


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "huggingface", "image_size": 40}, "image_size = 40: .* 25 to 32 pixels"),
        ({"format": "timm", "image_size": 28}, "image_size = 28: timm.* 29 to 32 pixels"),
        (
            {"format": "stablehlo", "image_size": 3},
            "image_size = 3: it must be from 4, one patch",
        ),
        (
            {"format": "esvit", "image_size": 0},
            "image_size = 0: it must be from 4, one patch",
        ),
        ({"format": "esvit", "step": 11}, r"no checkpoint of step 11; it has steps \[10, 30\]"),
    ],
)
def test_refusals_write_nothing(workdir, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        export(workdir, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_existing_folder_is_kept(workdir, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"it exists already"):
        export(workdir, tmp_path / "out", format="esvit")
    assert not list((tmp_path / "out").iterdir())


def test_remote_folder_is_refused(workdir):
    with pytest.raises(UserError, match=r"--to=gs://bucket/out: make a local folder"):
        main([f"--workdir={workdir}", "--to=gs://bucket/out", "--format=timm"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "onnx"}, "format = 'onnx': known are huggingface, timm, esvit, stablehlo"),
        ({"format": "timm", "key": "both"}, "key = 'both': it must be 'teacher' or 'student'"),
    ],
)
def test_arguments_are_named(workdir, tmp_path, options, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        export(workdir, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_noticed_first(tmp_path):
    (tmp_path / "file").write_text("")
    flag = f"--to={tmp_path / 'file' / 'out'}"
    with pytest.raises(UserError, match=f"^{flag}: it cannot be made: Not a directory$"):
        main([f"--workdir={tmp_path / 'nothing'}", flag, "--format=timm"])


def test_weights_that_are_not_finite_are_refused(tmp_path):
    config = small_config()
    networks = {name: random_params(config, 0) for name in ("student", "teacher")}
    networks["teacher"]["backbone"]["norm"]["bias"][7] = np.inf
    centers = {head: np.zeros(12, np.float32) for head in ("view", "region")}
    checkpoint.save_model(tmp_path / "run", config=config, origin={}, **networks, centers=centers)
    message = "norm.bias of the teacher: 1 of its 32 values are not finite"
    with pytest.raises(UserError, match=message):
        export(tmp_path / "run", tmp_path / "out", format="esvit")
    with pytest.raises(UserError, match=f"path = '.*run': step 0: {message[:9]}"):
        load(tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_format_that_lacks_the_backbone(workdir, tmp_path, monkeypatch):
    monkeypatch.setattr(SwinFamily, "timm", None)
    with pytest.raises(UserError, match="^timm has no Swin; take another format"):
        export(workdir, tmp_path / "out", format="timm")


def test_a_format_is_one_object_and_one_line(workdir, tmp_path, monkeypatch):
    def write(source, folder):
        (folder / "size").write_text(str(source.image_size))

    def readings(source, folder, images):
        yield Reading("again", source.features(source.params, images), 0.0)

    dummy = Format(
        lambda source: None, write, readings, lambda source: "See FOLDER.", "a_library",
        config_file="our.json",
    )  # fmt: skip
    monkeypatch.setitem(FORMATS, "dummy", dummy)
    assert export(workdir, tmp_path / "out", format="dummy") == ({"again": 0.0}, [])
    assert (tmp_path / "out" / "size").read_text() == "32"
    assert "See out." in card(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "our.json").read_text())["facts"]["format"] == "dummy"


@pytest.mark.parametrize("format", TENSOR_FORMATS)
def test_wrong_files_are_noticed(workdir, tmp_path, monkeypatch, format):
    """One block's query and key swapped: every name and shape is right, the features are not."""

    def swap(path, tensors):
        for name, x in tensors.items():
            if name.endswith("1.attn.qkv.weight"):
                tensors[name] = np.roll(x, len(x) // 3, axis=0)
            if name.endswith("1.attention.self.query.weight"):
                key = name.replace("query", "key")
                tensors[name], tensors[key] = tensors[key], x
        write_tensors(path, tensors)

    module = {"huggingface": huggingface, "timm": timm_file, "esvit": esvit}[format]
    monkeypatch.setattr(module, "write_tensors", swap)
    with pytest.raises(RunError, match=r"^nothing is written: .* off by"):
        export(workdir, tmp_path / "out", format=format)
    assert not list(tmp_path.iterdir())


# Model cards


def card(folder):
    return (folder / "README.md").read_text()


def test_model_card(workdir, tmp_path, capsys):
    main([f"--workdir={workdir}", f"--to={tmp_path / 'out'}", "--format=huggingface"])
    text = card(tmp_path / "out")
    assert "depths (2, 2), heads (2, 4), embed_dim 16, window 4, patch 4" in text
    params = checkpoint.load_model(workdir).teacher["backbone"]
    assert f"| parameters | {sum(x.size for x in jax.tree.leaves(params)):,}, float32 |" in text
    assert "| features | 32 an image" in text
    assert "| input | RGB, 32 × 32: shorter side to 37 pixels (bicubic)" in text
    assert "mean 0.485, 0.456, 0.406, std 0.229, 0.224, 0.225" in text
    assert "the teacher's" in text
    assert (
        "| training | 30 steps of 8 images, matching views and regions (2.5 epochs), on "
        "folder:/photos, split train (100 images) |" in text
    )
    assert (
        "| k-NN | top-1 71.50 % (k=10), 70.25 % (k=20) on folder:/photos validation, step 20 |"
        in text
    )
    assert 'SwinModel.from_pretrained("out")' in text
    assert "25 to 32 pixels" in text
    assert "- esvit_jax: 0.0e+00" in text
    printed, progress = capsys.readouterr()
    assert f"written: {tmp_path / 'out'}" in printed
    # transformers, where it is installed, has a line of its own.
    assert [line for line in progress.splitlines() if line and "Loading weights" not in line] == [
        f"reading {workdir}",
        "writing it for huggingface",
        "comparing features computed from the files with the backbone's",
    ]


def test_model_card_of_an_earlier_student(workdir, tmp_path):
    export(workdir, tmp_path / "out", format="timm", key="student", step=10)
    text = card(tmp_path / "out")
    assert "the student's" in text
    assert "| training | 10 steps" in text
    assert "| k-NN | not known |" in text
    arguments = json.loads((tmp_path / "out" / "config.json").read_text())["model_args"]
    assert (arguments["embed_dim"], arguments["depths"], arguments["img_size"]) == (16, [2, 2], 32)


def test_the_header_is_what_the_hub_reads(workdir, tmp_path):
    yaml = pytest.importorskip("yaml")
    for format, library in (("timm", "timm"), ("huggingface", "transformers")):
        export(workdir, tmp_path / format, format=format)
        _, header, text = card(tmp_path / format).split("---\n", 2)
        assert yaml.safe_load(header) == {
            "license": "unknown",
            "library_name": library,
            "pipeline_tag": "image-feature-extraction",
            "tags": ["esvit", "swin", "self-supervised-learning"],
        }
        assert text.startswith("\n# A backbone")


# Checks that cannot be made


def install(monkeypatch, folder, **packages):
    """Packages of these sources, before all others."""
    for name, text in packages.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(text)
        for module in {name, *(m for m in sys.modules if m.startswith(f"{name}."))}:
            monkeypatch.setitem(sys.modules, module, None)  # what is there comes back at the end
            del sys.modules[module]
    monkeypatch.syspath_prepend(folder)


BROKEN = "raise RuntimeError('operator torchvision::nms\\n does not exist')"
TORCH = "class Tensor: ..."
LAZY = """
def __getattr__(name):
    try:
        import torchvision
    except RuntimeError as error:
        raise ModuleNotFoundError("Could not import module. Look above") from error
"""


@pytest.mark.parametrize(
    ("format", "packages", "line"),
    [
        (
            "huggingface", {"torch": TORCH, "transformers": LAZY, "torchvision": BROKEN},
            "not checked with transformers, because it cannot be imported (RuntimeError: operator "
            "torchvision::nms does not exist)",
        ),
        (
            "huggingface", {"torch": "raise OSError('libcudart.so.13: no such file')"},
            "not checked with transformers, because it cannot be imported (OSError: "
            "libcudart.so.13: no such file)",
        ),
        (
            "timm", {"timm": "import torch_of_nobody"},
            "not checked with timm, because torch_of_nobody is not installed",
        ),
        (
            "esvit", {"torch": "import torch_of_nobody"},
            "not checked with torch, because torch_of_nobody is not installed",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_checked_is_said(
    workdir, tmp_path, monkeypatch, capsys, format, packages, line
):
    install(monkeypatch, tmp_path / "packages", **packages)
    main([f"--workdir={workdir}", f"--to={tmp_path / 'out'}", f"--format={format}"])
    assert line in capsys.readouterr().out.splitlines()
    assert f"- {line}\n" in card(tmp_path / "out")
    if library := FORMATS[format].pixels and FORMATS[format].library:
        assert f"\nWhat {library} makes of images was not checked with" in card(tmp_path / "out")
    load(tmp_path / "out")


def test_pixels_are_measured(workdir, tmp_path, monkeypatch):
    """Of a library that cuts the centre out as ours, but one pixel to the right."""

    def pixels(source, folder, photos):
        assert [photo.shape for photo in photos] == [(427, 640, 3)] * 2 + [(427, 427, 3)] * 2
        assert (folder / "model.safetensors").exists()
        ours = np.array(preprocessor(source.config)(photos))
        ours[1] = np.roll(ours[1], 1, axis=1)
        return ours

    timm = dataclasses.replace(FORMATS["timm"], pixels=pixels)
    monkeypatch.setitem(FORMATS, "timm", timm)
    export(workdir, tmp_path / "out", format="timm")
    _, flower, *_ = sample_photos()
    images = np.array(load(tmp_path / "out").preprocess([flower]))
    features = own_features(workdir, np.concatenate([images, np.roll(images, 1, axis=2)]))
    percent = 100 * relative_error(features[1:], features[:1])
    assert percent > 0.3
    assert f"features are off by 0.0 to {percent:.1f} % of their\nlength" in card(tmp_path / "out")


# The libraries themselves (extra torch)

third_party = pytest.mark.filterwarnings("default")


def transformers_model(folder):
    """A new SwinModel: it keeps windows that an earlier image made it clip."""
    from transformers import SwinModel

    model, report = SwinModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def transformers_features(folder, images):
    import torch

    with torch.no_grad():
        pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        return transformers_model(folder)(pixels).pooler_output.numpy()


@pytest.fixture(scope="module")
def transformers_folder(nano, tmp_path_factory):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("huggingface") / "out"
    export(nano, folder, format="huggingface")
    return folder


@third_party
def test_transformers_on_the_published_images(transformers_folder, golden):
    features = transformers_features(transformers_folder, normalized(golden["crops/0"]))
    assert relative_error(features, golden["pooled"]) <= 1e-4


@third_party
@pytest.mark.parametrize(("height", "width"), [(224, 224), (196, 300)])
def test_transformers_agrees_on_photos(nano, transformers_folder, height, width):
    images = photos(height, width)
    features = transformers_features(transformers_folder, images)
    assert np.abs(features - own_features(nano, images)).max() <= 1e-4


@third_party
def test_card_for_transformers(nano, transformers_folder, monkeypatch):
    import torch

    first, pyramid, exactly = snippets(card(transformers_folder))
    large = Image.open(DATA / "photos" / "coffee.jpg").resize((1024, 683))
    images: list[Any] = [
        large,
        *(Image.open(DATA / "photos" / name) for name in (*PHOTOS, "rocket.jpg")),
    ]
    monkeypatch.chdir(transformers_folder.parent)
    scope: dict[str, Any] = {"images": images}
    with torch.no_grad():
        for lines in (first, pyramid, exactly):
            exec(lines, scope)
        found = torch.cat([scope["pixel_values"](image) for image in images]).numpy()
    views = scope["processor"](images, return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)
    ours = own_outputs(nano, views)
    assert relative_error(scope["out"].pooler_output, ours.view_features) <= 1e-4
    regions = ours.region_features.reshape(5, 49, 64)
    assert relative_error(scope["out"].last_hidden_state, regions) <= 1e-4
    assert len(scope["maps"]) == 3
    for theirs, stage_map in zip(scope["maps"], ours.stage_maps, strict=False):
        assert relative_error(theirs.permute(0, 2, 3, 1), stage_map) <= 1e-4

    _, _, preprocess = load(nano)
    prepared = np.asarray(preprocess(images))
    exact = found.transpose(0, 2, 3, 1)
    # Without torchvision, Pillow rounds to whole levels of 255, twice.
    assert np.abs(exact - prepared).mean() <= 0.005
    assert relative_error(own_features(nano, exact), own_features(nano, prepared)) <= 1e-3
    # The lower of two middles is not the even one: a pixel to the left.
    assert relative_error(views[4], prepared[4]) > 0.1 > relative_error(exact[4], prepared[4])
    assert "transformers prepares as above, features are off by 0." in card(transformers_folder)


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    config = small_config()
    for field in ("embed_dim", "depths", "num_heads", "window_size"):
        config.backbone[field] = None
    config.backbone.name, config.backbone.base_width = "resnet50", 8
    config.backbone.depths = (1, 1, 2)
    teacher = jax.tree_util.tree_map_with_path(
        lambda path, x: abs(x) + 0.5 if path[-1].key == "running_var" else x,
        random_params(config, 5)["backbone"],
    )
    folder = tmp_path_factory.mktemp("resnet")
    origin = {"parts": "backbone", "source": "a.pth"}
    params = {"backbone": teacher}
    checkpoint.save_model(folder / "run", config=config, origin=origin, teacher=params)
    export(folder / "run", folder / "out", format="huggingface")
    return folder


def test_counters_stay_scalars(resnet):
    tensors = load_file(resnet / "out" / "model.safetensors")
    counters = [x for name, x in tensors.items() if name.endswith("num_batches_tracked")]
    assert len(counters) == 1 + 3 * 4 + 3
    assert all(x.shape == () for x in counters)


@third_party
def test_card_of_a_resnet(resnet, monkeypatch):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    monkeypatch.chdir(resnet)
    scope: dict[str, Any] = {"images": [Image.open(DATA / "photos" / name) for name in PHOTOS]}
    with torch.no_grad():
        exec(snippet(card(resnet / "out")), scope)
    views = scope["inputs"]["pixel_values"].numpy().transpose(0, 2, 3, 1)
    out, ours = scope["out"], own_outputs(resnet / "run", views)
    assert relative_error(out.pooler_output.flatten(1), ours.view_features) <= 1e-4
    assert relative_error(out.last_hidden_state.permute(0, 2, 3, 1), ours.region_features) <= 1e-4
    for theirs, stage_map in zip(out.hidden_states[1:], ours.stage_maps, strict=True):
        assert relative_error(theirs.permute(0, 2, 3, 1), stage_map) <= 1e-4


@third_party
def test_transformers_by_size(workdir, tmp_path):
    """Padded maps agree; a last map larger than its window does not, a smaller one does not run."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    export(workdir, tmp_path / "out", format="huggingface")
    for size, low, high in ((28, 0.0, 1e-4), (40, 1e-2, 1.0)):
        images = photos(size, 2 * size)
        found = transformers_features(tmp_path / "out", images)
        assert low <= relative_error(found, own_features(workdir, images)) <= high
    with pytest.raises(RuntimeError):
        transformers_features(tmp_path / "out", photos(24, 48))


@third_party
def test_published_file_of_torch(workdir, tmp_path):
    torch = pytest.importorskip("torch")
    export(workdir, tmp_path / "out", format="esvit", step=30)
    content = torch.load(tmp_path / "out" / "checkpoint.pth", weights_only=True)
    assert content.keys() == {"student", "teacher", "dino_loss", "epoch"}
    assert content["epoch"] == 2
    assert all(name.startswith("module.") for name in content["student"])
    assert content["teacher"]["head.last_layer.weight_v"].shape == (12, 6)
    centers = checkpoint.load_model(workdir).centers
    np.testing.assert_array_equal(content["dino_loss"]["center_grid"][0], centers["region"])
    assert content["dino_loss"]["center"].shape == (1, 12)
    network = {name: x.numpy() for name, x in content["teacher"].items()}
    network = FAMILIES[Swin].weights(network)
    expected = checkpoint.load_model(workdir).teacher
    jax.tree.map(np.testing.assert_array_equal, params_from_state_dict(network), expected)


@third_party
def test_card_for_timm(nano, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    pytest.importorskip("timm")
    checks = export(nano, tmp_path / "out", format="timm")
    assert len(checks.errors) == 2 and not checks.unchecked
    images = photos(224, 224)
    monkeypatch.chdir(tmp_path)
    scope = {"images": torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))}
    with torch.no_grad():
        for lines in snippets(card(tmp_path / "out")):
            exec(lines, scope)
        features = scope["model"](scope["images"]).numpy()
    ours = own_outputs(nano, images)
    assert np.abs(features - ours.view_features).max() <= 1e-4
    for theirs, stage_map in zip(scope["maps"], ours.stage_maps, strict=True):
        assert relative_error(theirs.permute(0, 2, 3, 1), stage_map) <= 1e-4
    photo = Image.open(DATA / "photos" / "rocket.jpg")
    prepared = scope["transform"](photo).numpy().transpose(1, 2, 0)
    assert relative_error(prepared, load(nano).preprocess([photo])[0]) <= 0.01


@third_party
def test_card_for_esvit(workdir, tmp_path, monkeypatch):
    export(workdir, tmp_path / "out", format="esvit")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {"images": [DATA / "photos" / name for name in PHOTOS]}
    exec(snippet(card(tmp_path / "out")), scope)
    _, _, preprocess = load(workdir)
    expected = own_features(workdir, preprocess(scope["images"]))
    np.testing.assert_allclose(scope["features"], expected, atol=1e-5)


def test_check_images_are_always_the_same():
    images = check_images(32)
    assert images.shape == (3, 32, 32, 3)
    assert float(images[0, 0, 0, 0]) == pytest.approx(0.12573022)
    np.testing.assert_array_equal(images[1, :8, :8], np.broadcast_to(images[1, 0, 0], (8, 8, 3)))
    np.testing.assert_allclose(images[2, 0, 31], [-2, 2, 2])
