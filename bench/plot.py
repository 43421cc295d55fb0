"""Plots of a few curves on two logarithmic axes, as SVG that is read in light and in dark surroundings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape

__all__ = ["exponent", "number", "plot", "ticks"]

Curve = Sequence[tuple[float, float]]
"""(x, y), all above 0 but the first x, which may be 0."""

_Place = Callable[[float], float]
_WIDTH, _HEIGHT = 640, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 24, 78, 56
_COLOURS = 3
_STYLE = """
  .paper { fill: #ffffff } text { fill: #1f2328; font: 13px system-ui, sans-serif } .title { font-size: 15px; font-weight: 600 }
  .grid { stroke: #d1d9e0 }
  .c0 { stroke: #0757ba; fill: #0757ba } .c1 { stroke: #a8400b; fill: #a8400b } .c2 { stroke: #1a6e33; fill: #1a6e33 }
  .line { fill: none; stroke-width: 2 }
  @media (prefers-color-scheme: dark) {
    .paper { fill: #0d1117 } text { fill: #e6edf3 } .grid { stroke: #3d444d }
    .c0 { stroke: #79b8ff; fill: #79b8ff } .c1 { stroke: #f0a66c; fill: #f0a66c } .c2 { stroke: #85d996; fill: #85d996 }
    .line { fill: none }
  }
"""


def exponent(curve: Curve) -> float | None:
    """k of y ~ x^k, by least squares on the logarithms; points at 0 do not count. None where fewer than two are left."""
    points = [(math.log(x), math.log(y)) for x, y in curve if x > 0 and y > 0]
    if len({x for x, _ in points}) < 2:
        return None
    middle_x, middle_y = (sum(each) / len(points) for each in zip(*points, strict=True))
    slope: float = sum((x - middle_x) * (y - middle_y) for x, y in points)
    spread: float = sum((x - middle_x) * (x - middle_x) for x, _ in points)
    return slope / spread


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from about `low` to about `high`: decades, or 1, 2 and 5 of each where those are few."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1,) if len(decades) > 4 else (1, 2, 5)
    found = [step * 10.0**decade for decade in decades for step in steps]
    first = max((each for each in found if each <= low * 1.001), default=found[0])
    last = min((each for each in found if each >= high * 0.999), default=found[-1])
    return [each for each in found if first <= each <= last]


def number(value: float) -> str:
    """`1 k`, `10 M`, `0.5`."""
    for size, sign in ((1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.3g}{sign}"
    return f"{value:g}"


def plot(title: str, x_label: str, y_label: str, curves: Mapping[str, Curve]) -> str:
    """At most three curves, each with a name. A point at x = 0 stands at the left edge."""
    if len(curves) > _COLOURS:
        raise ValueError(f"{len(curves)} curves; a plot takes {_COLOURS}")
    points = [point for curve in curves.values() for point in curve]
    above = [x for x, _ in points if x > 0]
    across = ticks(min(above), max(above))
    if zero := any(x == 0 for x, _ in points):
        across = [across[0] / 10, *across]
    up = ticks(min(y for _, y in points), max(y for _, y in points))
    if len(up) < 3:  # a flat curve stands in the middle
        up = [up[0] / 2, *up, up[-1] * 2]

    def place_x(x: float) -> float:
        return _place(x or across[0], across, _LEFT, _WIDTH - _RIGHT)

    def place_y(y: float) -> float:
        return _place(y, up, _HEIGHT - _BOTTOM, _TOP)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style>",
        f'<rect class="paper" width="{_WIDTH}" height="{_HEIGHT}"/>',
        _text(_LEFT, 24, title, "start", "title"),
        _text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 12, x_label),
        f'<g transform="rotate(-90 16 {(_TOP + _HEIGHT - _BOTTOM) / 2:g})">'
        + _text(16, (_TOP + _HEIGHT - _BOTTOM) / 2, y_label)
        + "</g>",
    ]
    for each in across:
        at = place_x(each)
        parts += [
            f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>',
            _text(at, _HEIGHT - _BOTTOM + 18, "0" if zero and each == across[0] else number(each)),
        ]
    for each in up:
        at = place_y(each)
        parts += [
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>',
            _text(_LEFT - 8, at + 4, number(each), "end"),
        ]
    parts += _curves(curves, place_x, place_y)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _curves(curves: Mapping[str, Curve], place_x: _Place, place_y: _Place) -> Iterable[str]:
    start = float(_LEFT)
    for place, (name, curve) in enumerate(curves.items()):
        found = sorted(curve)
        line = " ".join(f"{place_x(x):.1f},{place_y(y):.1f}" for x, y in found)
        yield f'<polyline class="line c{place}" points="{line}"/>'
        for x, y in found:
            yield f'<circle class="c{place}" cx="{place_x(x):.1f}" cy="{place_y(y):.1f}" r="3.5"/>'
        steepness = exponent(found)
        words = name if steepness is None else f"{name} (x^{steepness:.2f})"
        yield f'<circle class="c{place}" cx="{start + 5:g}" cy="48" r="4"/>' + _text(start + 15, 52, words, "start")
        start += 34 + 7.2 * len(words)


def _place(value: float, marks: Sequence[float], first: float, last: float) -> float:
    share = math.log(value / marks[0]) / math.log(marks[-1] / marks[0])
    return first + share * (last - first)


def _text(x: float, y: float, words: str, anchor: str = "middle", kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{named}>{escape(words)}</text>'
