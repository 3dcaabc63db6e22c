"""Model cards: what they say, and that the libraries do with their lines as they say."""

import dataclasses
import json
import sys
from typing import Any

import jax
import numpy as np
import pytest
from exports import (
    DATA,
    PHOTOS,
    card,
    config_of,
    convert_nano,
    normalized,
    own_features,
    own_outputs,
    photos,
    save_backbone,
    save_run,
    snippet,
    snippets,
)
from PIL import Image
from safetensors.numpy import load_file

from esvit_jax import checkpoint
from esvit_jax.commands.export import main
from esvit_jax.interop.card import sample_photos
from esvit_jax.interop.export import export
from esvit_jax.interop.formats import FORMATS
from esvit_jax.interop.formats.base import (
    relative_error,
)
from esvit_jax.interop.load import load, preprocessor
from esvit_jax.interop.names import FAMILIES
from esvit_jax.interop.names.published import params_from_state_dict
from esvit_jax.models import Swin


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def golden():
    return np.load(DATA / "swin_nano_w7.npz")


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    return convert_nano(tmp_path_factory.mktemp("nano"))


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
    folder = tmp_path_factory.mktemp("resnet")
    save_backbone(folder / "run", config_of("resnet50", base_width=8, depths=(1, 1, 2)))
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
def test_cards_of_a_vit(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    config = config_of("vit_tiny", embed_dim=32, depths=(2,), num_heads=(4,), patch_size=8)
    save_backbone(tmp_path / "run", config)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {"images": [Image.open(DATA / "photos" / name) for name in PHOTOS]}
    pytest.importorskip("transformers")
    export(tmp_path / "run", tmp_path / "huggingface", format="huggingface")
    with torch.no_grad():
        exec(snippet(card(tmp_path / "huggingface")), scope)
    views = scope["inputs"]["pixel_values"].numpy().transpose(0, 2, 3, 1)
    ours, tokens = own_outputs(tmp_path / "run", views), scope["out"].last_hidden_state
    assert relative_error(tokens[:, 0], ours.view_features) <= 1e-4
    assert relative_error(tokens[:, 1:], ours.region_features.reshape(3, 16, 32)) <= 1e-4
    pytest.importorskip("timm")
    assert len(export(tmp_path / "run", tmp_path / "timm", format="timm").errors) == 2
    scope["images"] = scope["inputs"]["pixel_values"]
    with torch.no_grad():
        exec(snippet(card(tmp_path / "timm")), scope)
        features = scope["model"](scope["images"])
    assert relative_error(features, ours.view_features) <= 1e-4


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


@third_party
def test_card_of_a_resnet_for_timm(tmp_path, monkeypatch):
    """As timm loads it by name; there are no layer norms to tell it of."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("timm")
    save_backbone(tmp_path / "run", config_of("resnet50", depths=(1, 1, 1, 1)))
    assert len(export(tmp_path / "run", tmp_path / "out", format="timm").errors) == 2
    monkeypatch.chdir(tmp_path)
    views = np.random.default_rng(0).normal(size=(2, 32, 48, 3)).astype(np.float32)
    scope: dict[str, Any] = {"images": torch.from_numpy(views.transpose(0, 3, 1, 2).copy())}
    text = snippet(card(tmp_path / "out"))
    with torch.no_grad():
        exec(text, scope)
        features = scope["model"](scope["images"])
    assert "norm_layer" not in text and "partial" not in text
    ours = own_outputs(tmp_path / "run", views).view_features
    assert relative_error(features, ours) <= 1e-4
