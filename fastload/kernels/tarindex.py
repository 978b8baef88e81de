"""Reading the headers of a tar archive, without a Python object per member.

`scan` walks over the 512-byte headers in a piece of an archive and writes down the regular members: name,
offset, size. It is a state machine over pieces: all that it knows between two calls is in `state` and three
buffers, so an archive may come in chunks, and chunks without a header need not come at all. Headers start at
multiples of 512 and so never straddle chunks; the payload of a long name or of a pax header may, and is
collected in `payload`.

Which member a header describes follows Python's tarfile (so that webdataset and fastload see the same
samples): ustar with prefix, GNU long names ('L'), pax ('x', 'g'; path and size), base-256 numbers, unsigned
and signed checksums; the first all-zero block ends the archive. Where tarfile stops silently at a damaged
header, this is an error.

It returns a code and leaves it to Python to say it in words. Every length in an archive is checked before it
is used as one; nothing is read outside of the arguments or written beyond their ends. numba does not check
indexes by itself.

Measured with grouping, in CPU time: 40,000 members of 200-1000 bytes in 16 ms (tarfile: 900), 3600 samples of three
members in 232 MB in 5 ms (tarfile: 280). Views `header[a:b]` with `range(n)`, and not `data[a + i]`, let LLVM vectorise
the checksum, since no index can be negative.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastload.kernels.copying import copy_bytes
from fastload.kernels.declare import array_in, array_out, boolean, helper, int64, kernel, uint8

__all__ = ["STATE_SIZE", "scan"]

Int64s = NDArray[np.int64]
Bytes = NDArray[np.uint8]

BLOCK = 512
_HUGE = 1 << 54  # numbers stop here: larger than any object, and 256 times it still fits

# What `scan` returns.
MORE = 0  # all that was given has been read
FULL = 1  # the output arrays are full: empty them, set MEMBERS and NAME_BYTES to 0, call again
END = 2  # the end of the archive was reached
BAD_CHECKSUM = -1
BAD_SIZE = -2  # a size field that is no number
PASSES_END = -3  # a member's data passes the end of the object
TRUNCATED_HEADER = -4
TOO_LONG = -5  # a long name or pax header larger than its buffer
BAD_PAX = -6
SPARSE = -7
GLOBAL_SIZE = -8  # a global pax header that sets a size
DANGLING = -9  # a long name or pax header with no member after it

# Where things are in `state`.
POSITION = 0  # offset in the object of the next byte needed
MODE = 1
LEFT = 2  # bytes of payload still to come
FILLED = 3  # bytes of payload in `payload`
PENDING = 4  # 1 after a long name or pax header, until its member
PENDING_NAME = 5  # length of the next member's name in `pending`, or -1
PENDING_SIZE = 6  # size of the next member according to pax, or -1
PENDING_SPARSE = 7
GLOBAL_NAME = 8  # length of the name that a global pax header gives to all members, or -1
HEADER_AT = 9  # offset of the header read last
MEMBERS = 10  # members in the output arrays
NAME_BYTES = 11  # bytes in `names`
NAME_SHOWN = 12  # length of the last name, after NAME_BYTES in `names`; for messages
SIZE_SHOWN = 13
STATE_SIZE = 14

_HEADER, _LONG_NAME, _PAX, _GLOBAL_PAX, _ENDED = 0, 1, 2, 3, 4

_bytes_in, _bytes_out, _ints_out = array_in(uint8), array_out(uint8), array_out(int64)


@kernel(boolean(_bytes_in))
def checksum_fits(header: Bytes) -> bool:
    """Whether the checksum of a header of 512 bytes is right, by unsigned or (old Sun tar) signed bytes."""
    total = 0
    for i in range(BLOCK):
        total += header[i]
    for i in range(148, 156):
        total += 32 - header[i]  # the field itself counts as blanks
    stored = parse_number(header[148:156])
    if stored == total:
        return True
    negative = 0
    for i in range(BLOCK):
        negative += header[i] >> 7
    for i in range(148, 156):
        negative -= header[i] >> 7
    return bool(stored == total - 256 * negative)


@kernel(int64(_bytes_in))
def parse_number(field: Bytes) -> int:
    """A number field: octal, or base-256 after a byte 0x80. -1 where it is neither; at most 2**54."""
    value = 0
    if field[0] == 0x80:
        for i in range(1, field.size):
            value = min(value * 256 + field[i], _HUGE)
        return value
    i = 0
    while i < field.size and field[i] == 32:
        i += 1
    while i < field.size and 48 <= field[i] <= 55:
        value = value * 8 + (int64(field[i]) - 48)
        i += 1
    while i < field.size and field[i] == 32:
        i += 1
    return value if i == field.size or field[i] == 0 else -1


@kernel(int64(_bytes_in))
def text_length(field: Bytes) -> int:
    """The length of a text up to the first zero byte."""
    for i in range(field.size):
        if field[i] == 0:
            return i
    return field.size


@kernel(int64(_bytes_in, _ints_out, _bytes_out))
def read_pax(payload: Bytes, state: Int64s, name: Bytes) -> int:
    r"""Read the records "LENGTH KEYWORD=VALUE\n" of a pax header, of one member or (in that mode) of all."""
    shared = state[MODE] == _GLOBAL_PAX
    name_slot = GLOBAL_NAME if shared else PENDING_NAME
    path_at, path_length, size = -1, 0, -1
    at = 0
    while at < payload.size and payload[at] != 0:
        length, i = 0, at
        while i < payload.size and 48 <= payload[i] <= 57:
            length = min(length * 10 + (int64(payload[i]) - 48), _HUGE)
            i += 1
        end = at + length
        # Shortest record: a blank, a keyword of one letter, "=" and the line's end.
        if i == at or i + 4 > end or end > payload.size or payload[i] != 32 or payload[end - 1] != 10:
            return BAD_PAX
        keyword = i + 1
        equals = keyword
        while equals < end - 1 and payload[equals] != 61:
            equals += 1
        if equals == end - 1 or equals == keyword:
            return BAD_PAX
        word = payload[keyword:equals]
        value = payload[equals + 1 : end - 1]
        if word.size == 4 and word[0] == 112 and word[1] == 97 and word[2] == 116 and word[3] == 104:  # path
            path_at, path_length = equals + 1, value.size
        elif word.size == 4 and word[0] == 115 and word[1] == 105 and word[2] == 122 and word[3] == 101:  # size
            size = 0
            for k in range(value.size):
                if not 48 <= value[k] <= 57:
                    return BAD_PAX
                size = min(size * 10 + (int64(value[k]) - 48), _HUGE)
            if value.size == 0:
                return BAD_PAX
        elif word.size > 11 and word[0] == 71 and word[4] == 115 and word[10] == 46:  # GNU.sparse.*
            state[PENDING_SPARSE] = 1
        at = end
    if size >= 0 and shared:
        return GLOBAL_SIZE
    # Of several headers before one member the first counts, as in tarfile.
    if size >= 0 and state[PENDING_SIZE] < 0:
        state[PENDING_SIZE] = size
    if path_at >= 0 and (shared or state[name_slot] < 0):
        while path_length > 0 and payload[path_at + path_length - 1] == 47:
            path_length -= 1
        if path_length > name.size:
            return TOO_LONG
        copy_bytes(payload[path_at : path_at + path_length], name)
        state[name_slot] = path_length
    return MORE


@helper(int64(_bytes_in, _ints_out, _bytes_out, _bytes_out, _bytes_out))
def take_payload(data: Bytes, state: Int64s, payload: Bytes, pending: Bytes, shared: Bytes) -> int:
    """Collect what `data` holds of a long name or pax header, and read it once it is whole."""
    n = min(state[LEFT], data.size)
    filled = state[FILLED]
    copy_bytes(data[:n], payload[filled:])
    state[FILLED] += n
    state[LEFT] -= n
    state[POSITION] += n
    if state[LEFT] > 0:
        return MORE
    whole = payload[: state[FILLED]]
    state[POSITION] += -state[FILLED] % BLOCK
    code = MORE
    if state[MODE] == _LONG_NAME:
        length = text_length(whole)
        if length > pending.size:
            return TOO_LONG
        if state[PENDING_NAME] < 0:
            copy_bytes(whole[:length], pending)
            state[PENDING_NAME] = length
    elif state[MODE] == _PAX:
        code = read_pax(whole, state, pending)
    else:
        code = read_pax(whole, state, shared)
        state[PENDING_SPARSE] = 0
    state[MODE] = _HEADER
    return code


@helper(int64(_bytes_in, _ints_out, _bytes_in, _bytes_in, _bytes_out))
def write_name(header: Bytes, state: Int64s, pending: Bytes, shared: Bytes, out: Bytes) -> int:
    """Write the member's name to the start of `out`, which has room for any; returns its length."""
    if state[PENDING_NAME] >= 0:
        copy_bytes(pending[: state[PENDING_NAME]], out)
        return int(state[PENDING_NAME])
    if state[GLOBAL_NAME] >= 0:
        copy_bytes(shared[: state[GLOBAL_NAME]], out)
        return int(state[GLOBAL_NAME])
    # "ustar" and a blank is GNU's own format, which keeps times where ustar keeps the prefix.
    prefix = header[345:500]
    at = 0 if header[262] == 32 else text_length(prefix)
    copy_bytes(prefix[:at], out)
    if at > 0:
        out[at] = 47
        at += 1
    name = header[0:100]
    length = text_length(name)
    copy_bytes(name[:length], out[at:])
    return at + length


@helper(int64(_bytes_in, int64, _ints_out, int64, _bytes_in, _bytes_in, _bytes_out, _ints_out, _ints_out, _ints_out))
def take_header(
    header: Bytes,
    object_size: int,
    state: Int64s,
    payload_room: int,
    pending: Bytes,
    shared: Bytes,
    names: Bytes,
    name_ends: Int64s,
    offsets: Int64s,
    sizes: Int64s,
) -> int:
    """Read one header; the output arrays have room for one more member."""
    data_at = state[POSITION] + BLOCK
    state[HEADER_AT] = state[POSITION]
    state[NAME_SHOWN] = 0
    if header[0] == 0:
        used = 0
        for i in range(BLOCK):
            used |= header[i]
        if used == 0:
            state[MODE] = _ENDED
            return DANGLING if state[PENDING] else MORE
    if not checksum_fits(header):
        return BAD_CHECKSUM
    size = parse_number(header[124:136])
    kind = header[156]
    if size < 0:
        return BAD_SIZE

    extension = _HEADER
    if kind == 76:  # L
        extension = _LONG_NAME
    elif kind == 120 or kind == 88:  # x, and X, Solaris's own name for it
        extension = _PAX
    elif kind == 103:  # g
        extension = _GLOBAL_PAX
    is_link_name = kind == 75  # K: no link is a member of a sample
    is_member = extension == _HEADER and not is_link_name
    if is_member and state[PENDING_SIZE] >= 0:
        size = state[PENDING_SIZE]
    regular = kind == 48 or kind == 0 or kind == 55 or kind == 83  # '0', old, '7' contiguous, 'S' sparse
    if kind == 0:
        # Before there was a type for them, directories were files with a slash at the end.
        length = text_length(header[0:100])
        regular = length == 0 or header[length - 1] != 47
    if (kind == 0 and not regular) or 49 <= kind <= 54:
        size = 0  # links, devices and directories have no data, whatever their size says
    if is_member:
        state[NAME_SHOWN] = write_name(header, state, pending, shared, names[state[NAME_BYTES] :])
    state[SIZE_SHOWN] = size
    end = data_at + size + -size % BLOCK
    if end > object_size:
        return PASSES_END
    if not is_member:
        if extension != _GLOBAL_PAX:
            state[PENDING] = 1
        if is_link_name:
            state[POSITION] = end
            return MORE
        if size > payload_room:
            return TOO_LONG
        state[MODE], state[LEFT], state[FILLED] = extension, size, 0
        state[POSITION] = data_at
        return MORE

    if regular:
        if kind == 83 or state[PENDING_SPARSE]:
            return SPARSE
        member = state[MEMBERS]
        state[NAME_BYTES] += state[NAME_SHOWN]
        name_ends[member], offsets[member], sizes[member] = state[NAME_BYTES], data_at, size
        state[MEMBERS] = member + 1
    state[PENDING], state[PENDING_NAME], state[PENDING_SIZE], state[PENDING_SPARSE] = 0, -1, -1, 0
    state[POSITION] = end
    return MORE


@kernel(
    int64(
        _bytes_in,
        int64,
        int64,
        _ints_out,
        _bytes_out,
        _bytes_out,
        _bytes_out,
        _bytes_out,
        _ints_out,
        _ints_out,
        _ints_out,
    )
)
def scan(
    data: Bytes,
    start: int,
    object_size: int,
    state: Int64s,
    payload: Bytes,
    pending: Bytes,
    shared: Bytes,
    names: Bytes,
    name_ends: Int64s,
    offsets: Int64s,
    sizes: Int64s,
) -> int:
    """Read the headers in `data`, which lies at `start` in the object; returns one of the codes above.

    The caller sees to it that `start` and, but for the last piece, the length of `data` are multiples of 512,
    and that `start <= state[POSITION]`. `names` must have room for one name of any length: that of `pending`
    or 256.

    state: int64[STATE_SIZE], zeros but for -1 in PENDING_NAME, PENDING_SIZE and GLOBAL_NAME; kept between
    calls, as are payload, pending, shared: buffers for a payload, and the names that it gives to one member
    or to all. names: uint8, names one after the other; name_ends, offsets, sizes: int64, one a member.
    """
    end = start + data.size
    name_room = max(pending.size, 256)
    while state[POSITION] < end and state[MODE] != _ENDED:
        at = state[POSITION] - start
        if state[MODE] != _HEADER:
            code = take_payload(data[at:], state, payload, pending, shared)
        elif at + BLOCK > data.size:
            return TRUNCATED_HEADER
        elif state[MEMBERS] == name_ends.size or state[NAME_BYTES] > names.size - name_room:
            return FULL
        else:
            code = take_header(
                data[at : at + BLOCK],
                object_size,
                state,
                payload.size,
                pending,
                shared,
                names,
                name_ends,
                offsets,
                sizes,
            )
        if code != MORE:
            return code
    if state[MODE] == _ENDED:
        return END
    if state[POSITION] >= object_size:
        # No zero blocks: a writer that was careless, but nothing is cut off.
        return DANGLING if state[PENDING] or state[MODE] != _HEADER else END
    return MORE
