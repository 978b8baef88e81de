"""What part of a picture is wanted, and how it lies in the output: random choices, crops, EXIF orientation.

Pure arithmetic. `native/view.c` does the same in the same order, to the bit, so that a crop does not depend on which of
the two was at work, nor on the machine's libm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Cropping", "PictureView", "Span", "choose_view", "is_flipped"]

_MASK = (1 << 64) - 1
_ATTEMPTS = 10


@dataclass(frozen=True, slots=True)
class Cropping:
    """What the user asked for, as far as it is about geometry. At most one of `random_crop` and `resize` is set.

    `random_crop`: (scale, ratio) of a random resized crop; `resize`: the shorter side before the middle is taken;
    neither: the whole picture, whatever its shape. `flip`: how likely it is mirrored. `size`: of the output, a square's
    side or height and width.
    """

    size: int | tuple[int, int]
    random_crop: tuple[tuple[float, float], tuple[float, float]] | None = None
    resize: int | None = None
    flip: float = 0.0
    dct_scaling: bool = False

    @property
    def output(self) -> tuple[int, int]:
        """Height and width of the output."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    @property
    def is_random(self) -> bool:
        """Whether the view depends on the key."""
        return self.random_crop is not None or 0 < self.flip < 1

    @property
    def log_ratio(self) -> tuple[float, float]:
        """The logarithms of the bounds of a random crop's shape. Taken once, since libm's may differ."""
        low, high = self.random_crop[1] if self.random_crop is not None else (1.0, 1.0)
        return math.log(low), math.log(high)


@dataclass(frozen=True, slots=True)
class Span:
    """One axis of the file's picture: output i is centred on `origin + step * (i + 0.5)`, from pixels in [low, high).

    `is_mirrored`: output 0 is the last one of this axis.
    """

    origin: float
    step: float
    low: int
    high: int
    is_mirrored: bool = False


@dataclass(frozen=True, slots=True)
class PictureView:
    """Spans of a picture decoded at 1/`denominator`, in pixels of that. `is_transposed`: rows of it become columns."""

    rows: Span
    columns: Span
    is_transposed: bool
    denominator: int


def choose_view(
    wanted: Cropping, key: int, width: int, height: int, orientation: int = 1, *, whole: bool = False
) -> PictureView:
    """The view of a picture of `width` x `height` pixels (as they are in the file) with this EXIF orientation.

    `whole`: it is decoded already, so that it cannot be decoded smaller.
    """
    is_transposed = orientation >= 5
    across, down = (height, width) if is_transposed else (width, height)  # as it is seen
    y_size, x_size = wanted.output
    if wanted.random_crop is not None:
        left, top, box_width, box_height = _random_box(wanted, key, across, down)
        x, y = _stretched(left, box_width, x_size), _stretched(top, box_height, y_size)
    elif wanted.resize is not None:
        shorter = min(across, down)
        x = _centered(across, wanted.resize * across // shorter, x_size)
        y = _centered(down, wanted.resize * down // shorter, y_size)
    else:
        x, y = _stretched(0, across, x_size), _stretched(0, down, y_size)
    if is_flipped(wanted, key):
        x = _turned(x, is_mirrored=True)
    rows, columns = (x, y) if is_transposed else (y, x)
    row_size, column_size = (x_size, y_size) if is_transposed else (y_size, x_size)
    if orientation in (2, 3, 7, 8):
        columns = _reversed(columns, width, column_size)
    if orientation in (3, 4, 6, 7):
        rows = _reversed(rows, height, row_size)
    denominator = 1 if whole else _denominator(wanted, min(rows.step, columns.step), width, height)
    return PictureView(_scaled(rows, denominator), _scaled(columns, denominator), is_transposed, denominator)


def is_flipped(wanted: Cropping, key: int) -> bool:
    """Whether the picture with this key is mirrored."""
    return wanted.flip > 0 and _draw(key, 0) < wanted.flip


def _random_box(wanted: Cropping, key: int, width: int, height: int) -> tuple[int, int, int, int]:
    """Left, top, width and height as torchvision's RandomResizedCrop draws them: ten tries at a crop of random area and
    shape; then the largest centred one whose shape is allowed. Word 0 of the key is for the flip.
    """
    assert wanted.random_crop is not None
    (area_min, area_max), (log_ratio_min, log_ratio_max) = wanted.random_crop[0], wanted.log_ratio
    area = float(width) * height
    for first in range(1, 4 * _ATTEMPTS, 4):
        wanted_area = area * (area_min + (area_max - area_min) * _draw(key, first))
        ratio = _exp(log_ratio_min + (log_ratio_max - log_ratio_min) * _draw(key, first + 1))
        across, down = math.sqrt(wanted_area * ratio), math.sqrt(wanted_area / ratio)
        if across >= width + 0.5 or down >= height + 0.5:
            continue
        box_width, box_height = int(across + 0.5), int(down + 0.5)
        if box_width < 1 or box_height < 1:
            continue
        left = int(_draw(key, first + 2) * (width - box_width + 1))
        top = int(_draw(key, first + 3) * (height - box_height + 1))
        return left, top, box_width, box_height
    ratio, ratio_min, ratio_max = width / height, _exp(log_ratio_min), _exp(log_ratio_max)
    box_width, box_height = width, height
    if ratio < ratio_min:
        box_height = int(min(max(width / ratio_min, 1.0), height) + 0.5)
    elif ratio > ratio_max:
        box_width = int(min(max(height * ratio_max, 1.0), width) + 0.5)
    return (width - box_width) // 2, (height - box_height) // 2, box_width, box_height


def _stretched(start: int, length: int, size: int) -> Span:
    return Span(start, length / size, start, start + length)


def _centered(length: int, resized: int, size: int) -> Span:
    """The middle `size` of `length` pixels that are resized to `resized`."""
    step = length / resized
    first = round((resized - size) / 2)  # halves to the even neighbour, as in torchvision
    return Span(step * first, step, 0, length)


def _reversed(span: Span, length: int, size: int) -> Span:
    """The span counted from the other end of the axis."""
    origin = length - span.origin - span.step * size
    return Span(origin, span.step, length - span.high, length - span.low, not span.is_mirrored)


def _turned(span: Span, *, is_mirrored: bool) -> Span:
    return Span(span.origin, span.step, span.low, span.high, is_mirrored)


def _scaled(span: Span, denominator: int) -> Span:
    """The span in a picture decoded at 1/denominator. A pixel there that lies partly in the span counts."""
    low, high = span.low // denominator, -(-span.high // denominator)
    return Span(span.origin / denominator, span.step / denominator, low, high, span.is_mirrored)


def _denominator(wanted: Cropping, step: float, width: int, height: int) -> int:
    """The smallest of the sizes that libjpeg decodes fast and from which the picture still has to shrink."""
    # So small, another scale could give the same size, which is all that simplejpeg can be asked for.
    if not wanted.dct_scaling or (width < 8 and height < 8):
        return 1
    return 8 if step >= 8 else 4 if step >= 4 else 2 if step >= 2 else 1


def _draw(key: int, place: int) -> float:
    """Uniform in [0, 1), 53 bits: word `place` of splitmix64 from the seed `key`."""
    word = (key + place * 0x9E3779B97F4A7C15) & _MASK
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK
    return ((word ^ (word >> 31)) >> 11) * 2.0**-53


def _exp(x: float) -> float:
    """exp, to 13 digits for abs(x) < 10. libm's differ in the last bit from machine to machine, which would now and
    then move a crop by a pixel.
    """
    t = x / 1024
    result = 1 + t * (1 + t / 2 * (1 + t / 3 * (1 + t / 4 * (1 + t / 5))))
    for _ in range(10):
        result *= result
    return result
