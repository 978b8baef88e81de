"""Numbers out of text: the integers of a whole batch in one call, without a Python object for any of them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fastload.kernels.declare import array_in, array_out, boolean, helper, int64, kernel, uint8

__all__ = ["parse_integers"]

_LIMIT = np.uint64(1 << 63)
_TENTH = np.uint64((1 << 63) // 10)


@helper(boolean(uint8))
def is_space(byte: int) -> bool:
    """The six that `bytes.strip()` strips."""
    return byte == 32 or 9 <= byte <= 13


@kernel(int64(array_in(uint8), array_in(int64), array_out(int64)))
def parse_integers(values: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64], out: npt.NDArray[np.int64]) -> int:
    """Parse item i, `values[offsets[i]:offsets[i + 1]]`, as a decimal integer into `out[i]`.

    An item is spaces, a sign or none, ASCII digits, spaces. Returns the number of the first item that is
    something else or does not fit int64 (`out` is filled up to there), or -1. The offsets must lie within
    `values` and never fall.
    """
    for item in range(len(offsets) - 1):
        start = offsets[item]
        end = offsets[item + 1]
        while start < end and is_space(values[start]):
            start += 1
        while start < end and is_space(values[end - 1]):
            end -= 1
        negative = start < end and values[start] == 45
        if start < end and (values[start] == 43 or values[start] == 45):
            start += 1
        if start == end:
            return item
        # Summed unsigned up to 2**63, which is the magnitude of the smallest int64 and one more than that of
        # the largest.
        total = np.uint64(0)
        for at in range(start, end):
            if values[at] < 48 or values[at] > 57 or total > _TENTH:
                return item
            total = total * np.uint64(10) + np.uint64(values[at] - 48)
        if total > _LIMIT or (total == _LIMIT and not negative):
            return item
        if negative and total > np.uint64(0):
            out[item] = -1 - np.int64(total - np.uint64(1))
        else:
            out[item] = np.int64(total)
    return -1
