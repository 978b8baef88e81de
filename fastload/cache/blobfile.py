r"""The file that holds one small named value, such as the index of a shard.

    offset  bytes   what (integers are little-endian and unsigned)
    0       L       the data
    L       8       magic "FLBLOB1\\n", which is also the format version
    L + 8   8       L
    L + 16  8       XXH3-64 (seed 0) of the name, in UTF-8
    L + 24  8       XXH3-64 (seed 0) of the data
    L + 32  8       XXH3-64 (seed 0) of the trailer's first 32 bytes

As with chunks, a cut, a flipped bit and another blob's bytes are all found before the value is used. Written
and read through the page cache: blobs are small, few, and read once a run.
"""

from __future__ import annotations

import os
import stat
import struct
from pathlib import Path

from xxhash import xxh3_64_intdigest

from fastload.cache import syscalls
from fastload.cache.chunkfile import ChunkDamagedError, allocated_bytes, transfer

MAGIC = b"FLBLOB1\n"
_TRAILER = struct.Struct("<8sQQQ")
_CHECKSUM = struct.Struct("<Q")
TRAILER_BYTES = _TRAILER.size + _CHECKSUM.size


def file_bytes(length: int) -> int:
    """What `length` bytes of data take on disk, in whole pages."""
    return -(-(length + TRAILER_BYTES) // 4096) * 4096


def write(path: Path, name: str, data: bytes) -> int:
    """Make the file of `data` at `path`; returns its allocated bytes. OSError as the calls give it."""
    head = _TRAILER.pack(MAGIC, len(data), xxh3_64_intdigest(name.encode()), xxh3_64_intdigest(data))
    trailer = head + _CHECKSUM.pack(xxh3_64_intdigest(head))
    fd = syscalls.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        transfer(syscalls.pwritev, fd, (memoryview(data), memoryview(trailer)), "write")
        return max(allocated_bytes(syscalls.fstat(fd)), file_bytes(len(data)))
    finally:
        syscalls.close(fd)


def read(path: Path, name: str) -> bytes:
    """The data of the blob `name` at `path`; ChunkDamagedError where it is not what was written for it."""
    fd = syscalls.open(path, os.O_RDONLY)
    try:
        status = syscalls.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size < TRAILER_BYTES:
            raise ChunkDamagedError(f"no blob has a file of {status.st_size} bytes")
        content = bytearray(status.st_size)
        transfer(syscalls.preadv, fd, (memoryview(content),), "read")
    finally:
        syscalls.close(fd)
    data, trailer = bytes(content[:-TRAILER_BYTES]), bytes(content[-TRAILER_BYTES:])
    _check(trailer, name, data)
    return data


def read_head(path: Path, name: str, head_bytes: int) -> tuple[bytes, int]:
    """The first `head_bytes` of the blob's data, or all that it has, and the length of all its data.

    Only the trailer is verified, so that not all has to be read: callers must expect anything in the head.
    """
    fd = syscalls.open(path, os.O_RDONLY)
    try:
        status = syscalls.fstat(fd)
        length = status.st_size - TRAILER_BYTES
        if not stat.S_ISREG(status.st_mode) or length < 0:
            raise ChunkDamagedError(f"no blob has a file of {status.st_size} bytes")
        head, trailer = bytearray(min(head_bytes, length)), bytearray(TRAILER_BYTES)
        transfer(syscalls.preadv, fd, (memoryview(head),), "read")
        transfer(syscalls.preadv, fd, (memoryview(trailer),), "read", start=length)
    finally:
        syscalls.close(fd)
    _check_trailer(bytes(trailer), name, length)
    return bytes(head), length


def _check(trailer: bytes, name: str, data: bytes) -> None:
    if _check_trailer(trailer, name, len(data)) != xxh3_64_intdigest(data):
        raise ChunkDamagedError("the data's checksum differs")


def _check_trailer(trailer: bytes, name: str, data_bytes: int) -> int:
    """The checksum that the data should have."""
    head = trailer[: _TRAILER.size]
    if _CHECKSUM.pack(xxh3_64_intdigest(head)) != trailer[_TRAILER.size :]:
        raise ChunkDamagedError("the trailer's checksum differs")
    magic, length, name_hash, data_hash = _TRAILER.unpack(head)
    if magic != MAGIC or length != data_bytes:
        raise ChunkDamagedError(f"it is no blob of {data_bytes} bytes")
    if name_hash != xxh3_64_intdigest(name.encode()):
        raise ChunkDamagedError("it is another blob")
    return int(data_hash)
