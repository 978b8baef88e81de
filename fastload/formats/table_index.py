"""The index of a shard that is a table, stored column by column: where each value lies.

A value is one piece of bytes, so that it is gathered as a member of a tar is, and no row is read for one of its
columns. An index takes 12 bytes a value. Keys are `<name of the shard>/<number of the row>`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastload.errors import ShardError
from fastload.formats.placed_index import TABLE_MAGIC, PlacedIndex, read_stored, require
from fastload.formats.record_index import shard_name

__all__ = ["TableIndex"]


@dataclass(frozen=True, eq=False)
class TableIndex(PlacedIndex):
    """R rows of C columns. The value of row r in `columns[c]` is `size[c, r]` bytes at `offset[c, r]` of the object, an
    offset of -1: there is none; see `PlacedIndex`. `layout` says what the columns hold.
    """

    layout: bytes
    columns: tuple[str, ...]
    offset: NDArray[np.int64]
    size: NDArray[np.uint32]
    object_size: int
    name: str
    first_number: int = 0

    MAGIC = TABLE_MAGIC

    def fill_places(self, number_of: Callable[[str], int], first_chunk: int, places: NDArray[np.int64]) -> None:
        """As `ShardIndex.fill_places`."""
        places[:, 0] = first_chunk
        places[:, 1::2], places[:, 2::2] = -1, 0
        for number, column in enumerate(self.columns):
            at = number_of(column)
            if at >= 0:
                places[:, 1 + 2 * at], places[:, 2 + 2 * at] = self.offset[number], self.size[number]

    @classmethod
    def from_bytes(
        cls, data: bytes, url: str, object_size: int, columns_of: Callable[[bytes], tuple[str, ...]]
    ) -> TableIndex:
        """The index that `to_bytes` stored; `columns_of` says which columns a layout has, or raises ShardError. Raises
        ShardError, naming `url`, for anything that is not exactly an index of an object of `object_size` bytes.
        """
        found = read_stored(data, TABLE_MAGIC, url, object_size)
        try:
            columns = columns_of(found.layout)
        except ShardError as error:
            raise ShardError(f"{url}: its stored index is damaged ({error}); drop it and read the shard") from error
        count = found.columns
        require(len(columns) == count, url, f"{count} columns where its layout has {len(columns)}")
        offset, sizes = found.offset.reshape(count, found.rows), found.size.reshape(count, found.rows)
        inside = (offset >= 0) & (offset <= object_size) & (sizes <= object_size - np.minimum(offset, object_size))
        inside |= (offset == -1) & (sizes == 0)
        require(inside.all(), url, "a value lies outside of the object")
        return cls(found.layout, columns, offset, sizes, object_size, shard_name(url))
