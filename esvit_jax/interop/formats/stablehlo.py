"""One function, images to features, as a `jax.export` file that needs nothing but JAX.

The weights are inside: one file, and a function of images alone. `esvit_jax.load` makes a backbone
of it again.
"""

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from esvit_jax.errors import UserError
from esvit_jax.interop.exported import PROGRAM
from esvit_jax.interop.formats.base import LIBRARY_BOUND, Exportable, Format, Reading
from esvit_jax.models import Backbone, BackboneOutput
from esvit_jax.models.backbone import BlockInfo, StageInfo

PLATFORMS = ("cpu", "cuda", "tpu")

USAGE = """\
`{file}` is StableHLO with the weights inside, serialised by `jax.export` of JAX {version} for
{platforms}. It needs JAX alone (`pip install jax flatbuffers`, this version or a later one):

```python
from jax import export

backbone = export.deserialize(bytearray(open("FOLDER/{file}", "rb").read())).call
out = backbone(images)  # float32 [b, {size}, {size}, 3], any b, normalised as above
out["view_features"]    # [b, {features}]
out["region_features"]  # [b, h, w, {features}], the last map
out["stage_maps"]       # [b, h, w, d] of each stage, the finest first
```

Matrix products have the platform's default precision (TF32 on GPUs, bfloat16 on TPUs). What is not
used of the outputs costs nothing where the call is part of a function that is jitted.
`esvit_jax.load("FOLDER")` gives backbone and `preprocess` together."""


def usage(source: Exportable) -> str:
    """How to call the function."""
    return USAGE.format(
        file=PROGRAM, version=jax.__version__, platforms=", ".join(PLATFORMS),
        size=source.image_size, features=source.backbone.num_features,
    )  # fmt: skip


def check(source: Exportable) -> None:
    """Any backbone and any image size can be exported."""


def write(source: Exportable, folder: Path) -> None:
    """Writes the function."""
    backbone, params, size = source.backbone, source.params, source.image_size

    @jax.jit
    def outputs(images):
        out = backbone.forward(params, images)
        return {
            "view_features": out.view_features,
            "region_features": out.region_features,
            "stage_maps": out.stage_maps,
        }

    (b,) = jax.export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((b, size, size, 3), jnp.float32)
    exported = jax.export.export(outputs, platforms=PLATFORMS)(images)
    (folder / PROGRAM).write_bytes(exported.serialize())


def readings(source: Exportable, folder: Path, images: np.ndarray) -> Iterator[Reading]:
    """Yields the features of the function in the file."""
    out = _program(folder)(images)
    yield Reading(f"jax {jax.__version__}", out["view_features"], LIBRARY_BOUND)


def _program(folder: Path) -> Callable[[ArrayLike], Any]:
    """The function in a folder.

    Raises:
      UserError: its file is damaged.
    """
    try:
        exported = jax.export.deserialize(bytearray((folder / PROGRAM).read_bytes()))
    except OSError:
        raise
    except Exception as error:  # of flatbuffers, of many kinds
        raise UserError(f"{folder / PROGRAM} is no whole program of jax.export") from error
    return lambda images: exported.call(images)


class Program(Backbone):
    """A backbone that is a program: its weights are inside, its images of one size.

    Attributes:
      run: images f32[b, s, s, 3] -> {"view_features", "region_features", "stage_maps"}.
      image_size: s.
      maps: what `stages` says.
    """

    run: Callable[[ArrayLike], Any]
    image_size: int
    maps: tuple[StageInfo, ...]

    @property
    def stages(self) -> tuple[StageInfo, ...]:
        return self.maps

    @property
    def blocks(self) -> tuple[BlockInfo, ...]:
        return ()

    @property
    def num_draws(self) -> int:
        return 0

    def validate(self) -> None:
        """There is nothing to choose."""

    def __call__(
        self,
        images: Float[Array, "b h w 3"],
        drawn: Float[Array, "b draws"] | None = None,
        *,
        outputs: Collection[str] = (),
    ) -> BackboneOutput:
        size = self.image_size
        if images.shape[1:] != (size, size, 3):
            raise UserError(
                f"the program takes {size} x {size} pixels", argument="images", value=images.shape
            )
        if outputs:
            raise UserError(
                "the program has none of it; load a workdir, or an export with tensors",
                argument="outputs", value=tuple(outputs),
            )  # fmt: skip
        out = self.run(images)
        return BackboneOutput(block_means=(), attention=(), **out)


def load_program(folder: Path, like: Backbone, image_size: int) -> Program:
    """The backbone that the program in a folder is.

    Args:
      folder: of an export.
      like: the backbone that was exported.
      image_size: pixels along its images.

    Raises:
      UserError: the file is damaged.
    """
    return Program(run=_program(folder), image_size=image_size, maps=like.stages)


FORMAT = Format(check=check, write=write, readings=readings, usage=usage, library="jax")
