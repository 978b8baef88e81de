"""The index of one shard: which samples it holds and where their bytes lie, as arrays.

An index is made once, when a shard is first read, and kept by the cache service beside the chunks; later
passes parse nothing. Everything that plans, gathers and decodes works on these arrays, whatever the shard's
format, and nothing in them is a Python object per sample.

Samples and members are numbered in the order of the shard. Sample s has the members `member_start[s]` up to,
not including, `member_start[s + 1]`; member m is column `columns[member_column[m]]` of its sample,
`member_size[m]` bytes at `member_offset[m]` of the object. Keys and column names are bytes as they stand in
the shard.

The stored form is documented byte by byte in docs/format.md ("Shard index"). It is read from a cache that
other processes write, so nothing in it is believed: `from_bytes` checks the checksum, then every length,
offset and order, and what it returns cannot lead a reader outside of the object.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray

from fastload.errors import ShardError

__all__ = ["HEADER_BYTES", "ShardIndex", "stored_sample_count"]

Number = TypeVar("Number", bound=np.generic)

MAGIC = b"FLSHARDX"
VERSION = 1
# magic, checksum of all that follows; version, columns, object size, samples, members, key bytes, column name
# bytes.
_HEADER = struct.Struct("<8sQIIQQQQQ")
_CHECKED_FROM = 16
HEADER_BYTES = _HEADER.size


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """S samples of M members in C columns. The arrays are read-only and may be shared by all threads.

    columns: names, in order of first appearance in the shard; C of them.
    key_bytes: uint8[K], all keys one after the other; key s is `key_bytes[key_offsets[s]:key_offsets[s +
    1]]`. key_offsets: int64[S + 1]. member_start: int64[S + 1], the first member of each sample, then M.
    Every sample has at least one. member_column: int32[M], a number in `columns`; no column twice in a
    sample. member_offset, member_size: int64[M], bytes from the start of the object, and bytes. object_size:
    bytes of the object that this is the index of.
    """

    columns: tuple[str, ...]
    key_bytes: NDArray[np.uint8]
    key_offsets: NDArray[np.int64]
    member_start: NDArray[np.int64]
    member_column: NDArray[np.int32]
    member_offset: NDArray[np.int64]
    member_size: NDArray[np.int64]
    object_size: int

    def __post_init__(self) -> None:
        for array in self._arrays():
            array.flags.writeable = False

    def _arrays(self) -> list[NDArray[np.generic]]:
        """In the order in which they are stored: the widest first, so that each is aligned."""
        return [
            self.key_offsets,
            self.member_start,
            self.member_offset,
            self.member_size,
            self.member_column,
            self.key_bytes,
        ]

    @property
    def sample_count(self) -> int:
        """The number of samples, S."""
        return len(self.member_start) - 1

    @property
    def member_count(self) -> int:
        """The number of members, M."""
        return len(self.member_offset)

    @property
    def byte_count(self) -> int:
        """The memory that this index takes, for caches with a budget of bytes."""
        objects = 1024 + sum(64 + len(name) for name in self.columns)
        return objects + sum(array.nbytes for array in self._arrays())

    def key(self, sample: int) -> str:
        r"""The key of a sample. Bytes that are not UTF-8 show as `\xNN`, so that it can always be printed."""
        if not 0 <= sample < self.sample_count:
            raise IndexError(f"sample {sample} of {self.sample_count}")
        raw = self.key_bytes[self.key_offsets[sample] : self.key_offsets[sample + 1]]
        return raw.tobytes().decode("utf-8", "backslashreplace")

    def sample_keys(self) -> list[bytes]:
        """The key of each sample, as it stands in the shard."""
        data, offsets = self.key_bytes.tobytes(), self.key_offsets.tolist()
        return [data[start:end] for start, end in pairwise(offsets)]

    def without(self, samples: NDArray[np.bool_]) -> ShardIndex:
        """The same without these samples, bool[S]."""
        kept = ~samples
        members = np.repeat(kept, np.diff(self.member_start))
        key_bytes = np.repeat(kept, np.diff(self.key_offsets))
        return replace(
            self,
            key_bytes=self.key_bytes[key_bytes],
            key_offsets=_ends(np.diff(self.key_offsets)[kept]),
            member_start=_ends(np.diff(self.member_start)[kept]),
            member_column=self.member_column[members],
            member_offset=self.member_offset[members],
            member_size=self.member_size[members],
        )

    def fill_places(self, number_of: Callable[[str], int], first_chunk: int, places: NDArray[np.int64]) -> None:
        """For each sample where its values in C columns lie: `places`, int64[S, 1 + 2 * C], is the shard's first chunk,
        and offset and size of each column; -1 and 0 where there is none. `number_of` says which of the C a column is,
        or -1.
        """
        from fastload.kernels.rows import fill_places

        wanted = np.array([number_of(name) for name in self.columns], np.int64)
        members = self.member_start, self.member_column, self.member_offset, self.member_size
        fill_places(*members, wanted, first_chunk, places)

    def __eq__(self, other: object) -> bool:
        """Whether both say the same."""
        if not isinstance(other, ShardIndex):
            return NotImplemented
        return all(
            np.array_equal(getattr(self, field.name), getattr(other, field.name)) for field in fields(ShardIndex)
        )

    __hash__ = None  # type: ignore[assignment]  # compared by its contents

    def to_bytes(self) -> bytes:
        """The stored form."""
        names = [name.encode() for name in self.columns]
        stored = (array.astype(array.dtype.newbyteorder("<"), copy=False).view(np.uint8) for array in self._arrays())
        lengths = np.array([len(name) for name in names], "<u4").tobytes()
        body: list[bytes | memoryview] = [*(array.data for array in stored), lengths, *names]
        header = bytearray(
            _HEADER.pack(
                MAGIC,
                0,
                VERSION,
                len(names),
                self.object_size,
                self.sample_count,
                self.member_count,
                len(self.key_bytes),
                sum(map(len, names)),
            )
        )
        # Summed up where it lies: an index may have some megabytes, which are copied once, at the end.
        digest = xxhash.xxh3_64(memoryview(header)[_CHECKED_FROM:])
        for part in body:
            digest.update(part)
        struct.pack_into("<Q", header, 8, digest.intdigest())
        return b"".join([header, *body])

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview, url: str, object_size: int) -> ShardIndex:
        """The index that `to_bytes` stored; its arrays are copies.

        Raises ShardError, naming `url`, for anything that is not exactly an index of an object of
        `object_size` bytes.
        """
        return _IndexReader(bytes(data), url, object_size).read()


def _ends(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """0, and where each ends that has one of these lengths."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def stored_sample_count(header: bytes, length: int) -> int:
    """How many samples a stored index has, from its first `HEADER_BYTES` and the length of all of it; -1 where that is
    no index. Its checksum is not looked at: the counts have to add up to the length.
    """
    if len(header) < _HEADER.size:
        return -1
    magic, _, version, columns, _, samples, members, keys, names = _HEADER.unpack_from(header)
    fits = length == _stored_bytes(columns, samples, members, keys, names)
    return int(samples) if magic == MAGIC and version == VERSION and fits else -1


def _stored_bytes(columns: int, samples: int, members: int, keys: int, names: int) -> int:
    # Python's integers: counts of any size cannot overflow here.
    return _HEADER.size + 16 * (samples + 1) + 20 * members + keys + 4 * columns + names


class _IndexReader:
    """Reads a stored index, believing nothing."""

    def __init__(self, data: bytes, url: str, object_size: int) -> None:
        self._data = data
        self._url = url
        self._object_size = object_size
        self._position = _HEADER.size

    def _require(self, holds: object, what: str) -> None:
        if not holds:
            raise ShardError(f"{self._url}: its stored index is damaged ({what}); drop it and read the shard")

    def read(self) -> ShardIndex:
        columns, samples, members, key_bytes, name_bytes = self._counts()
        key_offsets = self._take(np.int64, samples + 1)
        member_start = self._take(np.int64, samples + 1)
        member_offset = self._take(np.int64, members)
        member_size = self._take(np.int64, members)
        member_column = self._take(np.int32, members)
        keys = self._take(np.uint8, key_bytes)
        names = self._names(self._take(np.uint32, columns), name_bytes)
        self._check_steps(key_offsets, key_bytes, 0, "key offsets")
        self._check_steps(member_start, members, 1, "member numbers")
        self._check_members(member_offset, member_size, member_column, columns)
        return ShardIndex(
            names,
            keys,
            key_offsets,
            member_start,
            member_column,
            member_offset,
            member_size,
            self._object_size,
        )

    def _counts(self) -> tuple[int, int, int, int, int]:
        """Columns, samples, members, bytes of keys and of column names; they add up to the data's length."""
        data = self._data
        self._require(len(data) >= _HEADER.size, f"{len(data)} bytes are less than its header")
        magic, checksum, version, columns, size, samples, members, keys, names = _HEADER.unpack_from(data)
        self._require(magic == MAGIC, f"it starts with {magic!r}")
        self._require(version == VERSION, f"version {version} where {VERSION} is known")
        found = xxhash.xxh3_64_intdigest(memoryview(data)[_CHECKED_FROM:])
        self._require(found == checksum, f"checksum {found:016x} where {checksum:016x} is stored")
        self._require(size == self._object_size, f"of an object of {size} bytes, not {self._object_size}")
        length = _stored_bytes(columns, samples, members, keys, names)
        self._require(len(data) == length, f"{len(data)} bytes where its counts need {length}")
        return columns, samples, members, keys, names

    def _take(self, dtype: type[Number], count: int) -> NDArray[Number]:
        """The next `count` numbers, stored little-endian."""
        stored = np.dtype(dtype).newbyteorder("<")
        array = np.frombuffer(self._data, stored, count, self._position).astype(dtype)
        self._position += array.nbytes
        return array

    def _names(self, lengths: NDArray[np.uint32], byte_count: int) -> tuple[str, ...]:
        self._require(int(lengths.sum(dtype=np.uint64)) == byte_count, "lengths of column names")
        ends = self._position + np.cumsum(lengths, dtype=np.int64)
        starts = ends - lengths
        try:
            names = tuple(self._data[a:b].decode() for a, b in zip(starts, ends, strict=True))
        except UnicodeDecodeError as error:
            raise ShardError(f"{self._url}: its stored index is damaged (a column's name: {error})") from error
        self._require(len(set(names)) == len(names), "a column's name is there twice")
        return names

    def _check_steps(self, steps: NDArray[np.int64], last: int, least: int, what: str) -> None:
        """From 0 up to `last`, each step at least `least` (0 or 1)."""
        self._require(steps[0] == 0 and steps[-1] == last, f"{what} do not run from 0 to {last}")
        # Compared, not subtracted, since a difference could overflow.
        in_order = steps[1:] > steps[:-1] if least else steps[1:] >= steps[:-1]
        self._require(np.all(in_order), f"{what} are out of order")

    def _check_members(
        self, offset: NDArray[np.int64], size: NDArray[np.int64], column: NDArray[np.int32], columns: int
    ) -> None:
        known = (column >= 0) & (column < columns)
        self._require(np.all(known), f"a column's number is not below {columns}")
        inside = (offset >= 0) & (size >= 0) & (offset <= self._object_size)
        inside &= size <= self._object_size - offset
        self._require(np.all(inside), "a member lies outside of the object")
