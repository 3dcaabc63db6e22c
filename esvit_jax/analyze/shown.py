"""What functions draw, as a notebook shows it and as files keep it."""

import html
import io
import json
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from esvit_jax import buckets
from esvit_jax.analyze.inline import FIGURE_SIDE, inlined
from esvit_jax.data.decode import decode

DOTS_PER_PIXEL = 1.5  # of a figure, on a page
# Of a frame, pixels: before it knows what is in it, and at most.
FRAME, TALLEST = 640, 960


class Drawn(NamedTuple):
    """Pictures of what a network does, and the numbers behind them; a notebook shows the pictures.

    Attributes:
      numbers: as the command of the same name writes them.
      file: that has the numbers, JSON.
      pictures: PNG, by the names of their files.
    """

    numbers: list[dict[str, Any]]
    file: str
    pictures: Mapping[str, bytes]

    def write(self, folder: str | os.PathLike[str]) -> list[str]:
        """Writes all of it, in a folder that is made if need be, local or gs://; names the files.

        What the commands `correspond` and `attention` leave in a workdir, of which `report` tells,
        lies in it and in its folder `attention`.
        """
        with buckets.reaching(folder):
            path = epath.Path(os.path.expanduser(folder))
            path.mkdir(parents=True, exist_ok=True)
            if self.numbers:
                (path / self.file).write_text(json.dumps(self.numbers, indent=1) + "\n")
            for name, png in self.pictures.items():
                (path / name).write_bytes(png)
        return [*([self.file] if self.numbers else []), *self.pictures]

    def __repr__(self) -> str:
        return f"<{', '.join(self.pictures)}>"

    def _repr_html_(self) -> str:
        return "".join(map(_shown, self.pictures, self.pictures.values()))


def _shown(name: str, png: bytes) -> str:
    """A picture in a page whose ground may be dark."""
    canvas, (height, width) = decode(png, FIGURE_SIDE)
    picture = inlined(np.ascontiguousarray(canvas[:height, :width]))
    size = f"width: {picture.width / DOTS_PER_PIXEL:.0f}px; max-width: 100%; height: auto"
    return (
        f'<img src="{picture.uri}" alt="{html.escape(name)}" title="{html.escape(name)}" '
        f'style="{size}; display: block; margin: 4px 0; background: #fff">'
    )


def as_png(draw: Callable[..., None], *arguments: Any) -> bytes:
    """What a function of `figures` or `pictures` draws, in memory."""
    png = io.BytesIO()
    draw(*arguments, png)
    return png.getvalue()


def framed(page: str) -> str:
    """A page in a frame of its own, whose styles keep apart from those around it.

    It is as tall as what is in it, if a notebook lets it ask for that. Its links lead to places in
    it, and not, as they would without a base of their own, to such in the notebook.
    """
    page = page.replace("<head>", '<head>\n<base href="about:srcdoc">', 1)
    ask = "this.style.height = this.contentDocument.documentElement.offsetHeight + 2 + 'px'"
    style = f"width: 100%; height: {FRAME}px; max-height: {TALLEST}px; border: 0"
    return f'<iframe srcdoc="{html.escape(page)}" style="{style}" onload="{ask}"></iframe>'
