"""Finding the values of columns within gathered records.

Records come from files that others wrote, so each length is checked against what is left of its record before it is
used.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastload.kernels.declare import array_in, array_out, boolean, helper, int64, kernel, uint8, uint64

__all__ = ["find_lines", "find_members", "find_sized", "is_same"]

Int64s = NDArray[np.int64]
Bytes = NDArray[np.uint8]

_tables, _bytes = array_out(int64, 2), array_in(uint8)


@kernel(int64(array_in(uint8), array_in(int64), array_in(int64), array_in(int64), array_in(int64), _tables, _tables))
def find_sized(
    heads: Bytes,
    head_offset: Int64s,
    record_bytes: Int64s,
    fixed: Int64s,
    wanted: Int64s,
    value_offset: Int64s,
    value_size: Int64s,
) -> int:
    """Columns of n records, of `record_bytes`, that begin with the sizes (uint32, little-endian) of the columns of
    varying size, and then hold all columns one after the other. Record i begins at `head_offset[i]` of `heads`, which
    needs to have no more of it than these sizes. `fixed`: bytes of each column, -1 where they vary; `wanted`: to which
    row of the tables, int64[W, n], its place within the record goes, or -1.

    Returns -1, or the number of the first record whose sizes do not add up to it.
    """
    varying, fixed_bytes = 0, 0
    for column in range(fixed.size):
        if fixed[column] < 0:
            varying += 1
        else:
            fixed_bytes += fixed[column]
    for number in range(head_offset.size):
        head, end = head_offset[number], record_bytes[number]
        at = 4 * varying
        if not (0 <= head <= heads.size - at and at + fixed_bytes <= end):
            return number
        for column in range(fixed.size):
            size = fixed[column]
            if size < 0:
                size = (
                    np.int64(heads[head])
                    | np.int64(heads[head + 1]) << 8
                    | np.int64(heads[head + 2]) << 16
                    | np.int64(heads[head + 3]) << 24
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


_LINE_END, _RETURN, _SPACE, _QUOTE, _ESCAPE = 10, 13, 32, 34, 92


_LINE_ENDS, _ONES, _HIGHS = 0x0A0A0A0A0A0A0A0A, 0x0101010101010101, 0x8080808080808080


@helper(int64(_bytes, int64, int64))
def _after_space(text: Bytes, at: int, end: int) -> int:
    while at < end and (text[at] == _SPACE or 9 <= text[at] <= _RETURN):
        at += 1
    return at


@kernel(int64(_bytes, array_in(uint64), int64, array_out(int64), array_out(int64), array_out(int64)))
def find_lines(
    chunk: Bytes, words: NDArray[np.uint64], chunk_start: int, state: Int64s, starts: Int64s, ends: Int64s
) -> int:
    """The lines that end in a chunk, which lies at `chunk_start` in the file: where each starts, and where its line end
    is. `words` is the same memory, eight bytes at a time, which are looked at together. Blank lines are left out as far
    as they lie in one chunk. `state`: where the line starts that goes on beyond the chunk, and where to go on in it.

    Returns how many were found; as many as there is room for, where there may be more.
    """
    found, at = 0, state[1] - chunk_start
    while at < chunk.size and found < starts.size:
        if at & 7 == 0:
            # A byte of the word is zero where the chunk has a line end; the lowest such byte has its high bit set here.
            while at >> 3 < words.size:
                word = words[at >> 3] ^ uint64(_LINE_ENDS)
                if (word - uint64(_ONES)) & ~word & uint64(_HIGHS) != uint64(0):
                    break
                at += 8
            if at >= chunk.size:
                break
        if chunk[at] == _LINE_END:
            start = state[0]
            blank = start >= chunk_start
            if blank:
                blank = _after_space(chunk, start - chunk_start, at) == at
            if not blank:
                starts[found], ends[found] = start, chunk_start + at
                found += 1
            state[0] = chunk_start + at + 1
        at += 1
    state[1] = chunk_start + at
    return found


@helper(int64(_bytes, int64, int64))
def _after_string(text: Bytes, at: int, end: int) -> int:
    """Behind the string that begins at `at`; -1 where it does not end."""
    at += 1
    while at < end:
        if text[at] == _QUOTE:
            return at + 1
        at += 2 if text[at] == _ESCAPE else 1
    return -1


@helper(int64(_bytes, int64, int64))
def _after_value(text: Bytes, at: int, end: int) -> int:
    """Behind the value that begins at `at`, whatever is in it; -1 where it does not end."""
    depth = 0
    while at < end:
        byte = text[at]
        if byte == _QUOTE:
            at = _after_string(text, at, end)
            if at < 0 or depth == 0:
                return at
            continue
        if byte == 123 or byte == 91:  # { [
            depth += 1
        elif byte == 125 or byte == 93:  # } ]
            if depth == 0:
                return at
            depth -= 1
            if depth == 0:
                return at + 1
        elif depth == 0 and (byte == 44 or byte <= _SPACE):  # ,
            return at
        at += 1
    return -1 if depth else at


@helper(boolean(_bytes, int64, int64, _bytes, int64, int64))
def is_same(text: Bytes, start: int, end: int, names: Bytes, first: int, last: int) -> bool:
    """Whether `text[start:end]` is `names[first:last]`."""
    same = end - start == last - first
    number = 0
    while same and number < end - start:
        same = text[start + number] == names[first + number]
        number += 1
    return same


@helper(int64(uint8))
def _escaped(byte: int) -> int:
    """What an escape of JSON other than that of a code point stands for; -1 where it is none."""
    if byte in (_QUOTE, _ESCAPE, 47):  # /
        return int(byte)
    if byte == 98:  # b
        return 8
    if byte == 102:  # f
        return 12
    if byte == 110:  # n
        return _LINE_END
    if byte == 114:  # r
        return _RETURN
    return 9 if byte == 116 else -1  # t


@helper(int64(_bytes, int64, int64))
def _unit(text: Bytes, at: int, end: int) -> int:
    r"""The number of the escape \uXXXX at `at`; -1 where there is none."""
    if at + 6 > end or text[at] != _ESCAPE or text[at + 1] != 117:  # u
        return -1
    unit = 0
    for place in range(at + 2, at + 6):
        byte = int64(text[place])
        if 48 <= byte <= 57:
            digit = byte - 48
        elif 97 <= byte | 32 <= 102:
            digit = (byte | 32) - 87
        else:
            return -1
        unit = unit << 4 | digit
    return unit


@helper(boolean(_bytes, int64, int64, _bytes, int64, int64))
def _is_same_unescaped(text: Bytes, start: int, end: int, names: Bytes, first: int, last: int) -> bool:
    """Whether `text[start:end]`, which is within a string of JSON, stands for `names[first:last]`."""
    while start < end:
        if text[start] != _ESCAPE:
            point, taken = int64(text[start]), 1
        else:
            point, taken = _unit(text, start, end), 6
            if point < 0:
                point, taken = _escaped(text[start + 1]) if start + 1 < end else -1, 2
            elif 0xD800 <= point < 0xDC00:
                low = _unit(text, start + 6, end)
                if 0xDC00 <= low < 0xE000:
                    point, taken = 0x10000 + ((point - 0xD800) << 10 | (low - 0xDC00)), 12
        more = 0  # bytes of UTF-8 that follow the first; bytes that are not escaped are compared as they are
        if taken > 1 and point >= 0x80:
            more = 1 if point < 0x800 else 2 if point < 0x10000 else 3
        if point < 0 or first + more >= last:
            return False
        for place in range(more, 0, -1):
            if int64(names[first + place]) != 0x80 | (point & 0x3F):
                return False
            point >>= 6
        if int64(names[first]) != (point if more == 0 else (0xFF00 >> more + 1 & 0xFF) | point):
            return False
        start += taken
        first += 1 + more
    return first == last


@kernel(int64(array_in(uint8), array_in(int64), array_in(uint8), array_in(int64), _tables, _tables))
def find_members(
    records: Bytes, offsets: Int64s, names: Bytes, name_offsets: Int64s, value_offset: Int64s, value_size: Int64s
) -> int:
    """The values of members of records that are JSON objects, as they stand there. Name i is `names[name_offsets[i]:
    name_offsets[i + 1]]`, with or without escapes in the record, and its places go to row i of the tables, int64[W, n];
    -1 and 0 where a record has no such member. Of a name that is there twice the last counts. What is within a value is
    not looked at.

    Returns -1, or the number of the first record that is no object.
    """
    wanted = value_offset.shape[0]
    for number in range(offsets.size - 1):
        for row in range(wanted):
            value_offset[row, number], value_size[row, number] = -1, 0
        start, end = offsets[number], offsets[number + 1]
        if not 0 <= start <= end <= records.size:
            return number
        at = _after_space(records, start, end)
        if at >= end or records[at] != 123:
            return number
        at = _after_space(records, at + 1, end)
        is_open = True
        if at < end and records[at] == 125:
            at, is_open = at + 1, False
        while is_open:
            if at >= end or records[at] != _QUOTE:
                return number
            name = at + 1
            at = _after_string(records, at, end)
            if at < 0:
                return number
            name_end = at - 1
            at = _after_space(records, at, end)
            if at >= end or records[at] != 58:  # :
                return number
            value = _after_space(records, at + 1, end)
            at = _after_value(records, value, end)
            if at < 0 or at == value:
                return number
            has_escapes = False
            for byte in range(name, name_end):
                has_escapes = has_escapes or records[byte] == _ESCAPE
            for each in range(wanted):
                first, last = name_offsets[each], name_offsets[each + 1]
                if has_escapes:
                    found = _is_same_unescaped(records, name, name_end, names, first, last)
                else:
                    found = is_same(records, name, name_end, names, first, last)
                if found:
                    value_offset[each, number], value_size[each, number] = value, at - value
            at = _after_space(records, at, end)
            if at >= end:
                return number
            if records[at] == 125:
                at, is_open = at + 1, False
            elif records[at] == 44:
                at = _after_space(records, at + 1, end)
            else:
                return number
        if _after_space(records, at, end) != end:
            return number
    return -1
