"""The index of a shard whose samples are records: where each begins and how long it is, and how a record is laid out.

What lies where in a record is not in the index but in the record itself, and read when it is gathered anyway (see
`records`). So an index takes 12 bytes a sample, whatever the number of columns. Samples have no keys of their own: a
key is `<name of the shard>/<number of the sample>`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastload.formats.placed_index import RECORD_MAGIC, PlacedIndex, read_stored, require
from fastload.store.packing import name_of, unpacked_name

__all__ = ["RECORD", "Described", "ListedShard", "RecordIndex", "shard_name"]

RECORD = ""
"""The one column that gathering knows of such shards: all of a record."""


@dataclass(frozen=True, eq=False)
class RecordIndex(PlacedIndex):
    """S records. Record s is `size[s]` bytes at `offset[s]` of the object; see `PlacedIndex`. Records of a piece begin
    in it, and may end in those behind it: offsets count from its start.
    """

    layout: bytes
    offset: NDArray[np.int64]
    size: NDArray[np.uint32]
    object_size: int
    name: str
    first_number: int = 0

    MAGIC = RECORD_MAGIC

    def fill_places(self, number_of: Callable[[str], int], first_chunk: int, places: NDArray[np.int64]) -> None:
        """As `ShardIndex.fill_places`; the one column is `RECORD`."""
        places[:, 0] = first_chunk
        places[:, 1::2], places[:, 2::2] = -1, 0
        at = number_of(RECORD)
        if at >= 0:
            places[:, 1 + 2 * at], places[:, 2 + 2 * at] = self.offset, self.size

    @classmethod
    def from_bytes(
        cls, data: bytes | bytearray | memoryview, url: str, object_size: int, start: int = 0, reach_max: int = 0
    ) -> RecordIndex:
        """The index that `to_bytes` stored. Raises ShardError, naming `url`, for anything that is not exactly an index
        of an object of `object_size` bytes, or of a piece of so many that begins at `start`, and whose records end at
        `reach_max` at the latest.
        """
        found, reach_max = read_stored(bytes(data), RECORD_MAGIC, url, object_size), max(reach_max, object_size)
        offset, sizes = found.offset, found.size
        inside = (offset >= 0) & (offset <= object_size) & (sizes <= reach_max - np.minimum(offset, object_size))
        require(inside.all(), url, "a record lies outside of the object")
        return cls(found.layout, offset, sizes, object_size, shard_name(url, start))


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
    begins at `start`, `@start` behind that.
    """
    name = unpacked_name(name_of(url))
    return f"{name}@{start}" if start else name
