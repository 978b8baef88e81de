"""The index of a shard that is a table, stored column by column: where each value lies.

A value is one piece of bytes, so that it is gathered as a member of a tar is, and no row is read for one of its
columns. An index takes 12 bytes a value. Keys are `<name of the shard>/<number of the row>`.

The stored form is documented byte by byte in docs/format.md ("Table index"). It is read from a cache that other
processes write, so nothing in it is believed, as with `shard_index`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from fastload.errors import ShardError
from fastload.formats.record_index import shard_name
from fastload.formats.shard_index import HEADER_BYTES

__all__ = ["MAGIC", "TableIndex", "stored_row_count"]

MAGIC = b"FLTABLEX"
VERSION = 1
# magic, checksum of all that follows; version, bytes of the layout; object size, rows, columns; zeros.
_HEADER = struct.Struct("<8sQIIQQQ16x")
_CHECKED_FROM = 16
assert _HEADER.size == HEADER_BYTES, "the service reads the headers of all kinds of index alike"

_LAYOUT_BYTES_MAX = 1 << 20


@dataclass(frozen=True, eq=False)
class TableIndex:
    """R rows of C columns. The value of row r in `columns[c]` is `size[c, r]` bytes at `offset[c, r]` of the object,
    whose size is `object_size`; an offset of -1: there is none. The arrays (int64[C, R] and uint32[C, R]) are
    read-only.

    `layout` says what the columns hold: a format's name and what else that needs, as `formats.record_reader` takes it.
    `name` is the shard's, the first part of its keys, in which the first row is number `first_number`.
    """

    layout: bytes
    columns: tuple[str, ...]
    offset: NDArray[np.int64]
    size: NDArray[np.uint32]
    object_size: int
    name: str
    first_number: int = 0

    def __post_init__(self) -> None:
        self.offset.flags.writeable = self.size.flags.writeable = False

    @property
    def sample_count(self) -> int:
        """The number of rows, R."""
        return int(self.offset.shape[1])

    @property
    def member_count(self) -> int:
        """The number of values."""
        return self.offset.size

    @property
    def reach(self) -> int:
        """Where the last of its bytes ends."""
        return int((self.offset + self.size).max(initial=0))

    @property
    def byte_count(self) -> int:
        """The memory that this index takes, for caches with a budget of bytes."""
        return 1024 + 2 * len(self.layout) + self.offset.nbytes + self.size.nbytes

    def key(self, sample: int) -> str:
        """The key of a row."""
        if not 0 <= sample < self.sample_count:
            raise IndexError(f"sample {sample} of {self.sample_count}")
        return f"{self.name}/{self.first_number + sample}"

    def fill_places(self, number_of: Callable[[str], int], first_chunk: int, places: NDArray[np.int64]) -> None:
        """As `ShardIndex.fill_places`."""
        places[:, 0] = first_chunk
        places[:, 1::2], places[:, 2::2] = -1, 0
        for number, column in enumerate(self.columns):
            at = number_of(column)
            if at >= 0:
                places[:, 1 + 2 * at], places[:, 2 + 2 * at] = self.offset[number], self.size[number]

    def __eq__(self, other: object) -> bool:
        """Whether both say the same."""
        return (
            isinstance(other, TableIndex)
            and (self.layout, self.object_size, self.name) == (other.layout, other.object_size, other.name)
            and np.array_equal(self.offset, other.offset)
            and np.array_equal(self.size, other.size)
        )

    __hash__ = None  # type: ignore[assignment]  # compared by its contents

    def to_bytes(self) -> bytes:
        """The stored form."""
        body = self.offset.astype("<i8").tobytes() + self.size.astype("<u4").tobytes() + self.layout
        counts = self.object_size, self.sample_count, len(self.columns)
        header = bytearray(_HEADER.pack(MAGIC, 0, VERSION, len(self.layout), *counts))
        digest = xxhash.xxh3_64(memoryview(header)[_CHECKED_FROM:])
        digest.update(body)
        struct.pack_into("<Q", header, 8, digest.intdigest())
        return bytes(header) + body

    @classmethod
    def from_bytes(
        cls, data: bytes, url: str, object_size: int, columns_of: Callable[[bytes], tuple[str, ...]]
    ) -> TableIndex:
        """The index that `to_bytes` stored; `columns_of` says which columns a layout has, or raises ShardError. Raises
        ShardError, naming `url`, for anything that is not exactly an index of an object of `object_size` bytes.
        """

        def require(holds: object, what: str) -> None:
            if not holds:
                raise ShardError(f"{url}: its stored index is damaged ({what}); drop it and read the shard")

        require(len(data) >= _HEADER.size, f"{len(data)} bytes are less than its header")
        magic, checksum, version, layout_bytes, size, rows, count = _HEADER.unpack_from(data)
        require(magic == MAGIC, f"it starts with {magic!r}")
        require(version == VERSION, f"version {version} where {VERSION} is known")
        found = xxhash.xxh3_64_intdigest(memoryview(data)[_CHECKED_FROM:])
        require(found == checksum, f"checksum {found:016x} where {checksum:016x} is stored")
        require(size == object_size, f"of an object of {size} bytes, not {object_size}")
        require(layout_bytes <= _LAYOUT_BYTES_MAX, f"a layout of {layout_bytes} bytes")
        length = _stored_bytes(layout_bytes, rows, count)
        require(len(data) == length, f"{len(data)} bytes where its counts need {length}")
        layout = data[_HEADER.size + 12 * rows * count :]
        try:
            columns = columns_of(layout)
        except ShardError as error:
            raise ShardError(f"{url}: its stored index is damaged ({error}); drop it and read the shard") from error
        require(len(columns) == count, f"{count} columns where its layout has {len(columns)}")
        offset = np.frombuffer(data, "<i8", rows * count, _HEADER.size).astype(np.int64).reshape(count, rows)
        sizes = np.frombuffer(data, "<u4", rows * count, _HEADER.size + 8 * rows * count).astype(np.uint32)
        sizes = sizes.reshape(count, rows)
        inside = (offset >= 0) & (offset <= object_size) & (sizes <= object_size - np.minimum(offset, object_size))
        inside |= (offset == -1) & (sizes == 0)
        require(inside.all(), "a value lies outside of the object")
        return cls(layout, columns, offset, sizes, object_size, shard_name(url))


def stored_row_count(header: bytes, length: int) -> int:
    """How many rows a stored index has, from its first `HEADER_BYTES` and the length of all of it; -1 where that is no
    such index.
    """
    if len(header) < _HEADER.size:
        return -1
    magic, _, version, layout_bytes, _, rows, count = _HEADER.unpack_from(header)
    fits = length == _stored_bytes(layout_bytes, rows, count)
    return int(rows) if magic == MAGIC and version == VERSION and fits else -1


def _stored_bytes(layout_bytes: int, rows: int, columns: int) -> int:
    # Python's integers: counts of any size cannot overflow here.
    return _HEADER.size + 12 * rows * columns + layout_bytes
