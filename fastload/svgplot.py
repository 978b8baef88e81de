"""A plot of some lines, as SVG written by hand: what `fastload simulate --plot` and reports of `fastload bench` show.

A plotting library would be a heavier dependency than these lines. Colours are told apart by lightness too, lines are
named at the right, and the background is white, for pages of any colour. All text is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

COLOURS = ("#1b6ca8", "#d1495b", "#3c7d3e", "#7a4fa3", "#a86b00")
_WIDTH, _HEIGHT = 760, 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 72, _WIDTH - 150, 64, _HEIGHT - 66  # of the area that lines are drawn in
_FONT = "font-family='Helvetica, Arial, DejaVu Sans, sans-serif'"


class Curve(NamedTuple):
    """One figure over the axis: as many values as there are places on it."""

    name: str
    colour: str
    values: Sequence[float]


class Axis(NamedTuple):
    """What an axis shows, and up to where at least it goes; 0: as far as the values do."""

    label: str
    end: float = 0.0
    scale: float = 1.0  # what is written at a mark is its value times this


def line_plot(title: str, subtitle: str, xs: Sequence[float], lines: Sequence[Curve], x: Axis, y: Axis) -> str:
    """The lines over `xs`, which rise; at least one of each."""
    x_ticks = _ticks(max(*xs, x.end) or 1.0)
    y_ticks = _ticks(max(y.end, *(value for line in lines for value in line.values)) or 1.0, 6)
    x_end, y_end = max(x_ticks[-1], *xs), y_ticks[-1]
    if y.end and y_end > y.end:  # an axis that ends somewhere, such as a share
        y_ticks, y_end = [tick for tick in y_ticks if tick <= y.end], y.end

    def along(value: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * value / x_end

    def up(value: float) -> float:
        return _BOTTOM - (_BOTTOM - _TOP) * min(1.0, max(0.0, value / y_end))

    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {_WIDTH} {_HEIGHT}' width='{_WIDTH}' "
        f"height='{_HEIGHT}' role='img'>",
        f"<title>{_escaped(title)}</title>",
        f"<rect width='{_WIDTH}' height='{_HEIGHT}' fill='white'/>",
        _text(_LEFT, 26, title, size=17, weight=600),
        _text(_LEFT, 46, subtitle, size=12, colour="#555"),
    ]
    for tick in y_ticks:
        parts.append(f"<path d='M{_LEFT} {up(tick):.1f}H{_RIGHT}' stroke='{'#ddd' if tick else '#888'}'/>")
        parts.append(_text(_LEFT - 10, up(tick) + 4, f"{tick * y.scale:.6g}", anchor="end"))
    for tick in x_ticks:
        parts.append(f"<path d='M{along(tick):.1f} {_BOTTOM}v5' stroke='#888'/>")
        parts.append(_text(along(tick), _BOTTOM + 21, f"{tick * x.scale:.6g}", anchor="middle"))
    parts.append(_text((_LEFT + _RIGHT) / 2, _HEIGHT - 16, x.label, anchor="middle"))
    parts.append(_text(18, (_TOP + _BOTTOM) / 2, y.label, anchor="middle", turned=True))
    for line in lines:
        points = [f"{along(at):.1f} {up(value):.1f}" for at, value in zip(xs, line.values, strict=True)]
        parts.append(f"<path d='M{'L'.join(points)}' fill='none' stroke='{line.colour}' stroke-width='2.5'/>")
        for at, value in zip(xs, line.values, strict=True):
            parts.append(f"<circle cx='{along(at):.1f}' cy='{up(value):.1f}' r='4' fill='{line.colour}'/>")
    # Names stand at the right, as high as their lines end, from the lowest up, apart from each other.
    below = math.inf
    for line in sorted(lines, key=lambda line: -up(line.values[-1])):
        below = min(up(line.values[-1]), below - 17)
        parts.append(_text(_RIGHT + 12, below + 4, line.name, colour=line.colour, weight=600))
    return "\n".join([*parts, "</svg>", ""])


def _ticks(end: float, count: int = 8) -> list[float]:
    """From 0 up to `end`, or a little beyond: round numbers, some five to ten of them."""
    rough = end / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    return [step * number for number in range(math.ceil(end / step - 1e-9) + 1)]


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
    return f"<text x='{x:.1f}' y='{y:.1f}' {style}{turn}>{_escaped(text)}</text>"


def _escaped(text: str) -> str:
    """XML has no place for control characters, and marks that turn the direction of writing would turn the plot's."""
    return escape("".join(letter if letter.isprintable() else "\ufffd" for letter in text))
