"""Networks to export, and what is looked at in exports."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from esvit_jax import checkpoint
from esvit_jax.config import default_config
from esvit_jax.interop.convert import convert
from esvit_jax.interop.load import load
from esvit_jax.models import create_model
from esvit_jax.state import init_params

DATA = Path(__file__).parent / "data"
PHOTOS = ("astronaut.jpg", "chelsea.jpg", "coffee.jpg")
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
        elif path[-1].key == "running_var":
            x = 0.5 + np.abs(x)
        return x.astype(np.float32)

    model = create_model(config)
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    return jax.tree_util.tree_map_with_path(draw, shapes)


def config_of(name, **fields):
    """Likewise, of another backbone with these fields."""
    config = small_config()
    for field in ("embed_dim", "depths", "num_heads", "window_size"):
        config.backbone[field] = None
    config.backbone.update(name=name, **fields)
    return config


def save_backbone(directory, config, seed=5):
    """A converted backbone."""
    params = {"backbone": random_params(config, seed)["backbone"]}
    origin = {"parts": "backbone", "source": "a.pth"}
    checkpoint.save_model(directory, config=config, origin=origin, teacher=params)
    return directory


def save_run(directory):
    """A run of two checkpoints, with metrics."""
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


def convert_nano(directory):
    """Weights of the published implementation: four stages, windows of 7, 224 pixels."""
    golden = np.load(DATA / "swin_nano_w7.npz")
    names = [n for n in golden.files if n.startswith(("student/", "teacher/"))]
    tensors = {n.replace("/", ".", 1): np.ascontiguousarray(golden[n]) for n in names}
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


def card(folder):
    return (folder / "README.md").read_text()
