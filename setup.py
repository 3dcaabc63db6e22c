"""Packaging."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(r'__version__ = "(.*)"', (here / "esvit_jax/__init__.py").read_text())[1]

setup(
    name="esvit_jax",
    version=version,
    description="Self-supervised pretraining of multi-stage vision transformers in JAX",
    long_description=(here / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["esvit_jax", "esvit_jax.*"]), "esvit_jax.configs"],
    package_dir={"esvit_jax.configs": "configs"},  # for --config=quickstart from any folder
    package_data={
        "esvit_jax": ["py.typed"],
        "esvit_jax.data": ["bundled/*.md", "bundled/*.py", "bundled/fashion_mnist_mini/*"],
    },
    entry_points={"console_scripts": ["esvit = esvit_jax.__main__:main"]},
    install_requires=[
        "absl-py",
        "array_record",
        "einops",
        "etils",
        "flatbuffers",  # of jax.export, which does not declare it
        "flax>=0.12",
        "grain>=0.2.14",
        "importlib_resources",  # of tensorflow-datasets, which does not declare it
        "jax>=0.10",
        "jaxtyping",
        "matplotlib",
        "ml-collections>=1.1",
        "numpy",
        "opencv-python-headless>=5",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.11.30",
        "pyarrow",
        "rich",
        "safetensors",
        "tensorboardX",
        "tensorflow-datasets>=4.9.9",
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda12]"],
        "tf": ["tensorflow"],
        "heic": ["pillow-heif"],
        "torch": ["torch", "transformers"],
        "test": ["beartype", "pillow", "pytest", "pytest-xdist"],
        "dev": ["beartype", "pillow", "pre-commit", "pyright", "pytest", "pytest-xdist", "ruff"],
    },
)
