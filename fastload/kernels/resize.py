"""Resizing with antialias: what `torch.nn.functional.interpolate(mode="bilinear", antialias=True)` computes.

Each output row or column is a weighted mean of the source rows or columns under a triangle. Its half-width
is the scale where the picture shrinks, so that every source pixel counts, and one source pixel where it
grows. The triangle is cut off at the border and the weights add up to one. Rows and columns are independent:
`triangle` makes one table for each axis.

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
from numba import float32, float64, int64, uint8, void

from fastload.kernels.jit import array_in, array_out, kernel

__all__ = ["cmyk_to_rgbx", "resize_rgbx", "taps_max", "triangle"]

SWEEP = 4
"""Source rows that the vertical pass takes at a time; a table's taps are a multiple of it."""


def taps_max(source_length: int, length: int) -> int:
    """How many taps a table for this axis needs: a multiple of `SWEEP`."""
    support = max(source_length / length, 1.0)
    taps = 2 * int(np.ceil(support)) + 1
    return -(-taps // SWEEP) * SWEEP


@kernel(void(int64, float64, array_out(int64), array_out(int64), array_out(float32, 2)))
def triangle(
    source_length: int,
    level: float,
    first: npt.NDArray[np.int64],
    count: npt.NDArray[np.int64],
    weights: npt.NDArray[np.float32],
) -> None:
    """The table for one axis: output i is the sum of `weights[i, k]` times source `first[i] + k`, for k
    below `count[i]`.

    `first`, `count`: int64[length]; `weights`: float32[length, taps_max(source_length, length)], 0 from
    `count` on; those of an output add up to `level`.
    """
    length = len(first)
    scale = source_length / length
    support = max(scale, 1.0)
    for i in range(length):
        center = scale * (i + 0.5)
        low = max(int(center - support + 0.5), 0)
        high = min(int(center + support + 0.5), source_length)
        total = 0.0
        for k in range(high - low):
            total += max(0.0, 1.0 - abs(low + k - center + 0.5) / support)
        for k in range(weights.shape[1]):
            weight = max(0.0, 1.0 - abs(low + k - center + 0.5) / support)
            weights[i, k] = weight * level / total if k < high - low else 0.0
        first[i] = low
        count[i] = high - low


@kernel(
    void(array_in(uint8, 2), int64, int64, array_in(float32), array_out(float32)),
    fastmath=True,
    error_model="numpy",
)
def _sum_rows(
    source: npt.NDArray[np.uint8],
    first: int,
    count: int,
    weights: npt.NDArray[np.float32],
    sums: npt.NDArray[np.float32],
) -> None:
    """`sums` = the weighted sum of `count` rows from `first`; weights beyond `count` must be 0."""
    last = source.shape[0] - 1
    length = len(sums)
    for start in range(0, count, SWEEP):
        # A sweep beyond the last row repeats it, with weight 0.
        row0 = source[min(first + start, last)]
        row1 = source[min(first + start + 1, last)]
        row2 = source[min(first + start + 2, last)]
        row3 = source[min(first + start + 3, last)]
        w0 = weights[start]
        w1 = weights[start + 1]
        w2 = weights[start + 2]
        w3 = weights[start + 3]
        if start == 0:
            for i in range(length):
                sums[i] = w0 * row0[i] + w1 * row1[i] + w2 * row2[i] + w3 * row3[i]
        else:
            for i in range(length):
                sums[i] += w0 * row0[i] + w1 * row1[i] + w2 * row2[i] + w3 * row3[i]


@kernel(
    void(
        array_in(uint8, 2),
        array_in(int64),
        array_in(int64),
        array_in(float32, 2),
        array_in(int64),
        array_in(int64),
        array_in(float32, 2),
        array_out(float32),
        array_out(float32, 3),
    ),
    fastmath=True,
    error_model="numpy",
)
def resize_rgbx(
    source: npt.NDArray[np.uint8],
    row_first: npt.NDArray[np.int64],
    row_count: npt.NDArray[np.int64],
    row_weights: npt.NDArray[np.float32],
    column_first: npt.NDArray[np.int64],
    column_count: npt.NDArray[np.int64],
    column_weights: npt.NDArray[np.float32],
    sums: npt.NDArray[np.float32],
    out: npt.NDArray[np.float32],
) -> None:
    """Resize `source` (height, 4 * width; RGBX) into `out` (3, rows, columns), by tables from `triangle`.

    The values are those of the source times the levels of both tables, cut off at 1. `sums`: float32[4 *
    width], scratch.
    """
    for y in range(out.shape[1]):
        _sum_rows(source, row_first[y], row_count[y], row_weights[y], sums)
        for x in range(out.shape[2]):
            at = np.uintp(4 * column_first[x])
            red = np.float32(0)
            green = np.float32(0)
            blue = np.float32(0)
            # Four taps at a time into a row of RGBX, and from there to planes, took 280 us a picture where this
            # takes 166 (500 x 375 to 224 x 224; the vertical pass takes 60).
            for k in range(np.uintp(column_count[x])):
                weight = column_weights[x, k]
                red += weight * sums[at]
                green += weight * sums[at + np.uintp(1)]
                blue += weight * sums[at + np.uintp(2)]
                at += np.uintp(4)
            # Rounding can end a hair above white.
            out[0, y, x] = min(red, np.float32(1))
            out[1, y, x] = min(green, np.float32(1))
            out[2, y, x] = min(blue, np.float32(1))


@kernel(void(array_out(uint8)))
def cmyk_to_rgbx(pixels: npt.NDArray[np.uint8]) -> None:
    """Turn CMYK pixels (4 bytes each) into RGBX in place. 255 means no ink, as in JPEG files of Adobe's.

    The marker that would say otherwise is not looked at; Pillow and torchvision do not, either.
    """
    for at in range(0, len(pixels), 4):
        light = np.int64(pixels[at + 3])
        for lane in range(3):
            pixels[at + lane] = (np.int64(pixels[at + lane]) * light + 127) // 255
