r"""The file of one run: what it read, in which order, and what it learnt of the stores.

It only grows, piece by piece, so that a service that is killed has lost the last minute; a reader takes the
pieces up to the first that is not whole. Integers are little-endian.

    offset  bytes
    0       8       "FLHIST\0\1": the last byte is the version
    8       ...     pieces, one after the other

    piece
    0       4       kind: 1 objects, 2 reads, 3 summary
    4       4       n, the bytes of the payload, at most 16 MiB
    8       16      BLAKE2b-128 of kind, n and payload
    24      n       payload

    objects payload     zlib of msgpack [keys, rows]: `keys` uint64[k], the objects' keys; `rows` as in the protocol
                        (`ObjectRows`: URL, size, ETag and time of last change of each). Objects of a run are numbered
                        in the order of these.
    reads payload       zlib of msgpack [objects, chunks, traces, ticks]: four columns of r reads, in the order in which
                        they were asked for; uint32 object number, uint32 chunk of the object, uint16 trace (the
                        reader), uint32 tenths of a second since the run began
    summary payload     msgpack of `RunSummary`; the last one counts

No credentials are in it: options of stores never come here, and neither do URLs that may carry some (see `record`).
"""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, BinaryIO

import msgspec
import numpy as np
import numpy.typing as npt

from fastload.cache import syscalls
from fastload.errors import CacheError, ServiceError
from fastload.store.table import ObjectRows, ObjectTable

MAGIC = b"FLHIST\0\1"
OBJECTS, READS, SUMMARY = 1, 2, 3
PAYLOAD_BYTES_MAX = 16 << 20
# What a payload may be once unpacked: objects of a piece with the longest URLs that stores allow.
_UNPACKED_BYTES_MAX = 64 << 20
# Rows of a piece, so that one costs a few milliseconds to make.
OBJECTS_MAX, READS_MAX = 4096, 65536
# What a run may keep; and all of its pieces once unpacked, which is more than these take with long URLs.
RUN_OBJECTS_MAX, RUN_READS_MAX = 1 << 21, 1 << 22
_RUN_BYTES_MAX = 1 << 30

_HEAD = struct.Struct("<II16s")
# Level 3 is a quarter slower than level 1 and a tenth smaller; beyond it only time is added.
_ZLIB_LEVEL = 3

UInt32 = npt.NDArray[np.uint32]
UInt64 = npt.NDArray[np.uint64]


# Figures that a file may hold: others cannot be shown, nor reckoned with.
_Figure = Annotated[float, msgspec.Meta(ge=0, le=1e18)]
_Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e11)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]


class EndpointSummary(msgspec.Struct, frozen=True):
    """What was learnt of one endpoint of a store: see `request_limit.Learnt`. `first_byte_s` -1: it is unknown."""

    limit: _Count
    bytes_per_s: _Figure
    first_byte_s: Annotated[float, msgspec.Meta(ge=-1, le=1e11)]
    connection_bytes_per_s: _Figure
    throttled_at: _Count
    request_count: _Count = 0


class RunSummary(msgspec.Struct, frozen=True):
    """A run in a few figures. `began` is in seconds since 1970; the sources say where what it read came from.

    `trace_count` and `traces`, by kind of reader, have older names in the file. `left_out` counts reads that are not in
    the file: beyond what a run may keep, or of URLs that may hold secrets.
    """

    began: _Seconds = 0.0
    seconds: _Seconds = 0.0
    program: str = ""
    chunk_bytes: _Count = 0
    trace_count: _Count = msgspec.field(default=0, name="lane_count")
    read_count: _Count = 0
    read_bytes: _Count = 0
    left_out: _Count = 0
    object_count: _Count = 0
    object_bytes: _Count = 0
    traces: dict[str, _Count] = msgspec.field(default_factory=dict, name="lanes")
    endpoints: dict[str, EndpointSummary] = {}


class _ObjectsPiece(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    keys: bytes
    rows: ObjectRows


class _ReadsPiece(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    objects: bytes
    chunks: bytes
    traces: bytes
    ticks: bytes


@dataclass(frozen=True, slots=True, eq=False)
class Reads:
    """Reads in the order in which they were asked for, by column; see the module's text."""

    objects: UInt32
    chunks: UInt32
    traces: npt.NDArray[np.uint16]
    ticks: UInt32

    def __len__(self) -> int:
        return len(self.objects)

    def first(self, count: int) -> Reads:
        """So many of them, from the beginning."""
        return Reads(self.objects[:count], self.chunks[:count], self.traces[:count], self.ticks[:count])

    @classmethod
    def joined(cls, parts: list[Reads]) -> Reads:
        parts = parts or [cls(*(np.empty(0, dtype) for dtype in ("u4", "u4", "u2", "u4")))]
        columns = ("objects", "chunks", "traces", "ticks")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in columns))


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """A run as it was kept. `keys[i]` is the key of `objects[i]`."""

    name: str
    summary: RunSummary
    keys: UInt64
    objects: ObjectTable
    reads: Reads


def objects_piece(keys: UInt64, rows: ObjectRows) -> bytes:
    """At most `OBJECTS_MAX` objects as a piece."""
    return _packed(OBJECTS, _ObjectsPiece(keys.astype("<u8").tobytes(), rows))


def reads_piece(reads: Reads) -> bytes:
    """At most `READS_MAX` reads as a piece."""
    columns = (
        reads.objects.astype("<u4"),
        reads.chunks.astype("<u4"),
        reads.traces.astype("<u2"),
        reads.ticks.astype("<u4"),
    )
    return _packed(READS, _ReadsPiece(*(column.tobytes() for column in columns)))


def summary_piece(summary: RunSummary) -> bytes:
    return _piece(SUMMARY, msgspec.msgpack.encode(summary))


def _packed(kind: int, piece: msgspec.Struct) -> bytes:
    return _piece(kind, zlib.compress(msgspec.msgpack.encode(piece), _ZLIB_LEVEL))


def _piece(kind: int, payload: bytes) -> bytes:
    return _HEAD.pack(kind, len(payload), _digest(kind, payload)) + payload


def _digest(kind: int, payload: bytes) -> bytes:
    return hashlib.blake2b(struct.pack("<II", kind, len(payload)) + payload, digest_size=16).digest()


# Reading


def read_summary(path: Path) -> RunSummary | None:
    """The summary of the run in this file, without its reads; None where no service could have written it.

    OSError as the system gives it.
    """
    found = None
    with _open(path) as file:
        for kind, payload in _pieces(file, frozenset({SUMMARY})):
            if kind == SUMMARY:
                found = payload
    return None if found is None else _decoded_summary(found)


def read(path: Path) -> Run:
    """The run in this file; `CacheError` where it is damaged, OSError as the system gives it."""
    gathered, summary = _Gathered(), RunSummary()
    with _open(path) as file:
        for kind, payload in _pieces(file, frozenset({OBJECTS, READS, SUMMARY})):
            try:
                if kind == OBJECTS:
                    gathered.add_objects(msgspec.msgpack.decode(gathered.unpacked(payload), type=_ObjectsPiece))
                elif kind == READS:
                    gathered.add_reads(msgspec.msgpack.decode(gathered.unpacked(payload), type=_ReadsPiece))
                else:
                    summary = _decoded_summary(payload) or summary
            except (msgspec.MsgspecError, zlib.error, ValueError, ServiceError) as error:
                raise CacheError(f"the history of a run in {path} is damaged: {error}; remove the file") from error
    return Run(path.stem, summary, gathered.keys(), ObjectTable.joined(gathered.tables), Reads.joined(gathered.reads))


@dataclass(slots=True)
class _Gathered:
    """What a file has held so far, within bounds: ValueError beyond them."""

    tables: list[ObjectTable] = field(default_factory=list)
    key_parts: list[UInt64] = field(default_factory=list)
    reads: list[Reads] = field(default_factory=list)
    object_count: int = 0
    read_count: int = 0
    byte_count: int = 0  # once unpacked

    def unpacked(self, payload: bytes) -> bytes:
        data = _unpacked(payload)
        self.byte_count += len(data)
        _bound(self.byte_count, _RUN_BYTES_MAX, "bytes once unpacked")
        return data

    def add_objects(self, piece: _ObjectsPiece) -> None:
        table, keys = piece.rows.table(), np.frombuffer(piece.keys, "<u8").astype(np.uint64)
        if len(keys) != len(table):
            raise ValueError(f"{len(keys)} keys of {len(table)} objects")
        self.tables.append(table)
        self.key_parts.append(keys)
        self.object_count += len(table)
        _bound(self.object_count, RUN_OBJECTS_MAX, "objects")

    def add_reads(self, piece: _ReadsPiece) -> None:
        reads = _reads(piece, self.object_count)
        self.reads.append(reads)
        self.read_count += len(reads)
        _bound(self.read_count, RUN_READS_MAX, "reads")

    def keys(self) -> UInt64:
        return np.concatenate([np.empty(0, np.uint64), *self.key_parts])


def _bound(count: int, at_most: int, what: str) -> None:
    if count > at_most:
        raise ValueError(f"more than {at_most} {what}")


def _reads(piece: _ReadsPiece, object_count: int) -> Reads:
    columns = Reads(
        np.frombuffer(piece.objects, "<u4").astype(np.uint32),
        np.frombuffer(piece.chunks, "<u4").astype(np.uint32),
        np.frombuffer(piece.traces, "<u2").astype(np.uint16),
        np.frombuffer(piece.ticks, "<u4").astype(np.uint32),
    )
    if len({len(columns.objects), len(columns.chunks), len(columns.traces), len(columns.ticks)}) != 1:
        raise ValueError("columns of different lengths")
    if len(columns) and int(columns.objects.max()) >= object_count:
        raise ValueError(f"a read of object {int(columns.objects.max())} of {object_count}")
    return columns


def _decoded_summary(payload: bytes) -> RunSummary | None:
    try:
        return msgspec.msgpack.decode(payload, type=RunSummary)
    except msgspec.MsgspecError:
        return None


def _unpacked(payload: bytes) -> bytes:
    stream = zlib.decompressobj()
    data = stream.decompress(payload, _UNPACKED_BYTES_MAX)
    if not stream.eof:
        raise ValueError(f"a piece that is more than {_UNPACKED_BYTES_MAX} bytes, or not whole")
    return data


def _open(path: Path) -> BinaryIO:
    return open(syscalls.open(path, os.O_RDONLY), "rb")


def _pieces(file: BinaryIO, kinds: frozenset[int]) -> Iterator[tuple[int, bytes]]:
    """The whole pieces of these kinds, up to the first that is not whole: a writer was killed there, or still writes.

    Pieces of other kinds are passed over unseen.
    """
    if file.read(len(MAGIC)) != MAGIC:
        return
    end = syscalls.fstat(file.fileno()).st_size
    while len(head := file.read(_HEAD.size)) == _HEAD.size:
        kind, length, digest = _HEAD.unpack(head)
        if length > PAYLOAD_BYTES_MAX or file.tell() + length > end:
            return
        if kind not in kinds:
            file.seek(length, os.SEEK_CUR)
            continue
        payload = file.read(length)
        if len(payload) < length or _digest(kind, payload) != digest:
            return
        yield kind, payload
