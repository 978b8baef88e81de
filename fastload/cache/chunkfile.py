r"""The file that holds one chunk on disk.

It has to tell damage of every kind (a flipped bit, a cut, another chunk's bytes under this name) before a
byte of it is used, and be written and read with direct I/O straight from and into the arena. So everything is
in units of 4 KiB, the data comes first, and what describes it comes last, in the same write:

    offset  bytes     what
    0       L         the data
    L       P - L     zeros, up to P = L rounded up to 4096
    P       T         the trailer, T = 64 + 8 n rounded up to 4096, where n = ceil(L / 65536)

    in the trailer (integers are little-endian and unsigned):
    0       8         magic "FLCHUNK\\n"
    8       4         format version, 1
    12      4         bytes a block, 65536
    16      16        object id of the key
    32      8         index of the key
    40      8         L, the length of the data
    48      8         n, the number of blocks
    56      8 n       XXH3-64 (seed 0) of each block of 65536 bytes of the data; the last may be shorter
    56+8n   ...       zeros
    T - 8   8         XXH3-64 (seed 0) of the trailer's first T - 8 bytes

The size of the file gives P and T, since n is the same for every L that rounds up to P: no header is needed
to find the trailer, and a file that was cut has either an impossible size or no trailer where one belongs.
The data is covered by the blocks' checksums, the padding must be zero, the trailer has its own checksum: no
bit is uncovered.

All but the last page of the data moves between the caller's memory and the file without a copy. That last
page goes through a scratch page in front of the trailer, so that the caller's buffer is neither written nor
read past the data, and one system call does it all.

There is no fsync: after a crash a chunk may be damaged, which reading finds. Space is not preallocated
either: the file is one direct write, which allocates all of it at once; a fallocate before it cost 0.01
CPU-seconds a GB and gained nothing.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import stat
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from xxhash import xxh3_64_intdigest

from fastload.cache import syscalls
from fastload.cache.key import ChunkKey

BLOCK_BYTES = 64 << 10
PAGE_BYTES = 4096
VERSION = 1
MAGIC = b"FLCHUNK\n"

_HEAD = struct.Struct("<8sII16sQQQ")
_CHECKSUM = struct.Struct("<Q")
# Not every file system does direct I/O: some refuse the flag, some the first transfer.
_NOT_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP)


class ChunkDamagedError(Exception):
    """The file is not what was written for this key; the message says in what."""


@dataclass(frozen=True, slots=True)
class ChunkLayout:
    """Where things lie in a file: P (`padded_bytes`), T (`trailer_bytes`) and the number of blocks."""

    padded_bytes: int
    trailer_bytes: int
    block_count: int

    @property
    def file_bytes(self) -> int:
        return self.padded_bytes + self.trailer_bytes

    @property
    def direct_bytes(self) -> int:
        """How much of the data moves without a copy: all but its last page."""
        return max(0, self.padded_bytes - PAGE_BYTES)


def layout(length: int) -> ChunkLayout:
    block_count = -(-length // BLOCK_BYTES)
    return ChunkLayout(_round_up(length), _round_up(_HEAD.size + 8 * block_count + _CHECKSUM.size), block_count)


@lru_cache(1024)  # most files of a cache have one size
def layout_of_file(file_bytes: int) -> ChunkLayout | None:
    """The layout of a file of this size, or None where no chunk gives such a file."""
    # The data is no longer than the file, which bounds the trailer from above, and that the data from below.
    most = layout(file_bytes).trailer_bytes
    least = layout(max(0, file_bytes - most)).trailer_bytes
    for trailer_bytes in range(least, min(most, file_bytes) + 1, PAGE_BYTES):
        found = layout(file_bytes - trailer_bytes)
        if found.file_bytes == file_bytes:
            return found
    return None


def write(path: Path, key: ChunkKey, data: memoryview) -> int:
    """Make the file of `data` (uint8, contiguous) at `path`; returns its allocated bytes.

    Direct where `data` starts on a page and the file system can, else through the page cache. OSError as the
    calls give it; then the file may be there in part, and is the caller's to remove.
    """
    shape = layout(len(data))
    tail = syscalls.mmap_scratch(shape.file_bytes - shape.direct_bytes)
    with tail, memoryview(tail) as tail_view:
        _fill_tail(tail, key, data, shape)
        with data[: shape.direct_bytes] as body:
            if is_page_aligned(data):
                try:
                    return _write_parts(path, (body, tail_view), os.O_DIRECT)
                except OSError as error:
                    if error.errno not in _NOT_DIRECT:
                        raise
            return _write_parts(path, (body, tail_view), 0)


def read_into(path: Path, key: ChunkKey, out: memoryview) -> int:
    """Read the chunk `key` from `path` into the start of `out` (uint8), verified; returns its length.

    `ChunkDamagedError` where the file is not exactly what was written for `key`, or holds more than `out` can
    take; OSError as the calls give it. `out` holds nothing of use after either.
    """
    if is_page_aligned(out):
        try:
            return _read_file(path, key, out, os.O_DIRECT)
        except OSError as error:
            if error.errno not in _NOT_DIRECT:
                raise
    return _read_file(path, key, out, 0)


def block_checksums(data: memoryview) -> list[int]:
    """The XXH3-64 of each block of `data`."""
    return [xxh3_64_intdigest(data[start : start + BLOCK_BYTES]) for start in range(0, len(data), BLOCK_BYTES)]


def is_page_aligned(view: memoryview) -> bool:
    """Whether the memory starts on a page, as direct I/O wants it."""
    return _address(view) % PAGE_BYTES == 0


def _address(view: memoryview) -> int:
    if not len(view):
        return 0
    if view.readonly:
        return 1  # its address is not to be had without a copy; such memory goes through the page cache
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def _round_up(count: int) -> int:
    return -(-count // PAGE_BYTES) * PAGE_BYTES


def _fill_tail(tail: mmap.mmap, key: ChunkKey, data: memoryview, shape: ChunkLayout) -> None:
    """The last page of the data and the trailer, into `tail`, which is zeroed memory."""
    rest = data[shape.direct_bytes :]
    tail[: len(rest)] = rest
    start = shape.padded_bytes - shape.direct_bytes
    _HEAD.pack_into(tail, start, MAGIC, VERSION, BLOCK_BYTES, key.object_id, key.index, len(data), shape.block_count)
    struct.pack_into(f"<{shape.block_count}Q", tail, start + _HEAD.size, *block_checksums(data))
    checksum_at = len(tail) - _CHECKSUM.size
    _CHECKSUM.pack_into(tail, checksum_at, xxh3_64_intdigest(tail[start:checksum_at]))


def _write_parts(path: Path, parts: Sequence[memoryview], flags: int) -> int:
    fd = syscalls.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | flags)
    try:
        transfer(syscalls.pwritev, fd, parts, "write")
        return allocated_bytes(syscalls.fstat(fd))
    finally:
        syscalls.close(fd)


def _read_file(path: Path, key: ChunkKey, out: memoryview, flags: int) -> int:
    fd = syscalls.open(path, os.O_RDONLY | flags)
    try:
        shape = _layout_on_disk(fd, len(out))
        tail = syscalls.mmap_scratch(shape.file_bytes - shape.direct_bytes)
        with tail, memoryview(tail) as tail_view:
            with out[: shape.direct_bytes] as body:
                transfer(syscalls.preadv, fd, (body, tail_view), "read")
            return _take_tail(tail, key, out, shape)
    finally:
        syscalls.close(fd)


def _layout_on_disk(fd: int, room: int) -> ChunkLayout:
    status = syscalls.fstat(fd)
    shape = layout_of_file(status.st_size) if stat.S_ISREG(status.st_mode) else None
    if shape is None:
        raise ChunkDamagedError(f"no chunk has a file of {status.st_size} bytes")
    if shape.padded_bytes and shape.direct_bytes >= room:
        raise ChunkDamagedError(f"its {shape.padded_bytes} bytes do not fit a chunk of {room} bytes")
    return shape


def _take_tail(tail: mmap.mmap, key: ChunkKey, out: memoryview, shape: ChunkLayout) -> int:
    """Check the trailer, move the data's last page to `out` and verify the data; returns its length."""
    start = shape.padded_bytes - shape.direct_bytes
    length = _check_trailer(tail[start:], key, shape)
    rest = length - shape.direct_bytes
    if length > len(out):
        raise ChunkDamagedError(f"its {length} bytes do not fit a chunk of {len(out)} bytes")
    if any(tail[rest:start]):
        raise ChunkDamagedError("the padding after the data is not zero")
    out[shape.direct_bytes : length] = tail[:rest]
    expected = struct.unpack_from(f"<{shape.block_count}Q", tail, start + _HEAD.size)
    _check_blocks(out[:length], expected)
    return length


def _check_trailer(trailer: bytes, key: ChunkKey, shape: ChunkLayout) -> int:
    """The length of the data, once the trailer is known to be whole, of this version, and this key's."""
    (checksum,) = _CHECKSUM.unpack_from(trailer, len(trailer) - _CHECKSUM.size)
    if checksum != xxh3_64_intdigest(trailer[: -_CHECKSUM.size]):
        raise ChunkDamagedError("the trailer's checksum differs")
    magic, version, block_bytes, object_id, index, length, block_count = _HEAD.unpack_from(trailer)
    if (magic, version, block_bytes) != (MAGIC, VERSION, BLOCK_BYTES):
        raise ChunkDamagedError(f"it is no chunk of format version {VERSION}")
    if (object_id, index) != (key.object_id, key.index):
        raise ChunkDamagedError(f"it holds {object_id.hex()}-{index:08x}")
    if layout(length) != shape or block_count != shape.block_count:
        raise ChunkDamagedError(f"its length {length} does not fit its size {shape.file_bytes}")
    return int(length)


def _check_blocks(data: memoryview, expected: Sequence[int]) -> None:
    found = block_checksums(data)
    if found != list(expected):
        block = next(number for number, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1])
        raise ChunkDamagedError(f"the checksum of the block at offset {block * BLOCK_BYTES} differs")


def transfer(
    call: Callable[[int, Sequence[memoryview], int], int],
    fd: int,
    parts: Sequence[memoryview],
    verb: str,
    start: int = 0,
) -> None:
    """Move all of `parts` from or to the file's bytes from `start`, however little the call moves at a time."""
    left = [part for part in parts if len(part)]
    done = 0
    while left:
        moved = call(fd, left, start + done)
        if moved == 0:
            raise OSError(errno.EIO, f"could {verb} only {done} bytes")
        done += moved
        while left and moved >= len(left[0]):
            moved -= len(left.pop(0))
        if moved:
            left[0] = left[0][moved:]


def allocated_bytes(status: os.stat_result) -> int:
    """What a file takes on disk; never below its size, since compression shows late and may be undone."""
    return max(status.st_blocks * 512, status.st_size)
