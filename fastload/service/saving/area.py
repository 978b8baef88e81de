r"""Checkpoints on disk: what a service holds of saves until it is in the store, and for the next start after that.

It is no cache: what is here may be the only copy. So neither `Cache.clear` nor eviction knows this folder, and all is
on the disk itself before the service says so. A segment's file is the object to be, byte by byte.

    checkpoints/<attempt>-r00000-0000.safetensors    a segment of a rank
    checkpoints/<attempt>-r00000.part                its part record
    checkpoints/<attempt>-r00000.log                 what has become of it; without one the others are rubbish

A log only grows, record by record, so that a service that is killed has lost nothing that it has said; a reader takes
the records up to the first that is not whole. Integers are little-endian.

    offset  bytes
    0       8       "FLSAVE\0\1": the last byte is the version
    8       ...     records, one after the other

    record
    0       4       kind: 1 kept, 2 stored, 3 committed
    4       4       n, the bytes of the payload, at most 1 MiB
    8       16      BLAKE2b-128 of kind, n and payload
    24      n       payload

    kept payload        msgpack of `Kept`: segments and part record are on the disk
    stored payload      empty: segments and part record are in the store
    committed payload   empty: there is nothing left to do

No credentials are in it. Methods take as long as the disk does, and are for threads; OSError as the system gives it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
from xxhash import xxh3_64_intdigest

from fastload.cache import syscalls
from fastload.cache.chunkfile import transfer
from fastload.checkpoint.records import is_attempt
from fastload.checkpoint.segments import BLOCK_BYTES, PAGE_BYTES, damaged_block
from fastload.errors import CacheError
from fastload.protocol import Begin

FOLDER = "checkpoints"
MAGIC = b"FLSAVE\0\1"
KEPT, STORED, COMMITTED = 1, 2, 3
_HEAD = struct.Struct("<II16s")
_PAYLOAD_BYTES_MAX = 1 << 20
# What one call writes: so much of a checkpoint is in the kernel's hands at a time, and of whole blocks.
_WRITE_BYTES = 16 << 20
# A file system is not filled to its last byte: others live there as well.
_LEFT_FREE_BYTES = 256 << 20
_NAME = re.compile(r"([0-9a-f]{16}-r[0-9]{5,7})(?:-[0-9]{4,7}\.safetensors|\.part|\.log)")
_FOREIGN: Literal["foreign"] = "foreign"
_log = logging.getLogger("fastload.service")
_NOT_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP)


def name_of(attempt: str, rank: int) -> str:
    """What the files of a rank's save are called."""
    return f"{attempt}-r{rank:05d}"


class Kept(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """Whose save it is: a rank's part of the attempt that is to become the checkpoint in `folder`, a URL that ends in a
    slash, of a store at `endpoint`. `commits`: once it is there the attempt is to be committed.
    """

    folder: str
    attempt: str
    rank: int
    commits: bool
    endpoint: str
    sizes: tuple[int, ...]  # of the segments
    part_sum: int  # XXH3-64 of the part record
    at_s: float = 0.0  # since 1970
    begin: Begin | None = None  # the attempt, which may have begun

    @property
    def name(self) -> str:
        """What its files are called."""
        return name_of(self.attempt, self.rank)

    @property
    def byte_count(self) -> int:
        return sum(self.sizes)


@dataclass(frozen=True, slots=True)
class Found:
    """A save that an earlier service has kept, and the last thing that became of it."""

    kept: Kept
    kind: int


class Area:
    """See the module's text. Of one save one thread at a time."""

    def __init__(self, root: Path) -> None:
        """In the cache directory that is reached by `root`."""
        self.path = root / FOLDER

    def scan(self) -> list[Found]:
        """What is kept, oldest first; all that belongs to no whole log is removed. What another version of fastload has
        kept is left to that.
        """
        try:
            names = [entry.name for entry in syscalls.scandir(self.path)]
        except FileNotFoundError:
            return []
        logs = {name: log for name in names if name.endswith(".log") and (log := self._read_log(name)) is not None}
        whole = {name.removesuffix(".log") for name in logs}
        for name, log in logs.items():
            if log == _FOREIGN:
                _log.warning(
                    "%s is of another version of fastload, and left alone: start that version with this cache, or "
                    "delete the files of that name",
                    self.path / name,
                )
        for name in names:
            match = _NAME.fullmatch(name)
            if match is not None and match[1] not in whole:
                syscalls.unlink(self.path / name)
        return sorted((log for log in logs.values() if isinstance(log, Found)), key=lambda log: log.kept.at_s)

    def make(self) -> None:
        """Have the folder."""
        with contextlib.suppress(FileExistsError):
            syscalls.mkdir(self.path, 0o700)
            _sync_folder(self.path.parent)

    def free_bytes(self) -> int:
        """What may yet be written."""
        status = syscalls.statvfs(self.path)
        return max(0, status.f_bavail * status.f_frsize - _LEFT_FREE_BYTES)

    def write_segment(
        self, name: str, number: int, data: memoryview, before: Callable[[int], object] = lambda end: None
    ) -> None:
        """Put a segment on the disk; past the page cache where its memory begins at a page and the file system can.
        `before(end)` is called before what comes before `end` is written.
        """
        path = self._segment(name, number)
        try:
            _write(path, data, os.O_DIRECT, before)
        except OSError as error:
            if error.errno not in _NOT_DIRECT:
                raise
            _write(path, data, 0, before)

    def keep(self, kept: Kept, part: bytes) -> None:
        """All segments are there: put the part record beside them, and say so for all time."""
        _write(self.path / f"{kept.name}.part", memoryview(part), 0)
        log = MAGIC + _record(KEPT, msgspec.msgpack.encode(kept))
        _write(self.path / f"{kept.name}.log", memoryview(log), 0)
        _sync_folder(self.path)

    def note(self, name: str, kind: int) -> None:
        """Write down what has become of a save that is kept."""
        path = self.path / f"{name}.log"
        whole = sum(_HEAD.size + len(payload) for _, payload in _records(syscalls.read_file(path)))
        fd = syscalls.open(path, os.O_WRONLY)
        try:
            # Over what a writer that was killed has left, which would hide it.
            transfer(syscalls.pwritev, fd, (memoryview(_record(kind, b"")),), "write", len(MAGIC) + whole)
            syscalls.fsync(fd)
        finally:
            syscalls.close(fd)

    def remove(self, name: str) -> None:
        """The log last: what is in the way of removing the rest leaves it as it was. What is gone is gone already."""
        names = [entry.name for entry in syscalls.scandir(self.path)]
        mine = [each for each in names if (match := _NAME.fullmatch(each)) is not None and match[1] == name]
        for each in sorted(mine, key=lambda each: each.endswith(".log")):
            with contextlib.suppress(FileNotFoundError):
                syscalls.unlink(self.path / each)

    def read_part(self, kept: Kept) -> bytes:
        """The part record; CacheError where it is not what was written."""
        data = syscalls.read_file(self.path / f"{kept.name}.part")
        if xxh3_64_intdigest(data) != kept.part_sum:
            raise CacheError(f"{self.path / kept.name}.part is damaged: save again")
        return data

    @contextlib.contextmanager
    def segment(self, kept: Kept, number: int, sums: bytes) -> Iterator[memoryview]:
        """The bytes of a segment, for the block. CacheError where they are not what was written, by these checksums of
        its blocks.
        """
        path = self._segment(kept.name, number)
        fd = syscalls.open(path, os.O_RDONLY)
        try:
            if syscalls.fstat(fd).st_size != kept.sizes[number]:
                raise CacheError(
                    f"{path} is damaged: it has {syscalls.fstat(fd).st_size} of {kept.sizes[number]} bytes; save again"
                )
            data = bytearray(kept.sizes[number])
            view = memoryview(data)
            transfer(syscalls.preadv, fd, (view,), "read")
            block = damaged_block(sums, 0, view)
            if block is not None:
                raise CacheError(
                    f"{path} is damaged: the {BLOCK_BYTES} bytes from {block * BLOCK_BYTES} on are not what was "
                    "written; save again"
                )
            yield view
        finally:
            syscalls.close(fd)

    def _segment(self, name: str, number: int) -> Path:
        return self.path / f"{name}-{number:04d}.safetensors"

    def _read_log(self, name: str) -> Found | Literal["foreign"] | None:
        data = syscalls.read_file(self.path / name)
        if data.startswith(MAGIC[:-1]) and len(data) >= len(MAGIC) and not data.startswith(MAGIC):
            return _FOREIGN
        kept, last = None, 0
        for kind, payload in _records(data):
            if kind == KEPT:
                try:
                    kept = msgspec.msgpack.decode(payload, type=Kept)
                except msgspec.MsgspecError:  # it is as it was written
                    return _FOREIGN
            last = kind
        if kept is None or not is_attempt(kept.attempt) or f"{kept.name}.log" != name or not kept.folder.endswith("/"):
            return None
        return Found(kept, last)


def _record(kind: int, payload: bytes) -> bytes:
    return _HEAD.pack(kind, len(payload), _digest(kind, payload)) + payload


def _digest(kind: int, payload: bytes) -> bytes:
    return hashlib.blake2b(struct.pack("<II", kind, len(payload)) + payload, digest_size=16).digest()


def _records(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Those that are whole, up to the first that is not: a writer was killed there."""
    if not data.startswith(MAGIC):
        return
    at = len(MAGIC)
    while len(data) - at >= _HEAD.size:
        kind, length, digest = _HEAD.unpack_from(data, at)
        payload = data[at + _HEAD.size : at + _HEAD.size + length]
        if length > _PAYLOAD_BYTES_MAX or len(payload) < length or _digest(kind, payload) != digest:
            return
        yield kind, payload
        at += _HEAD.size + length


def _write(path: Path, data: memoryview, flags: int, before: Callable[[int], object] = lambda end: None) -> None:
    """Make the file, and have it on the disk."""
    fd = syscalls.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | flags)
    try:
        body = len(data) // PAGE_BYTES * PAGE_BYTES if flags else len(data)
        for start in range(0, body, _WRITE_BYTES):
            end = min(start + _WRITE_BYTES, body)
            before(end)
            transfer(syscalls.pwritev, fd, (data[start:end],), "write", start)
        if body < len(data):  # a direct write is of whole pages
            with syscalls.mmap_scratch(PAGE_BYTES) as page, memoryview(page) as view:
                view[: len(data) - body] = data[body:]
                transfer(syscalls.pwritev, fd, (view,), "write", body)
            syscalls.ftruncate(fd, len(data))
        syscalls.fsync(fd)
    finally:
        syscalls.close(fd)


def _sync_folder(path: Path) -> None:
    fd = syscalls.open_directory(path)
    try:
        syscalls.fsync(fd)
    finally:
        syscalls.close(fd)
