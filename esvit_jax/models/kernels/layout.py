"""Where the tokens of a window and the heads of a token lie in the registers of a TPU.

A register holds 8 rows of 128 lanes. A line of a window takes a multiple of 8 rows ("slots", 8
for a line of 7 tokens), so that it can be loaded from any place of a map without moving rows in
registers; what a slot too many holds is kept out by a bias of -1e30. Heads are treated in units:
as many as have their logits, (head, query) along lanes, side by side in 128 lanes.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

LANES = 128
NEVER = -1e30  # a bias whose exponential is 0


@dataclasses.dataclass(frozen=True)
class Layout:
    """Maps of one size, their windows and their heads.

    Attributes:
      height, width: of a map, in tokens.
      window: tokens along a window's side, or None: the map is one window, whatever its shape.
      shift: of the windows; 0 if the map is one.
      heads, dim: attention heads, and features of each.
      padding_key: one more key in the window, the padding token's (if the map is one window).
      room: bytes of a core's vector memory that a program may take.
    """

    height: int
    width: int
    window: int | None
    shift: int
    heads: int
    dim: int
    padding_key: bool = False
    room: int = 48 * 2**20

    @property
    def supported(self) -> bool:
        """Whether heads divide the lanes of a register."""
        return self.dim <= LANES and LANES % self.dim == 0

    @property
    def tokens(self) -> int:
        """Rows of a map."""
        return self.height * self.width

    @property
    def lines(self) -> int:
        """Lines of a window."""
        return self.window or self.height

    @property
    def columns(self) -> int:
        """Columns of a window."""
        return self.window or self.width

    @property
    def slots(self) -> int:
        """Rows of registers that a line of a window takes."""
        return -(-(self.columns + self.padding_key) // 8) * 8

    @property
    def rows(self) -> int:
        """Rows of registers that a window takes."""
        return self.lines * self.slots

    @property
    def windows(self) -> tuple[int, int]:
        """Windows of the padded map along its height and width."""
        return -(-self.height // self.lines), -(-self.width // self.columns)

    @property
    def padded(self) -> bool:
        """Whether padding takes part in the attention."""
        y, x = self.windows
        covered = y * self.lines, x * self.columns
        return self.padding_key or covered != (self.height, self.width)

    @property
    def features(self) -> int:
        """Of a token: heads side by side."""
        return self.heads * self.dim

    @property
    def tiles(self) -> int:
        """Registers across the features of a token."""
        return -(-self.features // LANES)

    @property
    def group(self) -> int:
        """Heads of a unit."""
        group = 1
        while 2 * group * max(self.rows, self.dim) <= LANES:
            group *= 2
        return group

    @property
    def units(self) -> int:
        """Units of all heads; the last one may lack some."""
        return -(-self.heads // self.group)

    def jobs(self) -> list[tuple[int, int]]:
        """(window column, tile) of all that one row of windows has."""
        return [(x, tile) for x in range(self.windows[1]) for tile in range(self.tiles)]

    def place(self, unit: int) -> tuple[int, int]:
        """(tile, first lane) of a unit's features."""
        return divmod(unit * self.group * self.dim, LANES)

    @property
    def lanes(self) -> int:
        """Lanes that the logits of a unit take, (head, query); those behind them are spare."""
        return -(-self.group * self.rows // LANES) * LANES

    def units_of(self, tile: int) -> list[tuple[int, int]]:
        """(unit, first lane) of the units whose features lie in a tile."""
        places = [(unit, *self.place(unit)) for unit in range(self.units)]
        return [(unit, lane) for unit, where, lane in places if where == tile]

    def segments(self, x: int, first_line: bool) -> list[tuple[int, int, int | None]]:
        """(slot, count, column of the map or None for padding) of a line of window column x."""
        places = (np.arange(self.columns) + x * self.columns + self.shift) % (
            self.windows[1] * self.columns
        )
        segments: list[tuple[int, int, int | None]] = []
        for slot, column in enumerate(places.tolist()):
            column = column if column < self.width else None
            if segments:
                start, count, first = segments[-1]
                follows = column is None if first is None else column == first + count
                if follows:
                    segments[-1] = (start, count + 1, first)
                    continue
            segments.append((slot, 1, column))
        if self.padding_key and first_line:
            segments.append((self.columns, 1, None))
        return segments

    def bias_rows(self, bias: Float[Array, "heads n k"]) -> Float[Array, "units rows lanes"]:
        """Biases where logits lie: keys along rows, (head, query) along lanes."""
        n = self.lines * self.columns
        spare = self.slots - self.columns
        x = bias[..., :n].reshape(self.heads, self.lines, self.columns, self.lines, self.columns)
        x = jnp.pad(x, ((0, 0),) * 4 + ((0, spare),), constant_values=NEVER)
        if self.padding_key:
            x = x.at[:, :, :, 0, self.columns].set(
                bias[..., n].reshape(self.heads, self.lines, self.columns)
            )
        missing = self.units * self.group - self.heads
        x = jnp.pad(x, ((0, missing), (0, 0), (0, spare), (0, 0), (0, 0)))
        x = rearrange(x, "(u g) qy qx ky kx -> u (ky kx) (g qy qx)", g=self.group)
        return jnp.pad(x, ((0, 0), (0, 0), (0, self.lanes - x.shape[-1])))

    def masks(self) -> np.ndarray:
        """f32[kinds, rows, lanes], 0 or -100, laid out like a bias: which pairs stay apart.

        Four kinds of windows: within the shifted map, at its right border, its lower one, at both.
        There, tokens from opposite borders of the map have come into one window.
        """
        assert self.window is not None
        masks = []
        for last in ((False, False), (False, True), (True, False), (True, True)):
            y, x = (
                (np.arange(self.window) >= self.window - self.shift) & border for border in last
            )
            part = (2 * y[:, None] + x[None, :]).reshape(-1)
            masks.append(np.where(part[:, None] == part[None, :], 0.0, -100.0))
        shape = (len(masks), self.lines, self.columns, self.lines, self.columns)
        spare = (0, self.slots - self.columns)
        mask = np.asarray(masks, np.float32).reshape(shape)
        mask = np.pad(mask, ((0, 0), (0, 0), spare, (0, 0), spare))
        mask = rearrange(mask, "m qy qx ky kx -> m (ky kx) (qy qx)")
        mask = np.tile(mask, (1, 1, self.group))
        return np.pad(mask, ((0, 0), (0, 0), (0, self.lanes - mask.shape[-1])))
