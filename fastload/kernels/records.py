"""Finding the values of columns within gathered records.

Records come from files that others wrote, so each length is checked against what is left of its record before it is
used.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastload.kernels.declare import array_in, array_out, int64, kernel, uint8

__all__ = ["find_sized"]

Int64s = NDArray[np.int64]
Bytes = NDArray[np.uint8]

_tables = array_out(int64, 2)


@kernel(int64(array_in(uint8), array_in(int64), array_in(int64), array_in(int64), _tables, _tables))
def find_sized(
    records: Bytes, offsets: Int64s, fixed: Int64s, wanted: Int64s, value_offset: Int64s, value_size: Int64s
) -> int:
    """Columns of records that begin with the sizes (uint32, little-endian) of the columns of varying size, and then
    hold
    all columns one after the other. `fixed`: bytes of each column, -1 where they vary; `wanted`: to which row of the
    tables, int64[W, n], its places go, or -1.

    Returns -1, or the number of the first record whose sizes do not add up to it.
    """
    varying, fixed_bytes = 0, 0
    for column in range(fixed.size):
        if fixed[column] < 0:
            varying += 1
        else:
            fixed_bytes += fixed[column]
    for number in range(offsets.size - 1):
        start, end = offsets[number], offsets[number + 1]
        at = start + 4 * varying
        if not (0 <= start <= end <= records.size and at + fixed_bytes <= end):
            return number
        head = start
        for column in range(fixed.size):
            size = fixed[column]
            if size < 0:
                size = (
                    np.int64(records[head])
                    | np.int64(records[head + 1]) << 8
                    | np.int64(records[head + 2]) << 16
                    | np.int64(records[head + 3]) << 24
                )
                head += 4
            if size > end - at:
                return number
            row = wanted[column]
            if row >= 0:
                value_offset[row, number], value_size[row, number] = at, size
            at += size
        if at != end:
            return number
    return -1
