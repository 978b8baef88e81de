"""Resizing with antialias: what `torch.nn.functional.interpolate(mode="bilinear", antialias=True)` computes.

Each output row or column is a weighted mean of the source rows or columns under a triangle. Its half-width
is the scale where the picture shrinks, so that every source pixel counts, and one source pixel where it
grows. The triangle is cut off at the border. Rows and columns are independent: `fill_table` makes one table for each
axis.

Weights are whole numbers that add up to a power of two, so that white stays white and every sum is exact. The vertical
pass sums 8-bit levels under 16-bit weights, which a float32 holds; what it makes has 15 bits, and the horizontal pass
sums that in float64. So the order of a sum does not matter, loops may be vectorised in any way, and the result is to
the bit that of `native/resize.c`, which has the same numbers in integers. Integers here, too, took 510 us for what
these take 280 (548 x 346 to 224 x 224): numba multiplies them in 64 bits.

What makes the loops fast, and why they look as they do: a pixel is four bytes (RGBX), which fill the lanes
of a vector register; the vertical pass comes first, because it runs over contiguous rows; rows are taken as
views, `source[y]` and `range(n)`, since `source[y, x + i]` would test for negative indexes and not
vectorise; the horizontal pass indexes with unsigned numbers for the same reason; four source rows a sweep,
so that the sums are stored once for four. One output row is finished at a time, so that its sums stay in the
first-level cache.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fastload.kernels.declare import array_in, array_out, boolean, float32, float64, helper, int64, kernel, uint8, void

__all__ = ["FRACTION_BITS", "cmyk_to_rgbx", "fill_table", "resize_rgbx", "taps_max"]

SWEEP = 4
"""Source rows that the vertical pass takes at a time; a table's taps are a multiple of it."""

FRACTION_BITS = 7
"""How much finer than a level the vertical pass's results are."""

_BITS_MIN = 14  # a weight may be 1, and 2^15 would not fit 16 bits
_BITS_MAX = 16  # 255 << 16 fits the 24 bits of a float32


def taps_max(step: float) -> int:
    """How many taps a table for this step needs: a multiple of `SWEEP`."""
    taps = int(2 * max(step, 1.0)) + 1
    return -(-taps // SWEEP) * SWEEP


@kernel(int64(float64, float64, int64, int64, boolean, array_out(int64), array_out(int64), array_out(float64, 2)))
def fill_table(
    origin: float,
    step: float,
    low: int,
    high: int,
    is_mirrored: bool,
    first: npt.NDArray[np.int64],
    count: npt.NDArray[np.int64],
    weights: npt.NDArray[np.float64],
) -> int:
    """The table for one axis: output i, centred on `origin + step * (i + 0.5)`, is the sum of `weights[i, k]` times
    source `first[i] + k`, for k below `count[i]`, over 2^bits, which is returned. Sources are in [low, high).

    `first`, `count`: int64[length]; `weights`: float64[length, taps_max(step)], whole numbers, 0 from `count` on. Where
    `is_mirrored`, the last output comes first.
    """
    length, taps = weights.shape
    support = max(step, 1.0)
    bits = _BITS_MIN  # the finest weights that fit 16 bits: none is more than 8/7 of 1/step
    while bits < _BITS_MAX and step >= 2 << (bits - _BITS_MIN):
        bits += 1
    for i in range(length):
        place = length - 1 - i if is_mirrored else i
        center = origin + step * (i + 0.5)
        start = max(int(center - support + 0.5), low)
        end = min(int(center + support + 0.5), high, start + taps)
        total = 0.0
        for k in range(start, end):
            total += max(0.0, 1.0 - abs(k - center + 0.5) / support)
        # The running sum is rounded, not each weight, so that they add up to exactly 2^bits and errors do not.
        one = (1 << bits) / total
        running = 0.0
        before = 0.0
        for k in range(start, end):
            running += max(0.0, 1.0 - abs(k - center + 0.5) / support)
            after = np.floor(running * one + 0.5)
            weights[place, k - start] = after - before
            before = after
        for k in range(end - start, taps):
            weights[place, k] = 0.0
        first[place] = start
        count[place] = end - start
    return bits


@helper(
    void(array_in(uint8, 2), int64, int64, int64, array_in(float64), int64, array_out(float32), array_out(float64)),
    fastmath=True,
    error_model="numpy",
)
def _sum_rows(
    source: npt.NDArray[np.uint8],
    left: int,
    first: int,
    count: int,
    weights: npt.NDArray[np.float64],
    bits: int,
    sums: npt.NDArray[np.float32],
    row: npt.NDArray[np.float64],
) -> None:
    """`row` = the weighted mean of `count` rows from `first`, from byte `left` on, times 2^FRACTION_BITS and rounded.

    Weights beyond `count` must be 0.
    """
    last = source.shape[0] - 1
    length = len(row)
    half = np.float32(1 << (bits - FRACTION_BITS - 1))
    for start in range(0, count, SWEEP):
        # A sweep beyond the last row repeats it, with weight 0.
        row0 = source[min(first + start, last)][left : left + length]
        row1 = source[min(first + start + 1, last)][left : left + length]
        row2 = source[min(first + start + 2, last)][left : left + length]
        row3 = source[min(first + start + 3, last)][left : left + length]
        w0 = np.float32(weights[start])
        w1 = np.float32(weights[start + 1])
        w2 = np.float32(weights[start + 2])
        w3 = np.float32(weights[start + 3])
        if start == 0:
            for i in range(length):
                sums[i] = half + (w0 * row0[i] + w1 * row1[i] + w2 * row2[i] + w3 * row3[i])
        else:
            for i in range(length):
                sums[i] += w0 * row0[i] + w1 * row1[i] + w2 * row2[i] + w3 * row3[i]
    scale = np.float32(1 / (1 << (bits - FRACTION_BITS)))
    for i in range(length):
        row[i] = np.floor(sums[i] * scale)


@helper(
    void(array_in(float64), int64, array_in(int64), array_in(int64), array_in(float64, 2), array_out(float64, 2)),
    fastmath=True,
    error_model="numpy",
)
def _sum_columns(
    row: npt.NDArray[np.float64],
    left: int,
    first: npt.NDArray[np.int64],
    count: npt.NDArray[np.int64],
    weights: npt.NDArray[np.float64],
    sums: npt.NDArray[np.float64],
) -> None:
    """`sums` (3, columns) = the weighted sums of the pixels of `row`, the first of which is number `left`."""
    for x in range(len(first)):
        at = np.uintp(4 * (first[x] - left))
        red = green = blue = 0.0
        # Four taps at a time into a row of RGBX, and from there to planes, took 280 us a picture where this
        # takes 166 (500 x 375 to 224 x 224; the vertical pass takes 60).
        for k in range(np.uintp(count[x])):
            weight = weights[x, k]
            red += weight * row[at]
            green += weight * row[at + np.uintp(1)]
            blue += weight * row[at + np.uintp(2)]
            at += np.uintp(4)
        sums[0, x] = red
        sums[1, x] = green
        sums[2, x] = blue


@kernel(
    void(
        array_in(uint8, 2),
        array_in(int64),
        array_in(int64),
        array_in(float64, 2),
        int64,
        array_in(int64),
        array_in(int64),
        array_in(float64, 2),
        int64,
        array_in(float32),
        array_in(float32),
        array_out(float32),
        array_out(float64),
        array_out(float64, 2),
        array_out(float32, 3),
    ),
    error_model="numpy",
)
def resize_rgbx(
    source: npt.NDArray[np.uint8],
    row_first: npt.NDArray[np.int64],
    row_count: npt.NDArray[np.int64],
    row_weights: npt.NDArray[np.float64],
    row_bits: int,
    column_first: npt.NDArray[np.int64],
    column_count: npt.NDArray[np.int64],
    column_weights: npt.NDArray[np.float64],
    column_bits: int,
    factor: npt.NDArray[np.float32],
    offset: npt.NDArray[np.float32],
    row_sums: npt.NDArray[np.float32],
    row: npt.NDArray[np.float64],
    column_sums: npt.NDArray[np.float64],
    out: npt.NDArray[np.float32],
) -> None:
    """Resize `source` (height, 4 * width; RGBX) into `out` (3, rows, columns), by tables from `fill_table`.

    A value is its level times `factor` plus `offset`, of its channel. Scratch: `row_sums` and `row` [at least
    4 * width], `column_sums` (3, columns).
    """
    rows, columns = out.shape[1:]
    left = min(column_first[0], column_first[-1])
    right = max(column_first[0] + column_count[0], column_first[-1] + column_count[-1])
    length = 4 * (right - left)
    point = np.float32(1 / (1 << (column_bits + FRACTION_BITS)))
    for y in range(rows):
        _sum_rows(
            source, 4 * left, row_first[y], row_count[y], row_weights[y], row_bits, row_sums[:length], row[:length]
        )
        _sum_columns(row[:length], left, column_first, column_count, column_weights, column_sums)
        for lane in range(3):
            level = factor[lane] * point
            base = offset[lane]
            sums = column_sums[lane]
            to = out[lane, y]
            for x in range(columns):
                to[x] = np.float32(sums[x]) * level + base


@kernel(void(array_out(uint8)))
def cmyk_to_rgbx(pixels: npt.NDArray[np.uint8]) -> None:
    """Turn CMYK pixels (4 bytes each) into RGBX in place. 255 means no ink, as in JPEG files of Adobe's.

    The marker that would say otherwise is not looked at; Pillow and torchvision do not, either.
    """
    for at in range(0, len(pixels), 4):
        light = np.int64(pixels[at + 3])
        for lane in range(3):
            pixels[at + lane] = (np.int64(pixels[at + lane]) * light + 127) // 255
