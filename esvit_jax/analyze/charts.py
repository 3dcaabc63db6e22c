"""Curves as SVG, for a page: their colours are the page's, in light and in dark.

matplotlib's SVG has its text as paths and its colours fixed; such a chart is a tenth of its size.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape, quoteattr

from esvit_jax.analyze.figures import Curve

# In units of the picture, which are pixels on a phone.
WIDTH, HEIGHT = 380, 210
LEFT, RIGHT, TOP, BOTTOM = 48, 10, 10, 24
# Points of a curve; one that has more is drawn with the highest and the lowest of each stretch.
MAX_POINTS = 300
# Colours and dashes of curves; the page's style sheet knows them by number.
STYLES = 4


class Chart(NamedTuple):
    """Curves over one axis of steps.

    Attributes:
      title: what is drawn, with its unit.
      about: what to look for.
      curves: by name, no more than `STYLES` of them.
      levels: horizontal lines to compare with, by name.
    """

    title: str
    about: str
    curves: Mapping[str, Curve]
    levels: Mapping[str, float] = {}

    @property
    def words(self) -> str:
        """What the curves come to, for those who do not see them."""
        return "; ".join(map(in_words, self.curves, self.curves.values()))

    @property
    def last(self) -> dict[str, str]:
        """The newest number of each curve, ready to be read."""
        return {name: _short(_finite(curve)[-1][1]) for name, curve in self.curves.items()}

    @property
    def level_values(self) -> dict[str, str]:
        """The numbers of the levels, ready to be read."""
        return {name: _short(value) for name, value in self.levels.items()}

    @property
    def svg(self) -> str:
        """The picture."""
        return svg(self)


def in_words(name: str, curve: Curve) -> str:
    """Where a curve begins and ends, and how low and high it goes between.

    >>> in_words("loss", Curve([50, 100, 150], [2.5, 4.0, 3.0]))
    'loss: 2.5 at step 50, 3 at step 150; lowest 2.5, highest 4'
    """
    points = _finite(curve)
    (first, a), (last, b) = points[0], points[-1]
    if len(points) == 1:
        return f"{name}: {_short(a)} at step {first:,}"
    values = [value for _, value in points]
    return (
        f"{name}: {_short(a)} at step {first:,}, {_short(b)} at step {last:,}; "
        f"lowest {_short(min(values))}, highest {_short(max(values))}"
    )


def _finite(curve: Curve) -> list[tuple[int, float]]:
    return [(x, y) for x, y in zip(*curve, strict=True) if math.isfinite(y)]


def has_points(curve: Curve) -> bool:
    """Whether there is a number to draw."""
    return bool(_finite(curve))


def thinned(curve: Curve, most: int = MAX_POINTS) -> Curve:
    """A curve of no more points, in which no peak and no gap is lost.

    >>> thinned(Curve([1, 2, 3, 4, 5, 6], [0.0, 9.0, 1.0, 2.0, -5.0, 3.0]), most=4)
    Curve(steps=[1, 2, 5, 6], values=[0.0, 9.0, -5.0, 3.0])
    """
    count = len(curve.steps)
    if count <= most:
        return curve
    stretches = max(1, most // 2)
    kept: set[int] = set()
    for part in range(stretches):
        places = range(part * count // stretches, (part + 1) * count // stretches)
        finite = [i for i in places if math.isfinite(curve.values[i])]
        if len(finite) < len(places):  # a gap is seen by one point that is none
            kept.add(next(i for i in places if not math.isfinite(curve.values[i])))
        if finite:
            kept |= {f(finite, key=lambda i: curve.values[i]) for f in (min, max)}
    order = sorted(kept)
    return Curve([curve.steps[i] for i in order], [curve.values[i] for i in order])


def svg(chart: Chart) -> str:
    """One chart, with axes; its text is drawn as text."""
    curves = {name: thinned(curve) for name, curve in chart.curves.items()}
    points = [point for curve in curves.values() for point in _finite(curve)]
    steps, values = [x for x, _ in points], [y for _, y in points] + list(chart.levels.values())
    x_range = _widened(float(min(steps)), float(max(steps)))
    y_ticks = _ticks(*_widened(min(values), max(values)), count=4)
    y_range = (min(y_ticks[0], min(values)), max(y_ticks[-1], max(values)))

    def x_of(step: int | float) -> float:
        share = (step - x_range[0]) / (x_range[1] - x_range[0])
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y_of(value: float) -> float:
        share = (value - y_range[0]) / (y_range[1] - y_range[0])
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f"aria-label={quoteattr(f'{chart.title}. {chart.words}')}>"
    ]
    for tick in y_ticks:
        y = y_of(tick)
        parts.append(f'<path class="grid" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" class="left">{_short(tick)}</text>')
    x_ticks = [x for x in _ticks(*x_range, count=5, whole=True) if x_range[0] <= x <= x_range[1]]
    for tick in x_ticks:
        anchor = "end" if x_of(tick) > WIDTH - 30 else "middle"
        parts.append(
            f'<text x="{x_of(tick)}" y="{HEIGHT - 6}" text-anchor="{anchor}">{_step(tick)}</text>'
        )
    for i, value in enumerate(chart.levels.values()):
        parts.append(f'<path class="level l{i % 3}" d="M{LEFT} {y_of(value)}H{WIDTH - RIGHT}"/>')
    for i, curve in enumerate(curves.values()):
        parts.append(f'<path class="curve c{i % STYLES}" d="{_path(curve, x_of, y_of)}"/>')
        if len(curve.steps) <= 30:
            parts += [
                f'<circle class="dot c{i % STYLES}" cx="{x_of(x)}" cy="{y_of(y)}" r="2.5">'
                f"<title>{escape(f'step {x:,}: {_short(y)}')}</title></circle>"
                for x, y in _finite(curve)
            ]
    return "".join([*parts, "</svg>"])


def _path(
    curve: Curve, x_of: Callable[[int | float], float], y_of: Callable[[float], float]
) -> str:
    """The commands of a path; a number that is not finite breaks it."""
    words, down = [], False
    for step, value in zip(*curve, strict=True):
        if not math.isfinite(value):
            down = False
            continue
        words.append(f"{'L' if down else 'M'}{x_of(step):g} {y_of(value):g}")
        down = True
    return "".join(words)


def _widened(low: float, high: float) -> tuple[float, float]:
    """A range in which a line that is level has a place."""
    if high - low > 1e-6 * max(abs(low), abs(high)):
        return low, high
    reach = abs(low) / 10 or 1.0
    return low - reach, high + reach


def _ticks(low: float, high: float, count: int, whole: bool = False) -> Sequence[float]:
    """Round numbers that span a range."""
    from matplotlib.ticker import MaxNLocator

    locator = MaxNLocator(count, steps=[1, 2, 5, 10], integer=whole)
    return [float(tick) for tick in locator.tick_values(low, high)]


def _short(value: float) -> str:
    """Three digits are what one reads off a curve."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _step(step: float) -> str:
    """50000 as 50k: there is little room below a chart on a phone."""
    return f"{step / 1000:g}k" if step >= 10_000 else f"{step:g}"
