"""Sequences of tokens: rows that are padded, where documents lie in a row, and which documents share one."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastload.kernels.copying import copy_range
from fastload.kernels.declare import array_in, array_out, int32, int64, kernel, uint8

__all__ = ["best_fit", "fill_from_parts", "fill_from_text", "pad_rows"]

Int64s = NDArray[np.int64]
Int32s = NDArray[np.int32]
Bytes = NDArray[np.uint8]

_ints, _bytes = array_in(int64), array_in(uint8)

POSITION, SEGMENT, MODE = 0, 1, 2
"""What is written of each token: its number in its document, its document's in the sample (from 1), the mode."""


@kernel(int64(_bytes, _ints, _bytes, int64, array_out(uint8)))
def pad_rows(values: Bytes, offsets: Int64s, pad: Bytes, row_bytes: int, rows: Bytes) -> int:
    """Each value at the beginning of a row of `row_bytes`, and the bytes of `pad` over and over behind it. Returns -1,
    or the number of the first value that has no room.
    """
    for number in range(offsets.size - 1):
        start, size = offsets[number], offsets[number + 1] - offsets[number]
        if not (0 <= start <= values.size - size and 0 <= size <= row_bytes <= rows.size - number * row_bytes):
            return number
        to = number * row_bytes
        copy_range(values, start, rows, to, size)
        of_pad = 0
        for at in range(to + size, to + row_bytes):
            rows[at] = pad[of_pad]
            of_pad = of_pad + 1 if of_pad + 1 < pad.size else 0
    return -1


@kernel(int64(_ints, _ints, int64, int64, _ints, array_out(int32)))
def fill_from_parts(
    parts: Int64s, part_start: Int64s, what: int, item_bytes: int, row_start: Int64s, rows: Int32s
) -> int:
    """Of samples that are made of parts: `what` of each token, and 0 behind the last up to the end of the row. Part p
    has `parts[2 * p]` bytes, and its tag `parts[2 * p + 1]` is twice its mode, and one more where a document begins.
    Sample i has the parts from `part_start[i]` on, and its row begins at `row_start[i]`.

    Returns -1, or the number of the first sample whose parts do not fit its row.
    """
    for number in range(part_start.size - 1):
        at, end = row_start[number], row_start[number + 1]
        if not (0 <= at <= end <= rows.size and 0 <= part_start[number] <= part_start[number + 1] <= parts.size // 2):
            return number
        position, segment = 0, 0
        for part in range(part_start[number], part_start[number + 1]):
            count, tag = parts[2 * part] // item_bytes, parts[2 * part + 1]
            if not 0 <= count <= end - at:
                return number
            if tag & 1:
                position, segment = 0, segment + 1
            for each in range(count):
                if what == POSITION:
                    rows[at + each] = position + each
                elif what == SEGMENT:
                    rows[at + each] = segment
                else:
                    rows[at + each] = tag >> 1
            position += count
            at += count
        for rest in range(at, end):
            rows[rest] = 0
    return -1


@kernel(int64(_bytes, _bytes, int64, int64, array_out(int32)))
def fill_from_text(values: Bytes, end: Bytes, row_length: int, what: int, rows: Int32s) -> int:
    """Of rows of `row_length` tokens, in which the token `end` ends a document: `what` of each token. Returns how many
    tokens were gone through.
    """
    item_bytes = end.size
    count = min(values.size // item_bytes, rows.size)
    position, segment = 0, 1
    for number in range(count):
        if number % row_length == 0:
            position, segment = 0, 1
        rows[number] = position if what == POSITION else segment
        position += 1
        at = number * item_bytes
        is_end = True
        for byte in range(item_bytes):
            if values[at + byte] != end[byte]:
                is_end = False
                break
        if is_end:
            position, segment = 0, segment + 1
    return count


@kernel(int64(_ints, _ints, int64, array_out(int64), array_out(int64), array_out(uint8), array_out(int64)))
def best_fit(
    sizes: Int64s, order: Int64s, capacity: int, newest: Int64s, older: Int64s, has_any: Bytes, bin_of: Int64s
) -> int:
    """Put items of these sizes into as few bins of `capacity` as best fit does, in this order: each into the bin that
    it leaves least room in, of several the one that came to have this room last, or else into a new one.

    Scratch: `newest`, int64[capacity + 1], all -1; `older`, int64[items]; `has_any`, uint8[2 * p], zeros, where p is a
    power of two above `capacity`. Returns the number of bins, and in `bin_of` that of each item; -1 - i where
    the item whose turn is number i is larger than a bin, or empty.
    """
    # `newest[r]` is the bin that came to have room r last, and `older` leads from there to the others. A tree over r
    # says where there are any, so that the next room that is not too small is found in log(capacity) steps.
    leaves, count = has_any.size // 2, 0
    for turn in range(order.size):
        item = order[turn]
        size = sizes[item]
        if not 0 < size <= capacity < leaves:
            return -1 - turn
        node = leaves + size
        while node > 1 and not has_any[node]:
            while node > 1 and node & 1:  # a right child: what is larger lies behind its parent
                node >>= 1
            if node > 1:
                node += 1
        if node > 1:
            while node < leaves:
                node = 2 * node if has_any[2 * node] else 2 * node + 1
            room = node - leaves
            chosen = newest[room]
            newest[room] = older[chosen]
            if newest[room] < 0:
                has_any[node] = 0
                node >>= 1
                while node >= 1 and not (has_any[2 * node] | has_any[2 * node + 1]):
                    has_any[node] = 0
                    node >>= 1
        else:
            room, chosen = int64(capacity), int64(count)
            count += 1
        bin_of[item] = chosen
        left = room - size
        if left > 0:
            older[chosen], newest[left] = newest[left], chosen
            node = leaves + left
            while node >= 1 and not has_any[node]:
                has_any[node] = 1
                node >>= 1
    return count
