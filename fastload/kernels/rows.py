"""From the rows of a window (see `fastload.engine.windows`) to what is known of its samples.

A batch has its samples from anywhere in a window, whose tables are larger than the processor's caches; numpy goes over
them once a table and again for each step of arithmetic. Here each is one walk: places of values 10 ns a sample where
numpy takes 80, keys 25 where it takes 180.

`samples` says which samples of the batch the rows are, since those of one batch may lie in several windows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastload.kernels.copying import copy_range
from fastload.kernels.jit import array_in, array_out, int32, int64, kernel, uint8, void

__all__ = ["fill_places", "key_lengths", "look_up", "write_keys"]

Int64s = NDArray[np.int64]
Bytes = NDArray[np.uint8]

_ints_in, _ints_out = array_in(int64), array_out(int64)


@kernel(void(_ints_in, array_in(int32), _ints_in, _ints_in, int64, int64, array_out(int64, 2)))
def fill_places(
    member_start: Int64s,
    member_column: NDArray[np.int32],
    member_offset: Int64s,
    member_size: Int64s,
    column: int,
    first_chunk: int,
    places: Int64s,
) -> None:
    """For each sample of a shard whose first chunk is `first_chunk`, where its value in `column` lies: `places`,
    int64[samples, 3], is first chunk, offset and size; offset -1 and size 0 where it has none.
    """
    for sample in range(places.shape[0]):
        places[sample, 0], places[sample, 1], places[sample, 2] = first_chunk, -1, 0
        for member in range(member_start[sample], member_start[sample + 1]):
            if member_column[member] == column:
                places[sample, 1], places[sample, 2] = member_offset[member], member_size[member]


@kernel(int64(array_in(int64, 2), _ints_in, _ints_in, _ints_out, _ints_out, _ints_out))
def look_up(places: Int64s, rows: Int64s, samples: Int64s, first_chunk: Int64s, offset: Int64s, size: Int64s) -> int:
    """Write the `places` of these rows to `samples` of the other three. Returns which is no row, or -1."""
    for number in range(rows.size):
        row, sample = rows[number], samples[number]
        if not (0 <= row < places.shape[0] and 0 <= sample < size.size):
            return number
        first_chunk[sample], offset[sample], size[sample] = places[row, 0], places[row, 1], places[row, 2]
    return -1


@kernel(int64(_ints_in, _ints_in, _ints_in, _ints_out))
def key_lengths(key_starts: Int64s, rows: Int64s, samples: Int64s, lengths: Int64s) -> int:
    """Write the lengths of these rows' keys to `samples` of `lengths`. Returns which is no row, or -1."""
    for number in range(rows.size):
        row, sample = rows[number], samples[number]
        if not (0 <= row < key_starts.size - 1 and 0 <= sample < lengths.size):
            return number
        lengths[sample] = key_starts[row + 1] - key_starts[row]
    return -1


@kernel(int64(array_in(uint8), _ints_in, _ints_in, _ints_in, _ints_in, array_out(uint8)))
def write_keys(key_bytes: Bytes, key_starts: Int64s, rows: Int64s, samples: Int64s, at: Int64s, text: Bytes) -> int:
    """Copy the keys of these rows, which `key_lengths` has checked, to where `at` has each of `samples` in `text`.
    Returns which does not fit there, or -1.
    """
    for number in range(rows.size):
        row, to = rows[number], at[samples[number]]
        size = key_starts[row + 1] - key_starts[row]
        if not 0 <= to <= text.size - size:
            return number
        copy_range(key_bytes, key_starts[row], text, to, size)
    return -1
