"""A plot of a sweep, as SVG written by hand: what was hit, and what of the time was spent waiting, over cache size.

It stays because `fastload simulate --plot` is documented, and the page about it shows one; a plotting library would be
a heavier dependency than these lines.

Both figures are shares, so they have one axis, and the reader compares them at the same place. Colours are told apart
by lightness too, lines are named at the right, and the background is white, for pages of any colour.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

_WIDTH, _HEIGHT = 760, 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 72, _WIDTH - 150, 64, _HEIGHT - 66  # of the area that lines are drawn in
_FONT = "font-family='Helvetica, Arial, DejaVu Sans, sans-serif'"
_UNITS = (("TiB", 2.0**40), ("GiB", 2.0**30), ("MiB", 2.0**20), ("B", 1.0))  # as in `format_bytes`


class Curve(NamedTuple):
    """One figure over cache size: shares between 0 and 1."""

    name: str
    colour: str
    values: Sequence[float]


def sweep_svg(title: str, subtitle: str, cache_bytes: Sequence[int], lines: Sequence[Curve]) -> str:
    """The plot of some lines, each with a value for every cache size (which rise)."""
    unit, unit_bytes = next((name, size) for name, size in _UNITS if max(cache_bytes) >= size or size == 1.0)
    sizes = [size / unit_bytes for size in cache_bytes]
    ticks = _ticks(max(sizes) or 1.0)
    end = max(ticks[-1], *sizes)
    xs = [_x(size, end) for size in sizes]
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {_WIDTH} {_HEIGHT}' width='{_WIDTH}' "
        f"height='{_HEIGHT}' role='img'>",
        f"<title>{escape(title)}</title>",
        f"<rect width='{_WIDTH}' height='{_HEIGHT}' fill='white'/>",
        _text(_LEFT, 26, title, size=17, weight=600),
        _text(_LEFT, 46, subtitle, size=12, colour="#555"),
    ]
    for percent in range(0, 101, 20):
        y = _y(percent / 100)
        parts.append(f"<path d='M{_LEFT} {y:.1f}H{_RIGHT}' stroke='{'#ddd' if percent else '#888'}'/>")
        parts.append(_text(_LEFT - 10, y + 4, f"{percent}", anchor="end"))
    for tick in ticks:
        x = _x(tick, end)
        parts.append(f"<path d='M{x:.1f} {_BOTTOM}v5' stroke='#888'/>")
        parts.append(_text(x, _BOTTOM + 21, f"{tick:g}", anchor="middle"))
    parts.append(_text((_LEFT + _RIGHT) / 2, _HEIGHT - 16, f"disk cache of a node, {unit}", anchor="middle"))
    parts.append(_text(18, (_TOP + _BOTTOM) / 2, "share, %", anchor="middle", turned=True))
    for line in lines:
        points = [f"{x:.1f} {_y(value):.1f}" for x, value in zip(xs, line.values, strict=True)]
        parts.append(f"<path d='M{'L'.join(points)}' fill='none' stroke='{line.colour}' stroke-width='2.5'/>")
        for x, value in zip(xs, line.values, strict=True):
            parts.append(f"<circle cx='{x:.1f}' cy='{_y(value):.1f}' r='4' fill='{line.colour}'/>")
    # Names stand at the right, as high as their lines end, from the lowest up, apart from each other.
    below = math.inf
    for line in sorted(lines, key=lambda line: -_y(line.values[-1])):
        below = min(_y(line.values[-1]), below - 17)
        parts.append(_text(_RIGHT + 12, below + 4, line.name, colour=line.colour, weight=600))
    return "\n".join([*parts, "</svg>", ""])


def _x(size: float, end: float) -> float:
    return _LEFT + (_RIGHT - _LEFT) * size / end


def _y(share: float) -> float:
    return _BOTTOM - (_BOTTOM - _TOP) * min(1.0, max(0.0, share))


def _ticks(end: float) -> list[float]:
    """From 0 up to `end`, or a little beyond: round numbers, five to ten of them."""
    rough = end / 8
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
    return f"<text x='{x:.1f}' y='{y:.1f}' {style}{turn}>{escape(text)}</text>"
