"""TFRecord files: finding records and checking them, and reading the `Example` messages in them.

A file is records, each a length (u64), the length's check, the data, and the data's check. A check is a CRC-32C,
turned by 15 bits and with a constant added. An `Example` is a message of protocol buffers, in which a message is a run
of fields, each a tag (number and wire type) and a value:

    Example     1: Features         Features    1: entry, any number of times
    entry       1: name, 2: Feature
    Feature     1: BytesList, 2: FloatList, or 3: Int64List; each of these    1: value, any number of times

Numbers may be packed: one value holds many. What has another field's number is passed over, as protocol buffers have
it. Files come from outside, so each length is checked against what is left of its message before it is used.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastload.kernels.copying import copy_range
from fastload.kernels.crc import crc32_of
from fastload.kernels.declare import array_in, array_out, boolean, helper, int64, kernel, tuple_of, uint8, uint64, void
from fastload.kernels.records import is_same

__all__ = [
    "BYTES",
    "CUT",
    "DATA",
    "FLOATS",
    "FULL",
    "INTEGERS",
    "LENGTH",
    "LONG",
    "MIXED",
    "copy_lists",
    "find_features",
    "find_framed",
    "note_features",
]

Int64s = NDArray[np.int64]
Uint64s = NDArray[np.uint64]
Bytes = NDArray[np.uint8]

_bytes, _ints, _out, _tables = array_in(uint8), array_in(int64), array_out(int64), array_out(int64, 2)

HEAD_BYTES, TAIL_BYTES = 12, 4
LENGTH, DATA, CUT, LONG = 1, 2, 3, 4
"""What is wrong with a record: the check of its length, that of its data; it ends beyond the file; it is too long."""
NO_EXAMPLE, MIXED, FULL = 1, 2, 3
"""What is wrong with a message: it is no Example; a feature has values of another kind than before; there are too many
features, or their names are too long."""
BYTES, FLOATS, INTEGERS = 1, 2, 3
"""The kinds of values, as the fields of a Feature are numbered."""

_VARINT, _WORD8, _PIECE, _WORD4 = 0, 1, 2, 5  # wire types
_VARINT_BYTES_MAX = 10


@helper(int64(_bytes, int64))
def _u32(data: Bytes, at: int) -> int:
    number: int = int64(data[at]) | int64(data[at + 1]) << 8 | int64(data[at + 2]) << 16 | int64(data[at + 3]) << 24
    return number


@helper(void(array_out(uint8), int64, int64, int64))
def _put(out: Bytes, at: int, width: int, value: int) -> None:
    for number in range(width):
        out[at + number] = uint8(value >> 8 * number & 255)


@helper(boolean(_bytes, int64, int64, array_in(uint64)))
def _is_checked(data: Bytes, start: int, end: int, tables: Uint64s) -> bool:
    """Whether `data[start:end]` is what the check behind it says."""
    check = crc32_of(data, start, end, tables)
    masked = ((check >> 15 | check << 17) + 0xA282EAD8) & 0xFFFFFFFF
    return masked == _u32(data, end)


@kernel(int64(_bytes, int64, int64, array_in(uint64), _out, _out, _out))
def find_framed(
    data: Bytes, left: int, size_max: int, tables: Uint64s, state: Int64s, starts: Int64s, sizes: Int64s
) -> int:
    """The records that lie in `data` as a whole: where the data of each starts there, and its size. `left`: the bytes
    of the file from the start of `data` on. `state`: where to go on in `data`, at first where a record begins; and what
    is wrong with the record there, or 0.

    Returns how many were found; as many as there is room for, where there may be more.
    """
    found, at = 0, state[0]
    while found < starts.size and at + HEAD_BYTES <= data.size:
        if not _is_checked(data, at, at + 8, tables):
            state[1] = LENGTH
            break
        size = _u32(data, at) | _u32(data, at + 4) << 32
        if size < 0 or size > size_max:
            state[1] = LONG
            break
        if size > left - at - HEAD_BYTES - TAIL_BYTES:
            state[1] = CUT
            break
        start = at + HEAD_BYTES
        if size > data.size - start - TAIL_BYTES:
            break
        if not _is_checked(data, start, start + size, tables):
            state[1] = DATA
            break
        starts[found], sizes[found] = start, size
        found += 1
        at = start + size + TAIL_BYTES
    state[0] = at
    return found


# Messages.


@helper(tuple_of(int64, 2)(_bytes, int64, int64))
def _varint(data: Bytes, at: int, end: int) -> tuple[int, int]:
    """The number that begins at `at`, and where it ends; -1 where it does not."""
    value, shift = int64(0), int64(0)
    stop = min(end, at + _VARINT_BYTES_MAX)
    while at < stop:
        byte = int64(data[at])
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    return int64(0), int64(-1)


@helper(tuple_of(int64, 4)(_bytes, int64, int64))
def _field(data: Bytes, at: int, end: int) -> tuple[int, int, int, int]:
    """The field that begins at `at`: its number, wire type, and where its value begins and ends; number -1: none."""
    nothing = int64(-1), int64(0), int64(0), int64(0)
    tag, at = _varint(data, at, end)
    if at < 0 or not 8 <= tag < 1 << 32:
        return nothing
    wire = tag & 7
    if wire == _PIECE:
        size, at = _varint(data, at, end)
        if at < 0 or not 0 <= size <= end - at:
            return nothing
        return tag >> 3, wire, at, at + size
    if wire == _VARINT:
        _, stop = _varint(data, at, end)
        if stop < 0:
            return nothing
        return tag >> 3, wire, at, stop
    size = int64(8) if wire == _WORD8 else int64(4)
    if (wire != _WORD8 and wire != _WORD4) or size > end - at:  # groups, which nothing writes any more
        return nothing
    return tag >> 3, wire, at, at + size


@helper(int64(_bytes, int64, int64))
def _varint_count(data: Bytes, at: int, end: int) -> int:
    """How many numbers these bytes are; -1 where they are none."""
    count, length = int64(0), int64(0)
    while at < end:
        length += 1
        if length > _VARINT_BYTES_MAX:
            return -1
        if data[at] < 128:
            count += 1
            length = int64(0)
        at += 1
    return count if length == 0 else -1


@helper(tuple_of(int64, 4)(_bytes, int64, int64))
def _feature(data: Bytes, at: int, end: int) -> tuple[int, int, int, int]:
    """Of a Feature: the kind of its values (0: it has no list), how many there are, how many bytes these take together
    (for `BYTES` alone), and where the last one of these begins; kind -1: it is no Feature.
    """
    nothing = int64(-1), int64(0), int64(0), int64(0)
    kind, count, total, last = int64(0), int64(0), int64(0), int64(0)
    while at < end:
        number, wire, start, stop = _field(data, at, end)
        if number < 0:
            return nothing
        at = stop
        if number > INTEGERS:
            continue
        if wire != _PIECE or (kind and kind != number):
            return nothing
        kind = number
        while start < stop:
            each, form, first, behind = _field(data, start, stop)
            if each < 0:
                return nothing
            start = behind
            if each != 1:
                continue
            if kind == BYTES:
                if form != _PIECE:
                    return nothing
                count, total, last = count + 1, total + behind - first, first
            elif form == _PIECE:
                more = (behind - first) >> 2
                if kind == INTEGERS:
                    more = _varint_count(data, first, behind)
                elif (behind - first) & 3:
                    more = int64(-1)
                if more < 0:
                    return nothing
                count += more
            elif form == (_WORD4 if kind == FLOATS else _VARINT):
                count += 1
            else:
                return nothing
    return kind, count, total, last


@helper(tuple_of(int64, 5)(_bytes, int64, int64))
def _entry(data: Bytes, at: int, end: int) -> tuple[int, int, int, int, int]:
    """Of an entry of Features: where its name begins and ends, and its Feature; and 1, or 0 where it is no entry."""
    name, name_end, feature, feature_end = int64(0), int64(0), int64(0), int64(0)
    while at < end:
        number, wire, start, stop = _field(data, at, end)
        if number < 0 or (number <= 2 and wire != _PIECE):
            return name, name_end, feature, feature_end, int64(0)
        if number == 1:
            name, name_end = start, stop
        elif number == 2:
            feature, feature_end = start, stop
        at = stop
    return name, name_end, feature, feature_end, int64(1)


@helper(int64(_bytes, int64, int64, _bytes, _ints, int64, int64))
def _find_name(data: Bytes, start: int, end: int, names: Bytes, name_offsets: Int64s, count: int, first: int) -> int:
    """Which of `count` names `data[start:end]` is, -1: none. They are compared from number `first` on: most writers
    give the features of each Example in the same order.
    """
    for step in range(count):
        number = first + step
        if number >= count:
            number -= count
        if is_same(data, start, end, names, name_offsets[number], name_offsets[number + 1]):
            return number
    return -1


@kernel(int64(_bytes, _ints, _ints, _out, array_out(uint8), _out, _out, _out))
def note_features(
    data: Bytes,
    starts: Int64s,
    sizes: Int64s,
    state: Int64s,
    names: Bytes,
    name_offsets: Int64s,
    kinds: Int64s,
    counts: Int64s,
) -> int:
    """Note which features there are in Examples, of which number i is `sizes[i]` bytes of `data` from `starts[i]`: name
    i is `names[name_offsets[i]:name_offsets[i + 1]]`, its values are of `kinds[i]`, and each Example that has it has
    `counts[i]` of them, -1 where that differs. `state`: how many are noted; what is wrong with the message that the
    call ended at; and with which feature.

    Returns -1, or the number of that message.
    """
    for message in range(starts.size):
        at, end = starts[message], starts[message] + sizes[message]
        expected = int64(0)
        state[1] = NO_EXAMPLE
        if not 0 <= at <= end <= data.size:
            return message
        while at < end:
            number, wire, start, stop = _field(data, at, end)
            # Of a SequenceExample, field 2 has the sequences, and 1 is like that of an Example.
            if number < 0 or number == 2 or (number == 1 and wire != _PIECE):
                return message
            at = stop
            if number != 1:
                continue
            while start < stop:
                number, wire, first, behind = _field(data, start, stop)
                if number < 0 or (number == 1 and wire != _PIECE):
                    return message
                start = behind
                if number != 1:
                    continue
                name, name_end, feature, feature_end, is_entry = _entry(data, first, behind)
                if not is_entry:
                    return message
                kind, count, _, _ = _feature(data, feature, feature_end)
                if kind < 0:
                    return message
                if kind == 0:
                    continue
                here = _find_name(data, name, name_end, names, name_offsets, state[0], expected)
                if here < 0:
                    here = state[0]
                    if here >= kinds.size or name_end - name > names.size - name_offsets[here]:
                        state[1] = FULL
                        return message
                    copy_range(data, name, names, name_offsets[here], name_end - name)
                    name_offsets[here + 1] = name_offsets[here] + name_end - name
                    kinds[here], counts[here] = kind, count
                    state[0] += 1
                if kinds[here] != kind:
                    state[1], state[2] = MIXED, here
                    return message
                if counts[here] != count:
                    counts[here] = -1
                expected = here + 1
    state[1] = 0
    return -1


@kernel(int64(_bytes, _ints, _bytes, _ints, _ints, _ints, _tables, _tables, _tables, _tables))
def find_features(
    data: Bytes,
    offsets: Int64s,
    names: Bytes,
    name_offsets: Int64s,
    kinds: Int64s,
    singles: Int64s,
    place: Int64s,
    size: Int64s,
    counts: Int64s,
    totals: Int64s,
) -> int:
    """Where the values of features lie in Examples, of which number i is `data[offsets[i]:offsets[i + 1]]`. Name i is
    `names[name_offsets[i]:name_offsets[i + 1]]`, its values are of `kinds[i]`; in `singles`, 1 where it has one value,
    of bytes. To row i of the tables, int64[W, n], go offset and size of that value, or else of the Feature, as
    `copy_lists` takes it; how many values that has; and how many bytes these take together where they are bytes. -1 and
    zeros where an Example lacks it.

    Returns -1, or the number of the first record that is no such Example.
    """
    wanted = place.shape[0]
    for message in range(offsets.size - 1):
        for row in range(wanted):
            place[row, message], size[row, message], counts[row, message], totals[row, message] = -1, 0, 0, 0
        at, end = offsets[message], offsets[message + 1]
        expected = int64(0)
        if not 0 <= at <= end <= data.size:
            return message
        while at < end:
            number, wire, start, stop = _field(data, at, end)
            if number < 0 or number == 2 or (number == 1 and wire != _PIECE):
                return message
            at = stop
            if number != 1:
                continue
            while start < stop:
                number, wire, first, behind = _field(data, start, stop)
                if number < 0 or (number == 1 and wire != _PIECE):
                    return message
                start = behind
                if number != 1:
                    continue
                name, name_end, feature, feature_end, is_entry = _entry(data, first, behind)
                if not is_entry:
                    return message
                row = _find_name(data, name, name_end, names, name_offsets, wanted, expected)
                if row < 0:
                    continue
                expected = row + 1
                kind, count, total, last = _feature(data, feature, feature_end)
                if kind == 0:
                    continue
                if kind != kinds[row] or (singles[row] and count != 1):
                    return message
                place[row, message], size[row, message] = feature, feature_end - feature
                if singles[row]:
                    place[row, message], size[row, message] = last, total
                counts[row, message], totals[row, message] = count, total
    return -1


@kernel(int64(_bytes, _ints, _ints, int64, _ints, array_out(uint8)))
def copy_lists(data: Bytes, place: Int64s, size: Int64s, kind: int, out_offset: Int64s, out: Bytes) -> int:
    """Copy the values of Features, of which number i is `size[i]` bytes of `data` from `place[i]` (-1: none), to `out`,
    from `out_offset[i]` to `out_offset[i + 1]`: numbers as they are in memory; of bytes first how many there are and
    the size of each (u32), as many as the places have room for, and then these.

    Returns -1, or the number of the first that does not fit that exactly.
    """
    for item in range(place.size):
        to, to_end = out_offset[item], out_offset[item + 1]
        if not 0 <= to <= to_end <= out.size:
            return item
        if place[item] < 0:
            if to != to_end:
                return item
            continue
        if size[item] < 0 or place[item] + size[item] > data.size:
            return item
        at, end = place[item], place[item] + size[item]
        found, _, total, _ = _feature(data, at, end)
        if found != kind:
            return item
        sizes_at = to + 4
        if kind == BYTES:
            count = (to_end - to - total) // 4 - 1
            if count < 0 or 4 * (count + 1) + total != to_end - to:
                return item
            _put(out, to, 4, count)
            to += 4 * (count + 1)
        values_at = to
        while at < end:
            number, _, start, stop = _field(data, at, end)
            at = stop
            if number != kind:
                continue
            while start < stop:
                each, _, first, behind = _field(data, start, stop)
                start = behind
                if each != 1:
                    continue
                if kind == BYTES:
                    if sizes_at + 4 > values_at or behind - first > to_end - to:
                        return item
                    _put(out, sizes_at, 4, behind - first)
                    sizes_at += 4
                if kind == INTEGERS:
                    while first < behind:
                        value, first = _varint(data, first, behind)
                        if first < 0 or to + 8 > to_end:
                            return item
                        _put(out, to, 8, value)
                        to += 8
                else:
                    if behind - first > to_end - to:
                        return item
                    copy_range(data, first, out, to, behind - first)
                    to += behind - first
        if to != to_end or (kind == BYTES and sizes_at != values_at):
            return item
    return -1
