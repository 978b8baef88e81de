"""One batch out of parts: item i of the whole is the next one of part `part_of[i]`.

Parts are given by address and count or size, so that one call serves any number of them; who calls holds on to their
arrays. `taken` is scratch, a number a part, all zero. Each kernel returns -1, or which item its part does not have.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastload.kernels.copying import array_at, copy_range
from fastload.kernels.declare import array_in, array_out, int32, int64, kernel, uint8
from fastload.kernels.yielding import yield_to_others

__all__ = ["interleave_offsets", "interleave_rows", "interleave_values"]

Numbers = NDArray[np.int32]
Int64s = NDArray[np.int64]
Bytes = NDArray[np.uint8]

_numbers, _ints, _scratch = array_in(int32), array_in(int64), array_out(int64)


@kernel(int64(_numbers, _ints, _ints, _scratch, array_out(int64)))
def interleave_offsets(part_of: Numbers, addresses: Int64s, counts: Int64s, taken: Int64s, out: Int64s) -> int:
    """Where items begin and the last one ends, int64[n + 1], from the same of each part: of `counts` items."""
    out[0] = 0
    for i in range(part_of.size):
        part = part_of[i]
        if not (0 <= part < counts.size and taken[part] < counts[part]):
            return i
        offsets = array_at(addresses[part], counts[part] + 1, np.int64)
        out[i + 1] = out[i] + offsets[taken[part] + 1] - offsets[taken[part]]
        taken[part] += 1
    return -1


@kernel(int64(_numbers, _ints, _ints, int64, _scratch, array_out(uint8)))
def interleave_rows(
    part_of: Numbers, addresses: Int64s, sizes: Int64s, row_bytes: int, taken: Int64s, out: Bytes
) -> int:
    """Copy rows of `row_bytes` each, which lie end to end in parts of `sizes` bytes, to where they go in `out`."""
    for i in range(part_of.size):
        part = part_of[i]
        if not (0 <= part < sizes.size and taken[part] <= sizes[part] - row_bytes and i < out.size // row_bytes):
            return i
        copy_range(array_at(addresses[part], sizes[part], np.uint8), taken[part], out, i * row_bytes, row_bytes)
        taken[part] += row_bytes
    return -1


@kernel(int64(array_out(int64), _numbers, _ints, _ints, _ints, int64, _scratch, array_out(uint8)))
def interleave_values(
    yield_state: Int64s,
    part_of: Numbers,
    addresses: Int64s,
    sizes: Int64s,
    offsets: Int64s,
    value_bytes: int,
    taken: Int64s,
    out: Bytes,
) -> int:
    """Copy items, which lie end to end in parts of `sizes` bytes, to where they go in `out`: item i at `offsets[i]`, in
    values of `value_bytes`, up to `offsets[i + 1]`.
    """
    yield_to_others(yield_state)
    for i in range(part_of.size):
        part = part_of[i]
        to, size = offsets[i] * value_bytes, (offsets[i + 1] - offsets[i]) * value_bytes
        if not (0 <= part < sizes.size and 0 <= size <= sizes[part] - taken[part] and 0 <= to <= out.size - size):
            return i
        copy_range(array_at(addresses[part], sizes[part], np.uint8), taken[part], out, to, size)
        taken[part] += size
    return -1
