"""From chunks in the arena to values in a row: the copy that every byte of a sample makes.

The values of a batch lie in many chunks. Those that are leased now are pinned together and copied from in one call for
all columns; the rest are waited for and copied in a later pass. Nothing is pinned while waiting, so however small the
arena is and however many threads and processes share it, somebody can always go on.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastload.client.consumer import Consumer
from fastload.kernels.gather import gather_columns, lay_out

Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class Values:
    """Where the n values of each of c columns lie: int64[c, n], C-contiguous. A size of 0 needs no chunk."""

    first_chunk: Ints
    offset: Ints
    size: Ints

    @classmethod
    def room(cls, columns: int, count: int) -> Values:
        """For `count` values of each column; to be filled in."""
        return cls(*np.empty((3, columns, count), np.int64))


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Where `values` go when those of a column are put end to end (`out_offset`, int64[c, n + 1]), and the chunks in
    which they lie, each once, rising.
    """

    values: Values
    out_offset: Ints
    chunk_nos: Ints


class _Scratch(threading.local):
    """Per thread: tables over all chunks of the data set, clean between calls."""

    seen: Bytes = np.zeros(0, np.uint8)
    chunk_offset: Ints = np.empty(0, np.int64)
    found: Ints = np.empty(0, np.int64)

    def reserve(self, chunk_count: int) -> None:
        if len(self.seen) != chunk_count:
            self.seen = np.zeros(chunk_count, np.uint8)
            self.chunk_offset = np.full(chunk_count, -1, np.int64)
            self.found = np.empty(chunk_count, np.int64)


class Gatherer:
    """Copies values of one data set out of the arena. Safe to use from several threads."""

    def __init__(self, consumer: Consumer, chunk_count: int, chunk_bytes: int) -> None:
        self._consumer = consumer
        self._chunk_count = chunk_count
        self._chunk_bytes = chunk_bytes
        self._scratch = _Scratch()

    def lay_out(self, values: Values) -> Layout:
        """Decide where they go, and find out which chunks they need."""
        self._scratch.reserve(self._chunk_count)
        columns, count = values.size.shape
        out_offset = np.empty((columns, count + 1), np.int64)
        first_chunk, offset, size = (array.reshape(-1) for array in (values.first_chunk, values.offset, values.size))
        seen, found = self._scratch.seen, self._scratch.found
        chunks = lay_out(columns, first_chunk, offset, size, self._chunk_bytes, seen, found, out_offset.reshape(-1))
        if chunks < 0:
            at = -1 - chunks
            raise IndexError(
                f"value {at % count} of column {at // count} (first chunk {first_chunk[at]}, offset {offset[at]}, "
                f"{size[at]} bytes) lies outside of {self._chunk_count} chunks of {self._chunk_bytes} bytes"
            )
        return Layout(values, out_offset, np.array(sorted(found[:chunks].tolist()), np.int64))

    def fill(self, layout: Layout, out: Sequence[Bytes]) -> None:
        """Copy each column's values to their places in its `out`; waits for the chunks that they need."""
        remaining, copied = layout.chunk_nos, 0
        while len(remaining):
            with self._consumer.acquire(remaining) as held:
                here = held.chunk_nos
                for arena, chunk_nos, offsets in held.groups:
                    copied += self._copy(layout, out, arena, chunk_nos, offsets)
            if len(here) == len(remaining):
                break
            remaining = np.setdiff1d(remaining, here, assume_unique=True)
        expected = sum(layout.out_offset[:, -1].tolist())
        assert copied == expected, f"gathered {copied} of {expected} bytes"

    def _copy(self, layout: Layout, out: Sequence[Bytes], arena: Bytes, chunk_nos: Ints, offsets: Ints) -> int:
        table, values = self._scratch.chunk_offset, layout.values
        table[chunk_nos] = offsets
        places = values.first_chunk, values.offset, values.size, layout.out_offset
        try:
            return gather_columns(arena, table, self._chunk_bytes, *places, out)
        finally:
            table[chunk_nos] = -1
