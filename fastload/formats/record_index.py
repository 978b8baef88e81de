"""The index of a shard whose samples are records: where each begins and how long it is, and how a record is laid out.

What lies where in a record is not in the index but in the record itself, and read when it is gathered anyway (see
`records`). So an index takes 12 bytes a sample, whatever the number of columns. Samples have no keys of their own: a
key is `<name of the shard>/<number of the sample>`.

The stored form is documented byte by byte in docs/format.md ("Record index"). It is read from a cache that other
processes write, so nothing in it is believed, as with `shard_index`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np
import xxhash
from numpy.typing import NDArray

from fastload.errors import ShardError
from fastload.formats.shard_index import HEADER_BYTES
from fastload.store.packing import unpacked_name

__all__ = ["MAGIC", "RECORD", "Described", "ListedShard", "RecordIndex", "shard_name", "stored_record_count"]

RECORD = ""
"""The one column that gathering knows of such shards: all of a record."""

MAGIC = b"FLRECRDX"
VERSION = 1
# magic, checksum of all that follows; version, bytes of the layout; object size, samples; zeros.
_HEADER = struct.Struct("<8sQIIQQ24x")
_CHECKED_FROM = 16
assert _HEADER.size == HEADER_BYTES, "the service reads the headers of both kinds of index alike"

_LAYOUT_BYTES_MAX = 1 << 20


@dataclass(frozen=True, eq=False)
class RecordIndex:
    """S records. Record s is `size[s]` bytes at `offset[s]` of the object, whose size is `object_size`. The arrays
    (int64[S] and uint32[S]) are read-only.

    Records of a piece begin in it, and may end in those behind it: offsets count from its start.

    `layout` says how a record is read: a format's name and what else that needs, as `formats.record_reader` takes it.
    `name` is the shard's, the first part of its keys, in which the first record is number `first_number`.
    """

    layout: bytes
    offset: NDArray[np.int64]
    size: NDArray[np.uint32]
    object_size: int
    name: str
    first_number: int = 0

    def __post_init__(self) -> None:
        self.offset.flags.writeable = self.size.flags.writeable = False

    @property
    def sample_count(self) -> int:
        """The number of samples, S."""
        return len(self.offset)

    @property
    def member_count(self) -> int:
        """As many: a sample is one run of bytes."""
        return len(self.offset)

    @property
    def reach(self) -> int:
        """Where the last of its bytes ends."""
        return int((self.offset + self.size).max()) if len(self.offset) else 0

    @property
    def byte_count(self) -> int:
        """The memory that this index takes, for caches with a budget of bytes."""
        return 1024 + len(self.layout) + self.offset.nbytes + self.size.nbytes

    def key(self, sample: int) -> str:
        """The key of a sample."""
        if not 0 <= sample < self.sample_count:
            raise IndexError(f"sample {sample} of {self.sample_count}")
        return f"{self.name}/{self.first_number + sample}"

    def fill_places(self, number_of: Callable[[str], int], first_chunk: int, places: NDArray[np.int64]) -> None:
        """As `ShardIndex.fill_places`; the one column is `RECORD`."""
        places[:, 0] = first_chunk
        places[:, 1::2], places[:, 2::2] = -1, 0
        at = number_of(RECORD)
        if at >= 0:
            places[:, 1 + 2 * at], places[:, 2 + 2 * at] = self.offset, self.size

    def __eq__(self, other: object) -> bool:
        """Whether both say the same."""
        return (
            isinstance(other, RecordIndex)
            and (self.layout, self.object_size, self.name) == (other.layout, other.object_size, other.name)
            and np.array_equal(self.offset, other.offset)
            and np.array_equal(self.size, other.size)
        )

    __hash__ = None  # type: ignore[assignment]  # compared by its contents

    def to_bytes(self) -> bytes:
        """The stored form."""
        body = self.offset.astype("<i8").tobytes() + self.size.astype("<u4").tobytes() + self.layout
        header = bytearray(_HEADER.pack(MAGIC, 0, VERSION, len(self.layout), self.object_size, self.sample_count))
        digest = xxhash.xxh3_64(memoryview(header)[_CHECKED_FROM:])
        digest.update(body)
        struct.pack_into("<Q", header, 8, digest.intdigest())
        return bytes(header) + body

    @classmethod
    def from_bytes(
        cls, data: bytes | bytearray | memoryview, url: str, object_size: int, start: int = 0, reach_max: int = 0
    ) -> RecordIndex:
        """The index that `to_bytes` stored. Raises ShardError, naming `url`, for anything that is not exactly an index
        of an object of `object_size` bytes, or of a piece of so many that begins at `start`, and whose records end at
        `reach_max` at the latest.
        """
        reach_max = max(reach_max, object_size)
        data = bytes(data)

        def require(holds: object, what: str) -> None:
            if not holds:
                raise ShardError(f"{url}: its stored index is damaged ({what}); drop it and read the shard")

        require(len(data) >= _HEADER.size, f"{len(data)} bytes are less than its header")
        magic, checksum, version, layout_bytes, size, samples = _HEADER.unpack_from(data)
        require(magic == MAGIC, f"it starts with {magic!r}")
        require(version == VERSION, f"version {version} where {VERSION} is known")
        found = xxhash.xxh3_64_intdigest(memoryview(data)[_CHECKED_FROM:])
        require(found == checksum, f"checksum {found:016x} where {checksum:016x} is stored")
        require(size == object_size, f"of an object of {size} bytes, not {object_size}")
        require(layout_bytes <= _LAYOUT_BYTES_MAX, f"a layout of {layout_bytes} bytes")
        length = _stored_bytes(layout_bytes, samples)
        require(len(data) == length, f"{len(data)} bytes where its counts need {length}")
        offset = np.frombuffer(data, "<i8", samples, _HEADER.size).astype(np.int64)
        sizes = np.frombuffer(data, "<u4", samples, _HEADER.size + 8 * samples).astype(np.uint32)
        inside = (offset >= 0) & (offset <= object_size) & (sizes <= reach_max - np.minimum(offset, object_size))
        require(inside.all(), "a record lies outside of the object")
        return cls(data[_HEADER.size + 12 * samples :], offset, sizes, object_size, shard_name(url, start))


class ListedShard(NamedTuple):
    """What a folder's index says of a shard: its size is one of `sizes`, any where there are none. One that is packed
    has `unpacked_bytes`, -1 where the index does not say how many; `packing` says how, where its name does not.
    """

    name: str
    sizes: tuple[int, ...]
    samples: int
    unpacked_bytes: int = -1
    packing: str = ""
    is_digested: bool = False  # the index has digests of it


class Described(NamedTuple):
    """What reading a shard needs of the folder's index: how its samples are laid out, where the shard itself does not
    say it, and digests of what is in it, by algorithm.
    """

    layout: bytes = b""
    digests: Mapping[str, str] = {}


def shard_name(url: str, start: int = 0) -> str:
    """The last part of a shard's URL, which its keys begin with, without the ending of what packed it; of a piece that
    begins at `start`, `@start` behind that. A local path may hold any character; a URL's path ends before its query.
    """
    name = unpacked_name((urlsplit(url).path if "://" in url else url).rpartition("/")[2])
    return f"{name}@{start}" if start else name


def stored_record_count(header: bytes, length: int) -> int:
    """How many samples a stored index has, from its first `HEADER_BYTES` and the length of all of it; -1 where that is
    no such index.
    """
    if len(header) < _HEADER.size:
        return -1
    magic, _, version, layout_bytes, _, samples = _HEADER.unpack_from(header)
    fits = length == _stored_bytes(layout_bytes, samples)
    return int(samples) if magic == MAGIC and version == VERSION and fits else -1


def _stored_bytes(layout_bytes: int, samples: int) -> int:
    # Python's integers: counts of any size cannot overflow here.
    return _HEADER.size + 12 * samples + layout_bytes
