"""Grouping a shard's members into samples by their names, without a Python object per member.

webdataset's convention: a sample is a run of members with the same key, the name up to the first dot of its
last part; what follows that dot is the column. Names come as bytes, all in one array, and keys and columns
are compared as such. The few distinct columns are found through a hash table; consecutive members mostly have
equal or different keys within the first bytes, so keys are compared directly. The hash begins with a number that the
caller draws, so that no archive can be made whose columns all have the same.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastload.kernels.copying import copy_bytes
from fastload.kernels.declare import array_in, array_out, boolean, helper, int32, int64, kernel, uint8

__all__ = ["group"]

Int64s = NDArray[np.int64]
Bytes = NDArray[np.uint8]

_bytes_in, _bytes_out, _ints_out = array_in(uint8), array_out(uint8), array_out(int64)


@helper(boolean(_bytes_in))
def is_metadata(name: Bytes) -> bool:
    """Whether a name's first part is `__like_this__`: webdataset keeps notes about a shard there."""
    end = 0
    while end < name.size and name[end] != 47:
        end += 1
    return end >= 4 and name[0] == 95 and name[1] == 95 and name[end - 1] == 95 and name[end - 2] == 95


@helper(int64(_bytes_in))
def column_at(name: Bytes) -> int:
    """Where the column starts in a member's name: after the first dot of the base name. -1: in no sample."""
    base = name.size
    while base > 0 and name[base - 1] != 47:
        base -= 1
    for i in range(base, name.size):
        if name[i] == 46:
            return -1 if i == base or is_metadata(name) else i + 1
    return -1


@helper(boolean(_bytes_in, _bytes_in))
def same_bytes(a: Bytes, b: Bytes) -> bool:
    """Whether two texts are equal."""
    if a.size != b.size:
        return False
    for i in range(a.size):  # noqa: SIM110, numba compiles loops and not generators
        if a[i] != b[i]:
            return False
    return True


@helper(int64(_bytes_out, _ints_out, int64, array_out(int32), int64))
def column_number(name: Bytes, column_ends: Int64s, columns: int, table: NDArray[np.int32], seed: int) -> int:
    """The number of the column whose name follows those that `column_ends` covers; `columns` where it is new.

    name: all columns' names and then the one to look up. table: a hash table of column numbers, -1 where
    free, of a size that is a power of two and larger than the number of columns.
    """
    start = column_ends[columns]
    wanted = name[start:]
    code = np.uint64(14695981039346656037) ^ np.uint64(seed)
    for i in range(wanted.size):
        code = (code ^ np.uint64(wanted[i])) * np.uint64(1099511628211)
    slot = int64((code >> np.uint64(20)) & np.uint64(table.size - 1))
    while table[slot] >= 0:
        found = int(table[slot])
        if same_bytes(name[column_ends[found] : column_ends[found + 1]], wanted):
            return found
        slot = (slot + 1) & (table.size - 1)
    table[slot] = columns
    return columns


@kernel(
    int64(
        _bytes_in,
        array_in(int64),
        _bytes_out,
        _ints_out,
        _bytes_out,
        _ints_out,
        _ints_out,
        _ints_out,
        array_out(int32),
        array_out(int32),
        _ints_out,
        int64,
    )
)
def group(
    names: Bytes,
    name_ends: Int64s,
    key_bytes: Bytes,
    key_offsets: Int64s,
    column_bytes: Bytes,
    column_ends: Int64s,
    last_seen: Int64s,
    member_start: Int64s,
    member_column: NDArray[np.int32],
    table: NDArray[np.int32],
    kept: Int64s,
    seed: int,
) -> int:
    """Group n members into samples; returns the number S of samples, or -1 - m where m doubles a column.

    names, name_ends: as `scan` wrote them.
    key_bytes: as long as `names`. key_offsets, member_start: int64[n + 1]; [S + 1] are written.
    column_bytes: as long as `names`. column_ends: int64[n + 2]: 0, then one per column; the rest is -1. Columns are
    lower-cased (ASCII). member_column: int32[n]; kept: int64[n + 1]: the members that are part of a sample, and their
    number in kept[n]. Scratch: last_seen, int64[n]; table, int32, of a size that is a power of two larger than n.
    seed: any number that archives cannot know.
    """
    for i in range(column_ends.size):
        column_ends[i] = -1
    for i in range(last_seen.size):
        last_seen[i] = -1
    for i in range(table.size):
        table[i] = -1
    samples, columns, members, key_end = 0, 0, 0, 0
    column_ends[0], key_offsets[0] = 0, 0
    start = 0
    for number in range(name_ends.size):
        name = names[start : name_ends[number]]
        start = name_ends[number]
        at = column_at(name)
        if at < 0:
            continue
        key = name[: at - 1]
        if samples == 0 or not same_bytes(key, key_bytes[key_offsets[samples - 1] : key_end]):
            member_start[samples] = members
            copy_bytes(key, key_bytes[key_end : key_end + key.size])
            key_end += key.size
            samples += 1
            key_offsets[samples] = key_end
        column_start = column_ends[columns]
        column_end = column_start + name.size - at
        for i in range(name.size - at):
            letter = name[at + i]
            column_bytes[column_start + i] = letter + 32 if 65 <= letter <= 90 else letter
        column = column_number(column_bytes[:column_end], column_ends, columns, table, seed)
        if column == columns:
            columns += 1
            column_ends[columns] = column_end
        if last_seen[column] == samples:
            return -1 - number
        last_seen[column] = samples
        member_column[members] = column
        kept[members] = number
        members += 1
    member_start[samples] = members
    kept[name_ends.size] = members
    return samples
