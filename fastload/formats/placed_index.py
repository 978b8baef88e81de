"""What the indexes of records and of tables share: where values lie in a shard, what they hold, and their stored form.

The stored forms are documented byte by byte in docs/format.md ("Record index", "Table index"). They are read from a
cache that other processes write, so nothing in them is believed, as with `shard_index`.
"""

from __future__ import annotations

import struct
from typing import ClassVar, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from fastload.errors import ShardError
from fastload.formats.shard_index import HEADER_BYTES

RECORD_MAGIC, TABLE_MAGIC = b"FLRECRDX", b"FLTABLEX"
VERSION = 1
# magic, checksum of all that follows; version, bytes of the layout; object size, rows, columns (0: of records); zeros.
_HEADER = struct.Struct("<8sQIIQQQ16x")
_CHECKED_FROM = 16
assert _HEADER.size == HEADER_BYTES, "the service reads the headers of all kinds of index alike"

_LAYOUT_BYTES_MAX = 1 << 20


class PlacedIndex:
    """`offset` (int64) and `size` (uint32) of each value in the object, whose size is `object_size`: of R records
    [R], of a table of C columns [C, R]. The arrays are read-only.

    `layout` says what the values hold: a format's name and what else that needs, as `formats.record_reader` takes it.
    `name` is the shard's, the first part of its keys, in which the first sample is number `first_number`.
    """

    MAGIC: ClassVar[bytes]
    layout: bytes
    offset: NDArray[np.int64]
    size: NDArray[np.uint32]
    object_size: int
    name: str
    first_number: int

    def __post_init__(self) -> None:
        self.offset.flags.writeable = self.size.flags.writeable = False

    @property
    def sample_count(self) -> int:
        """The number of samples, R."""
        return int(self.offset.shape[-1])

    @property
    def member_count(self) -> int:
        """The number of values: a record is one run of bytes."""
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
        """The key of a sample."""
        if not 0 <= sample < self.sample_count:
            raise IndexError(f"sample {sample} of {self.sample_count}")
        return f"{self.name}/{self.first_number + sample}"

    def __eq__(self, other: object) -> bool:
        """Whether both say the same."""
        return (
            isinstance(other, PlacedIndex)
            and (self.MAGIC, self.layout, self.object_size, self.name)
            == (other.MAGIC, other.layout, other.object_size, other.name)
            and np.array_equal(self.offset, other.offset)
            and np.array_equal(self.size, other.size)
        )

    __hash__ = None  # type: ignore[assignment]  # compared by its contents

    def to_bytes(self) -> bytes:
        """The stored form."""
        body = self.offset.astype("<i8").tobytes() + self.size.astype("<u4").tobytes() + self.layout
        columns = self.offset.shape[0] if self.offset.ndim > 1 else 0
        counts = self.object_size, self.sample_count, columns
        header = bytearray(_HEADER.pack(self.MAGIC, 0, VERSION, len(self.layout), *counts))
        digest = xxhash.xxh3_64(memoryview(header)[_CHECKED_FROM:])
        digest.update(body)
        struct.pack_into("<Q", header, 8, digest.intdigest())
        return bytes(header) + body


class Stored(NamedTuple):
    """What a stored index says; `offset` and `size` are flat."""

    layout: bytes
    rows: int
    columns: int
    offset: NDArray[np.int64]
    size: NDArray[np.uint32]


def require(holds: object, url: str, what: str) -> None:
    """Raise ShardError unless that holds of the stored index of the shard at `url`."""
    if not holds:
        raise ShardError(f"{url}: its stored index is damaged ({what}); drop it and read the shard")


def read_stored(data: bytes, magic: bytes, url: str, object_size: int) -> Stored:
    """What `PlacedIndex.to_bytes` stored; whether values lie in the object is not checked here. ShardError for what is
    no index of this magic, and of an object of `object_size` bytes.
    """
    require(len(data) >= _HEADER.size, url, f"{len(data)} bytes are less than its header")
    found_magic, checksum, version, layout_bytes, size, rows, columns = _HEADER.unpack_from(data)
    require(found_magic == magic, url, f"it starts with {found_magic!r}")
    require(version == VERSION, url, f"version {version} where {VERSION} is known")
    found = xxhash.xxh3_64_intdigest(memoryview(data)[_CHECKED_FROM:])
    require(found == checksum, url, f"checksum {found:016x} where {checksum:016x} is stored")
    require(size == object_size, url, f"of an object of {size} bytes, not {object_size}")
    require(layout_bytes <= _LAYOUT_BYTES_MAX, url, f"a layout of {layout_bytes} bytes")
    is_of_records = magic != TABLE_MAGIC
    require(columns == 0 or not is_of_records, url, f"{columns} columns of records")
    count = rows if is_of_records else rows * columns
    length = _HEADER.size + 12 * count + layout_bytes
    require(len(data) == length, url, f"{len(data)} bytes where its counts need {length}")
    offset = np.frombuffer(data, "<i8", count, _HEADER.size).astype(np.int64)
    sizes = np.frombuffer(data, "<u4", count, _HEADER.size + 8 * count).astype(np.uint32)
    return Stored(data[_HEADER.size + 12 * count :], rows, columns, offset, sizes)


def stored_placed_count(header: bytes, length: int) -> int:
    """How many samples a stored index has, from its first `HEADER_BYTES` and the length of all of it; -1 where that is
    none of these.
    """
    if len(header) < _HEADER.size:
        return -1
    magic, _, version, layout_bytes, _, rows, columns = _HEADER.unpack_from(header)
    # Python's integers: counts of any size cannot overflow here.
    count = {RECORD_MAGIC: rows, TABLE_MAGIC: rows * columns}.get(magic, -1)
    fits = length == _HEADER.size + 12 * count + layout_bytes
    return int(rows) if count >= 0 and version == VERSION and fits else -1
