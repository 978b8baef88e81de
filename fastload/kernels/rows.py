"""From the samples of a batch to the rows of their windows (see `fastload.pipeline.windows`), and what is known there.

A batch has its samples from anywhere in a window, whose tables are larger than the processor's caches; numpy goes over
them once a table and again for each step of arithmetic. Here each is one walk: places of values 10 ns a sample where
numpy takes 80, keys 25 where it takes 180.

And numpy lets go of the GIL in each step over more than 500 samples, and wants it back. What is done here in one call
for a batch or for each of its windows would be sixty steps, at each of which a trainer's thread may have to wait.

`samples` says which samples of the batch the rows are, since those of one batch may lie in several windows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastload.kernels.copying import copy_range
from fastload.kernels.declare import array_in, array_out, int32, int64, kernel, uint8, void
from fastload.kernels.yielding import yield_to_others

__all__ = ["append_keys", "fill_places", "find_rows", "look_up", "write_keys"]

Int64s = NDArray[np.int64]
Bytes = NDArray[np.uint8]

_ints_in, _ints_out, _tables_out = array_in(int64), array_out(int64), array_out(int64, 2)


@kernel(void(_ints_in, array_in(int32), _ints_in, _ints_in, _ints_in, int64, _tables_out))
def fill_places(
    member_start: Int64s,
    member_column: NDArray[np.int32],
    member_offset: Int64s,
    member_size: Int64s,
    wanted: Int64s,
    first_chunk: int,
    places: Int64s,
) -> None:
    """For each sample of a shard whose first chunk is `first_chunk`, where its values in C columns lie: `places`,
    int64[samples, 1 + 2 * C], is first chunk, and offset and size of each column; -1 and 0 where there is none.

    `wanted`: for each column of the shard which of the C it is, or -1.
    """
    for sample in range(places.shape[0]):
        places[sample, 0] = first_chunk
        for at in range(1, places.shape[1], 2):
            places[sample, at], places[sample, at + 1] = -1, 0
        for member in range(member_start[sample], member_start[sample + 1]):
            column = wanted[member_column[member]]
            if column >= 0:
                places[sample, 1 + 2 * column] = member_offset[member]
                places[sample, 2 + 2 * column] = member_size[member]


@kernel(int64(_ints_in, array_in(uint8), int64, _ints_out, array_out(uint8)))
def append_keys(key_offsets: Int64s, key_bytes: Bytes, first_byte: int, key_starts: Int64s, all_bytes: Bytes) -> int:
    """Write a shard's part of a window's keys: where each begins, and from `first_byte` on their bytes. Returns the
    size of the longest, or -1 where they do not fit.
    """
    if key_offsets.size != key_starts.size + 1 or not 0 <= first_byte <= all_bytes.size - key_bytes.size:
        return -1
    longest = 0
    for sample in range(key_starts.size):
        key_starts[sample] = first_byte + key_offsets[sample]
        longest = max(longest, key_offsets[sample + 1] - key_offsets[sample])
    copy_range(key_bytes, 0, all_bytes, first_byte, key_bytes.size)
    return longest


@kernel(int64(_ints_in, _ints_in, array_in(int32), _ints_in, _ints_out, _ints_out, _tables_out))
def find_rows(
    window_of: Int64s,
    first_row_of: Int64s,
    object_no: NDArray[np.int32],
    sample_no: Int64s,
    distinct: Int64s,
    ends: Int64s,
    found: Int64s,
) -> int:
    """Sort the samples of a batch by their windows. Of each object: its window (-1: none), and the row of its
    first sample there.

    `distinct` takes the windows as they first come, and `ends` where each one's samples end in `found`, int64[2, n]:
    which sample, and its row. Returns how many windows there are, or -1 - i where sample i
    lies in none, or in one more than `distinct` has room for.
    """
    count, at = 0, 0
    for i in range(object_no.size):
        number = object_no[i]
        if not 0 <= number < window_of.size or window_of[number] < 0:
            return -1 - i
        if count == 0 or window_of[number] != distinct[at]:
            at = 0
            while at < count and distinct[at] != window_of[number]:
                at += 1
            if at == count:
                if count == min(distinct.size, ends.size):
                    return -1 - i
                distinct[count], ends[count] = window_of[number], 0
                count += 1
        found[1, i] = at
        ends[at] += 1
    start = 0
    for at in range(count):
        start, ends[at] = start + ends[at], start
    for i in range(object_no.size):
        at = found[1, i]
        found[0, ends[at]] = i
        ends[at] += 1
    for to in range(object_no.size):
        i = found[0, to]
        found[1, to] = first_row_of[object_no[i]] + sample_no[i]
    return count


@kernel(int64(_ints_out, array_in(int64, 2), _ints_in, _ints_in, _tables_out, _tables_out, _tables_out))
def look_up(
    yield_state: Int64s,
    places: Int64s,
    rows: Int64s,
    samples: Int64s,
    first_chunk: Int64s,
    offset: Int64s,
    size: Int64s,
) -> int:
    """Write the `places` of these rows to `samples` of the other three, int64[C, n]. Returns how many of the values are
    nowhere, or -1 - i where number i is no row.
    """
    yield_to_others(yield_state)
    missing = 0
    for number in range(rows.size):
        row, sample = rows[number], samples[number]
        if not (0 <= row < places.shape[0] and 0 <= sample < size.shape[1]):
            return -1 - number
        for column in range(size.shape[0]):
            first_chunk[column, sample] = places[row, 0]
            offset[column, sample], size[column, sample] = places[row, 1 + 2 * column], places[row, 2 + 2 * column]
            if offset[column, sample] < 0:
                missing += 1
    return missing


@kernel(int64(_ints_out, array_in(uint8), _ints_in, _ints_in, array_out(uint8)))
def write_keys(yield_state: Int64s, key_bytes: Bytes, key_starts: Int64s, rows: Int64s, text: Bytes) -> int:
    """Write the keys of these rows to `text`, a NUL after each. Returns how many bytes that are, or -1 - i where number
    i is no row, or too long.
    """
    yield_to_others(yield_state)
    to = 0
    for number in range(rows.size):
        row = rows[number]
        if not 0 <= row < key_starts.size - 1:
            return -1 - number
        size = key_starts[row + 1] - key_starts[row]
        if not 0 <= size < text.size - to:
            return -1 - number
        copy_range(key_bytes, key_starts[row], text, to, size)
        text[to + size] = 0
        to += size + 1
    return to
