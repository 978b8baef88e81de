"""Copying values out of the arena: one call for all values of a batch's column; and which shard a sample lies in.

A value (one member of a shard) is a range of its shard; a shard is a run of chunk numbers; a chunk, where it
is present, lies somewhere in the arena. So a value is one piece, or several where it spans chunks, and its
pieces need not be adjacent. A batch may be gathered in passes, each with those chunks that are present then;
every pass copies the pieces that it can, and the caller counts bytes until all are there.

Offsets come from shard indexes and from the cache service, so everything is checked against its array before
it is used: nothing outside `arena` is read, nothing outside `out` is written, whatever the arguments.

Samples in random order are far apart in memory, and a copy that waits for each of them in turn takes twice as long. So
where the next few values begin is found out, and their bytes are asked for, while one is copied: values of 200 to 1000
bytes take 42 ns each in order and 100 to 155 shuffled in 600 MB (a block copy of the same bytes: 37; without looking
ahead: 52 and 220), one of 90 kB as long as a block copy. Asking for them into the first cache level instead of the
second costs 8 ns in order and 10 to 30 shuffled, since few lines may be on their way there; looking 4 ahead is too few
in order, 32 no better than 16; a line a value is not enough, since a processor foresees nothing beyond a page's end.

Large values of a batch that no cache holds are written past them: 23 MB in values of 9 to 150 kB take 2.4 ms, and 3.4
as the C library copies them, or one block.

`locate` finds the shards of samples that are numbered through many shards, in no order. A binary search over all ends
takes 0.2 us at a million shards, since it misses the cache at every step. So sample numbers are cut into buckets of a
power of two, up to twice as many samples as a shard has; each knows the first shard that ends beyond its beginning, and
the search goes on between two of these: 20 ns at a million shards, 7 at eight.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fastload.kernels.copying import (
    PAST_CACHES_BYTES,
    array_at,
    copy_past_caches,
    copy_range,
    order_writes,
    prefetch,
    scratch,
)
from fastload.kernels.declare import array_in, array_out, helper, int32, int64, kernel, tuple_of, uint8, void
from fastload.kernels.yielding import yield_state, yield_to_others

__all__ = ["fill_buckets", "gather", "gather_columns", "lay_out", "locate"]

Int64s = NDArray[np.int64]
Bytes = NDArray[np.uint8]
_ints, _tables, _bytes = array_in(int64), array_in(int64, 2), array_in(uint8)

_AHEAD = 16  # values whose bytes have been asked for; a power of two
_LINE_BYTES = 64
_LARGE_BYTES = 4096
_AHEAD_BYTES_MAX = 16 * _LINE_BYTES  # of a value; the processor foresees the rest by itself


def gather(
    arena: Bytes,
    chunk_offset: Int64s,
    chunk_bytes: int,
    value_first_chunk: Int64s,
    value_offset: Int64s,
    value_size: Int64s,
    out_offset: Int64s,
    out: Bytes,
) -> int:
    """Copy what is present of V values into `out`; returns the number of bytes copied. Runs without the GIL.

    arena: the mapped arena, may be read-only.
    chunk_offset: per chunk number (C of them), where the chunk lies in `arena`, or -1 where it is not
    present. value_first_chunk: per value, the chunk number of its shard's first chunk. value_offset,
    value_size: per value, its range within its shard, in bytes. out_offset: per value, where it goes in
    `out`. Values must not overlap there.

    Raises IndexError where a value does not fit its chunks, the arena or `out`, of which only a part is then written.
    """
    assert chunk_bytes > 0, chunk_bytes
    count = value_offset.size
    if not value_first_chunk.size == value_size.size == out_offset.size == count:
        raise IndexError(f"arrays of {count} values differ in length")
    copied: int = gather_pieces(
        arena, chunk_offset, chunk_bytes, value_first_chunk, value_offset, value_size, out_offset, out
    )
    if copied < 0:
        value = -1 - copied
        raise IndexError(
            f"value {value} (first chunk {value_first_chunk[value]}, offset {value_offset[value]}, "
            f"{value_size[value]} bytes, to {out_offset[value]}) lies outside of {chunk_offset.size} "
            f"chunks of {chunk_bytes} bytes, an arena of {arena.size} bytes or an output of {out.size} bytes"
        )
    return copied


@kernel(int64(_bytes, _ints, int64, _ints, _ints, _ints, _ints, array_out(uint8)))
def gather_pieces(
    arena: Bytes,
    chunk_offset: Int64s,
    chunk_bytes: int,
    value_first_chunk: Int64s,
    value_offset: Int64s,
    value_size: Int64s,
    out_offset: Int64s,
    out: Bytes,
) -> int:
    """`gather` without its checks of lengths; returns -1 - v where value v does not fit."""
    copied = 0
    count = value_offset.size
    # Of the values ahead: the chunk in which each begins, and where in it.
    first_chunk, first_within = scratch(_AHEAD, np.int64), scratch(_AHEAD, np.int64)
    for number in range(count + _AHEAD):
        slot, value = number & (_AHEAD - 1), number - _AHEAD
        if value >= 0 and value_size[value] > 0:
            whence = first_chunk[slot], first_within[slot]
            pieces = copy_value(arena, chunk_offset, chunk_bytes, whence, value_size[value], out, out_offset[value])
            if pieces < 0:
                return -1 - value
            copied += pieces
        if number < count and value_size[number] != 0:
            offset, size, to = value_offset[number], value_size[number], out_offset[number]
            chunk = value_first_chunk[number]
            # Written so that no sum can overflow before it is compared.
            if min(chunk, offset, size, to) < 0 or size > out.size or to > out.size - size:
                return -1 - number
            passed = quotient(offset, chunk_bytes)
            if passed >= chunk_offset.size - chunk:
                return -1 - number
            chunk += passed
            within = offset - passed * chunk_bytes
            if size > chunk_bytes - within and quotient(size + within - 1, chunk_bytes) >= chunk_offset.size - chunk:
                return -1 - number
            first_chunk[slot], first_within[slot] = chunk, within
            at = chunk_offset[chunk]
            if 0 <= at < arena.size:
                for ahead in range(0, min(size, _AHEAD_BYTES_MAX), _LINE_BYTES):
                    prefetch(arena, at + within + ahead)
    if out.size >= PAST_CACHES_BYTES:
        order_writes()
    return copied


@helper(int64(_bytes, _ints, int64, tuple_of(int64, 2), int64, array_out(uint8), int64))
def copy_value(
    arena: Bytes, chunk_offset: Int64s, chunk_bytes: int, whence: tuple[int, int], size: int, out: Bytes, to: int
) -> int:
    """Copy the pieces that are present of a value that begins in a chunk at a place there: `whence`.

    Returns the bytes copied, or -1 where a piece is not in the arena; all else has been checked.
    """
    chunk, within = whence
    copied = 0
    while size > 0:
        piece = min(size, chunk_bytes - within)
        at = chunk_offset[chunk]
        if at >= 0:
            if at > arena.size - within - piece:
                return -1
            if out.size >= PAST_CACHES_BYTES and piece >= _LARGE_BYTES:
                copy_past_caches(arena, at + within, out, to, piece)
            else:
                copy_range(arena, at + within, out, to, piece)
            copied += piece
        to, size = to + piece, size - piece
        chunk, within = chunk + 1, 0
    return copied


@helper(int64(int64, int64))
def quotient(number: int, by: int) -> np.int64:
    """`number // by`, neither of them negative: as such a division takes half the time."""
    return np.int64(np.uint64(number) // np.uint64(by))


def gather_columns(
    arena: Bytes,
    chunk_offset: Int64s,
    chunk_bytes: int,
    value_first_chunk: Int64s,
    value_offset: Int64s,
    value_size: Int64s,
    out_offset: Int64s,
    outs: Sequence[Bytes],
) -> int:
    """`gather` for C columns in one call: arrays int64[C, V], but `out_offset` int64[C, V + 1], and C outputs."""
    shape = value_size.shape
    if not (value_first_chunk.shape == value_offset.shape == shape and out_offset.shape == (len(outs), shape[1] + 1)):
        raise IndexError(f"arrays of {shape} values for {len(outs)} outputs differ in shape")
    assert chunk_bytes > 0, chunk_bytes
    assert all(out.flags.c_contiguous and out.flags.writeable and out.dtype == np.uint8 for out in outs), "outputs"
    ends = np.array([(out.ctypes.data, out.size) for out in outs], np.int64).reshape(-1, 2)
    tables = value_first_chunk, value_offset, value_size, out_offset
    copied: int = gather_all_pieces(yield_state, arena, chunk_offset, chunk_bytes, *tables, ends)
    if copied < 0:
        column = (-1 - copied) // shape[1]
        first_chunk, offset, size, to = (table[column, : shape[1]] for table in tables)
        gather(arena, chunk_offset, chunk_bytes, first_chunk, offset, size, to, outs[column])
        raise AssertionError(f"column {column} fits alone, and did not with others")
    return copied


@kernel(int64(array_out(int64), _bytes, _ints, int64, _tables, _tables, _tables, _tables, _tables))
def gather_all_pieces(
    yield_state: Int64s,
    arena: Bytes,
    chunk_offset: Int64s,
    chunk_bytes: int,
    value_first_chunk: Int64s,
    value_offset: Int64s,
    value_size: Int64s,
    out_offset: Int64s,
    outs: Int64s,
) -> int:
    """`gather_columns` without its checks; the outputs by address and size. Returns -1 - c * V - v where value v of
    column c does not fit.
    """
    yield_to_others(yield_state)
    copied, count = 0, value_size.shape[1]
    for column in range(value_size.shape[0]):
        pieces = gather_pieces(
            arena,
            chunk_offset,
            chunk_bytes,
            value_first_chunk[column],
            value_offset[column],
            value_size[column],
            out_offset[column, :count],
            array_at(outs[column, 0], outs[column, 1], np.uint8),
        )
        if pieces < 0:
            wrong: int = pieces - column * count
            return wrong
        copied += pieces
    return copied


@kernel(int64(int64, _ints, _ints, _ints, int64, array_out(uint8), array_out(int64), array_out(int64)))
def lay_out(
    columns: int,
    value_first_chunk: Int64s,
    value_offset: Int64s,
    value_size: Int64s,
    chunk_bytes: int,
    seen: Bytes,
    chunks: Int64s,
    out_offset: Int64s,
) -> int:
    """Where values go when those of a column are put end to end, and which chunks all of them touch.

    The values of all columns, one column after the other and as many of each; `out_offset` has room for one more a
    column, where it ends.

    `seen` and `chunks`: scratch, as long as there are chunks, and `seen` all zero; zero again on return, so that it can
    serve the next call. It makes the cost that of the values, not of all chunks of a data set. Writes the chunks to
    `chunks`, each once, as first touched; returns how many, or -1 - v where value v lies outside of these chunks.
    """
    found = mark_chunks(value_first_chunk, value_offset, value_size, chunk_bytes, seen, chunks)
    if found < 0:
        return found
    count = value_size.size // max(1, columns)
    for column in range(columns):
        first, end = column * count, 0
        for value in range(count):
            out_offset[first + column + value] = end
            end += value_size[first + value]
        out_offset[first + column + count] = end
    return found


@kernel(int64(_ints, _ints, _ints, int64, array_out(uint8), array_out(int64)))
def mark_chunks(
    value_first_chunk: Int64s,
    value_offset: Int64s,
    value_size: Int64s,
    chunk_bytes: int,
    seen: Bytes,
    out: Int64s,
) -> int:
    """Write the chunks touched to `out`, as first touched; returns how many, or -1 - v for a bad value v."""
    found = 0
    bad = -1
    for value in range(value_offset.size):
        offset, size = value_offset[value], value_size[value]
        if size == 0:
            continue
        chunk = value_first_chunk[value]
        if min(chunk, offset, size) < 0 or offset // chunk_bytes >= seen.size - chunk:
            bad = value
            break
        chunk += offset // chunk_bytes
        # Chunks that follow the first.
        span = (size - 1) // chunk_bytes + ((size - 1) % chunk_bytes + offset % chunk_bytes) // chunk_bytes
        if span >= seen.size - chunk:
            bad = value
            break
        for touched in range(chunk, chunk + span + 1):
            if seen[touched] == 0 and found < out.size:
                seen[touched] = 1
                out[found] = touched
                found += 1
    for number in range(found):
        seen[out[number]] = 0
    return found if bad < 0 else -1 - bad


@kernel(void(array_in(int64), int64, array_out(int32)))
def fill_buckets(ends: NDArray[np.int64], shift: int, buckets: NDArray[np.int32]) -> None:
    """For each bucket b the first shard that ends beyond sample b << shift; the number of shards where none does."""
    shard = 0
    for bucket in range(buckets.size):
        while shard < ends.size and ends[shard] <= bucket << shift:
            shard += 1
        buckets[bucket] = shard


@kernel(
    void(array_in(int64), array_in(int32), int64, array_in(int32), array_in(int64), array_out(int32), array_out(int64))
)
def locate(
    ends: NDArray[np.int64],
    buckets: NDArray[np.int32],
    shift: int,
    objects: NDArray[np.int32],
    numbers: NDArray[np.int64],
    object_no: NDArray[np.int32],
    sample_no: NDArray[np.int64],
) -> None:
    """For each of `numbers`, samples numbered through shards that end at `ends`: which of `objects` its shard is, and
    its number there.

    `buckets` has one entry more than the bucket of the last sample. A shard without samples is stepped over.
    """
    for i in range(numbers.size):
        number = numbers[i]
        low, high = np.int64(buckets[number >> shift]), np.int64(buckets[(number >> shift) + 1])
        while low < high:
            middle = (low + high) >> 1
            if ends[middle] <= number:
                low = middle + 1
            else:
                high = middle
        object_no[i] = objects[low]
        sample_no[i] = number - (ends[low - 1] if low > 0 else 0)
