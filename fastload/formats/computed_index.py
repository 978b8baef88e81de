"""Indexes that are computed from what is known of a shard, and never stored: of records of one length by arithmetic,
and of records that are put together of parts which lie apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastload.formats.record_index import RECORD

__all__ = ["PackedIndex", "StridedIndex"]

Int64s = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StridedIndex:
    """`sample_count` records of `record_bytes` each: the first at `first` of the shard, and each `stride` bytes behind
    the one before, which it may overlap. `layout` and `name` as of a `RecordIndex`; the first is number `first_number`
    in keys.
    """

    layout: bytes
    first: int
    stride: int
    record_bytes: int
    sample_count: int
    name: str
    first_number: int = 0

    @property
    def member_count(self) -> int:
        """As many: a sample is one run of bytes."""
        return self.sample_count

    @property
    def byte_count(self) -> int:
        """The memory that this index takes, for caches with a budget of bytes."""
        return 512 + len(self.layout)

    @property
    def reach(self) -> int:
        """Where the last of its bytes ends."""
        return self.first + (self.sample_count - 1) * self.stride + self.record_bytes if self.sample_count else 0

    def fill_places(self, number_of: Callable[[str], int], first_chunk: int, places: Int64s) -> None:
        """As `RecordIndex.fill_places`."""
        places[:, 0] = first_chunk
        places[:, 1::2], places[:, 2::2] = -1, 0
        at = number_of(RECORD)
        if at >= 0:
            places[:, 1 + 2 * at] = self.first + self.stride * np.arange(self.sample_count)
            places[:, 2 + 2 * at] = self.record_bytes


@dataclass(frozen=True, eq=False)
class PackedIndex:
    """S records of P parts. Record s is the parts `part_start[s]` up to, not including, `part_start[s + 1]`, end to
    end; part p is `size[p]` bytes at `offset[p]` of the shard, and `tag[p]` is what its format says of it. All int64;
    the arrays are read-only.
    """

    layout: bytes
    part_start: Int64s
    offset: Int64s
    size: Int64s
    tag: Int64s
    name: str
    first_number: int = 0

    def __post_init__(self) -> None:
        for array in (self.part_start, self.offset, self.size, self.tag):
            array.flags.writeable = False

    @property
    def sample_count(self) -> int:
        return len(self.part_start) - 1

    @property
    def member_count(self) -> int:
        """The number of parts, P."""
        return len(self.offset)

    @property
    def byte_count(self) -> int:
        """The memory that this index takes, for caches with a budget of bytes."""
        return 1024 + len(self.layout) + 8 * len(self.part_start) + 24 * len(self.offset)

    @property
    def reach(self) -> int:
        """Where the last of its bytes ends."""
        return int((self.offset + self.size).max()) if len(self.offset) else 0
