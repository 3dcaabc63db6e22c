"""What a compiled kernel says of itself: the maps that it is for, in `kernel_metadata`."""

import dataclasses
import json
import re
from typing import Any

from esvit_jax.models.kernels.chunk_layout import ChunkLayout
from esvit_jax.models.kernels.layout import LANES, Layout

METADATA = re.compile(r"kernel_metadata=(\{[^{}]*\})")
OMITTED = ("room",)  # of no use but to choose the maps of a program


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a kernel of window attention.

    Attributes:
      layout: of the maps.
      maps: all of them.
      maps_per_program: so many at a time lie in vector memory.
    """

    layout: Layout
    maps: int
    maps_per_program: int

    @property
    def programs(self) -> int:
        """That the kernel runs, one after the other."""
        return -(-self.maps // self.maps_per_program)

    @property
    def turns(self) -> int:
        """Of the loop over rows of windows in all programs; two fill and empty its pipeline."""
        return self.maps * self.layout.windows[0] + 2 * self.programs

    @property
    def head_windows(self) -> int:
        """Windows of all maps, each as often as it has heads."""
        y, x = self.layout.windows
        return self.maps * y * x * self.layout.heads

    def metadata(self) -> dict[str, str]:
        """For `pl.pallas_call`."""
        layout = {k: v for k, v in dataclasses.asdict(self.layout).items() if k not in OMITTED}
        return _told(layout | {"maps": self.maps, "maps_per_program": self.maps_per_program})

    @classmethod
    def of(cls, attributes: str) -> "Call | None":
        """The call that an instruction's attributes tell of; None if they tell of none.

        >>> call = Call(Layout(56, 56, 7, 3, heads=3, dim=32), maps=64, maps_per_program=2)
        >>> Call.of(f"kernel_metadata={json.dumps(call.metadata())}, metadata={{}}") == call
        True
        """
        fields = _heard(attributes)
        if "maps_per_program" not in fields:
            return None
        maps, per_program = fields.pop("maps"), fields.pop("maps_per_program")
        return cls(Layout(**fields), maps, per_program)


@dataclasses.dataclass(frozen=True)
class ChunkCall:
    """One call of a kernel of chunks.

    Attributes:
      layout: of the maps.
      maps: all of them.
    """

    layout: ChunkLayout
    maps: int

    @property
    def programs(self) -> int:
        """That the kernel runs, one after the other."""
        return self.maps * self.layout.heads

    @property
    def head_windows(self) -> int:
        """Slots of queries of all maps, each as often as it has heads."""
        return self.programs * self.layout.rows * self.layout.groups * self.layout.together

    @property
    def registers(self) -> tuple[float, float]:
        """Of the logits and of the keys of all groups, 8 x 128 each."""
        layout = self.layout
        groups = self.programs * layout.rows * layout.groups
        keys = 3 * layout.key_lanes
        room = 8 * LANES
        return groups * keys * layout.query_lanes / room, groups * keys * layout.dim / room

    def metadata(self) -> dict[str, str]:
        """For `pl.pallas_call`."""
        return _told(dataclasses.asdict(self.layout) | {"maps": self.maps})

    @classmethod
    def of(cls, attributes: str) -> "ChunkCall | None":
        """The call that an instruction's attributes tell of; None if they tell of none.

        >>> call = ChunkCall(ChunkLayout(56, 56, 7, heads=3, dim=32, num_global=1), maps=64)
        >>> ChunkCall.of(f"kernel_metadata={json.dumps(call.metadata())}, metadata={{}}") == call
        True
        """
        fields = _heard(attributes)
        if "num_global" not in fields:
            return None
        maps = fields.pop("maps")
        return cls(ChunkLayout(**fields), maps)


def _told(fields: dict[str, Any]) -> dict[str, str]:
    return {name: json.dumps(value) for name, value in fields.items()}


def _heard(attributes: str) -> dict[str, Any]:
    found = METADATA.search(attributes)
    return {k: json.loads(v) for k, v in json.loads(found[1]).items()} if found else {}
