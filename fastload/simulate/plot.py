"""A plot of a sweep, as SVG written by hand: what was hit, and what of the time was spent waiting, over cache size.

Both are shares, so they have one axis, and the reader compares them at the same place. Colours are told apart by
lightness too, lines are named at the right, and the background is white, for pages of any colour.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

_WIDTH, _HEIGHT = 760, 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 72, 150, 64, 66
_FONT = "font-family='Helvetica, Arial, DejaVu Sans, sans-serif'"
_UNITS = (("TiB", 2.0**40), ("GiB", 2.0**30), ("MiB", 2.0**20), ("B", 1.0))  # as in `format_bytes`


@dataclass(frozen=True, slots=True)
class Line:
    """One figure over cache size: shares between 0 and 1."""

    name: str
    colour: str
    values: Sequence[float]


def sweep_svg(title: str, subtitle: str, cache_bytes: Sequence[int], lines: Sequence[Line]) -> str:
    """The plot of some lines, each with a value for every cache size (which rise)."""
    unit, unit_bytes = next((name, size) for name, size in _UNITS if max(cache_bytes) >= size or size == 1.0)
    xs = [size / unit_bytes for size in cache_bytes]
    x_ticks = _ticks(max(xs) or 1.0)
    x_end = max(x_ticks[-1], max(xs))
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {_WIDTH} {_HEIGHT}' width='{_WIDTH}' "
        f"height='{_HEIGHT}' role='img'>",
        f"<title>{escape(title)}</title>",
        f"<rect width='{_WIDTH}' height='{_HEIGHT}' fill='white'/>",
        _text(_LEFT, 26, title, size=17, weight=600),
        _text(_LEFT, 46, subtitle, size=12, colour="#555"),
        *_grid(x_ticks, x_end),
        _text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 16, f"disk cache of a node, {unit}", anchor="middle"),
        _text(18, (_TOP + _HEIGHT - _BOTTOM) / 2, "share, %", anchor="middle", turned=True),
    ]
    ends: list[tuple[float, Line]] = []
    for line in lines:
        points = [(_x(x, x_end), _y(value)) for x, value in zip(xs, line.values, strict=True)]
        parts += _drawn(points, line)
        ends.append((points[-1][1], line))
    parts += _names(ends, _x(x_end, x_end) + 12)
    return "\n".join([*parts, "</svg>", ""])


def _x(value: float, end: float) -> float:
    return _LEFT + (_WIDTH - _LEFT - _RIGHT) * value / end


def _y(share: float) -> float:
    return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * min(1.0, max(0.0, share))


def _ticks(end: float) -> list[float]:
    """From 0 up to `end`, or a little beyond: round numbers, five to ten of them."""
    rough = end / 8
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    return [step * number for number in range(math.ceil(end / step - 1e-9) + 1)]


def _grid(x_ticks: Sequence[float], x_end: float) -> list[str]:
    parts = []
    for percent in range(0, 101, 20):
        y = _y(percent / 100)
        colour = "#888" if percent == 0 else "#ddd"
        parts.append(f"<path d='M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}' stroke='{colour}'/>")
        parts.append(_text(_LEFT - 10, y + 4, f"{percent}", anchor="end"))
    bottom = _HEIGHT - _BOTTOM
    for tick in x_ticks:
        x = _x(tick, x_end)
        parts.append(f"<path d='M{x:.1f} {bottom}v5' stroke='#888'/>")
        parts.append(_text(x, bottom + 21, f"{tick:g}", anchor="middle"))
    return parts


def _drawn(points: Sequence[tuple[float, float]], line: Line) -> list[str]:
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    dots = [f"<circle cx='{x:.1f}' cy='{y:.1f}' r='4' fill='{line.colour}'/>" for x, y in points]
    return [f"<path d='M{path}' fill='none' stroke='{line.colour}' stroke-width='2.5'/>", *dots]


def _names(ends: Sequence[tuple[float, Line]], x: float) -> list[str]:
    """Each line's name at the right, as high as its end, from the lowest up, apart from each other."""
    parts, below = [], math.inf
    for y, line in sorted(ends, key=lambda end: -end[0]):
        below = min(y, below - 17)
        parts.append(_text(x, below + 4, line.name, colour=line.colour, weight=600))
    return parts


def _text(
    x: float,
    y: float,
    text: str,
    *,
    size: int = 13,
    anchor: str = "start",
    colour: str = "#222",
    weight: int = 400,
    turned: bool = False,
) -> str:
    turn = f" transform='rotate(-90 {x:.1f} {y:.1f})'" if turned else ""
    style = f"{_FONT} font-size='{size}' font-weight='{weight}' fill='{colour}' text-anchor='{anchor}'"
    return f"<text x='{x:.1f}' y='{y:.1f}' {style}{turn}>{escape(text)}</text>"
