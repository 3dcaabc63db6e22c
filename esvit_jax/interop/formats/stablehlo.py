"""One function, images to features, as a `jax.export` file that needs nothing but JAX.

The weights are inside: one file, and a function of images alone.
"""

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from esvit_jax.interop.formats.base import LIBRARY_BOUND, Exportable, Format, Reading

FILE = "features.jax_export"
PLATFORMS = ("cpu", "cuda", "tpu")

README = """\
# Images to features, without the code that trained them

`{file}` is StableHLO with the weights inside, serialised by `jax.export` of JAX {version}
for {platforms}. It takes float32 [b, {size}, {size}, 3], any b, normalised as
`model_card.md` says, and gives view features float32 [b, {features}]. Matrix products have the
platform's default precision (TF32 on GPUs, bfloat16 on TPUs). To call it,
`pip install jax flatbuffers` (this version of JAX, or a later one):

    from jax import export
    features = export.deserialize(bytearray(open("{file}", "rb").read())).call
    print(features(images).shape)  # images: (pixels / 255 - mean) / std, RGB
"""


def usage(source: Exportable) -> str:
    """Where it is said how to call the function."""
    return f"`README.md` says how to call the function in `{FILE}`."


def check(source: Exportable) -> None:
    """Any backbone and any image size can be exported."""


def write(source: Exportable, folder: Path) -> None:
    """Writes the function and a README that says how to call it."""
    backbone, params, size = source.backbone, source.params, source.image_size

    @jax.jit
    def features(images):
        return backbone.forward(params, images).view_features

    (b,) = jax.export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((b, size, size, 3), jnp.float32)
    exported = jax.export.export(features, platforms=PLATFORMS)(images)
    (folder / FILE).write_bytes(exported.serialize())
    text = README.format(
        file=FILE, version=jax.__version__, platforms=", ".join(PLATFORMS), size=size,
        features=backbone.num_features,
    )  # fmt: skip
    (folder / "README.md").write_text(text)


def readings(source: Exportable, folder: Path, images: np.ndarray) -> Iterator[Reading]:
    """Yields the features of the function in the file."""
    exported = jax.export.deserialize(bytearray((folder / FILE).read_bytes()))
    yield Reading(f"jax {jax.__version__}", exported.call(images), LIBRARY_BOUND)


FORMAT = Format(check=check, write=write, readings=readings, usage=usage)
