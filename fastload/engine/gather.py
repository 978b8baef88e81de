"""From chunks in the arena to values in a row: the copy that every byte of a sample makes.

The values of a batch lie in many chunks. Those that are leased now are pinned together and copied from in one call a
column; the rest are waited for and copied in a later pass. Nothing is pinned while waiting, so however small the arena
is and however many threads and processes share it, somebody can always go on.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastload.kernels.gather import gather, needed_chunks
from fastload.service.client import Consumer

Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class Values:
    """Where the n values of one column lie: int64[n] each. A size of 0 needs no chunk."""

    first_chunk: Ints
    offset: Ints
    size: Ints

    def out_offsets(self) -> Ints:
        """Where they go when they are put end to end: int64[n + 1]."""
        ends = np.zeros(len(self.size) + 1, np.int64)
        np.cumsum(self.size, out=ends[1:])
        return ends


class _Scratch(threading.local):
    """Per thread: tables over all chunks of the data set, clean between calls."""

    seen: Bytes = np.zeros(0, np.uint8)
    chunk_offset: Ints = np.empty(0, np.int64)

    def reserve(self, chunk_count: int) -> None:
        if len(self.seen) != chunk_count:
            self.seen = np.zeros(chunk_count, np.uint8)
            self.chunk_offset = np.full(chunk_count, -1, np.int64)


class Gatherer:
    """Copies values of one data set out of the arena. Safe to use from several threads."""

    def __init__(self, consumer: Consumer, chunk_count: int, chunk_bytes: int) -> None:
        self._consumer = consumer
        self._chunk_count = chunk_count
        self._chunk_bytes = chunk_bytes
        self._scratch = _Scratch()

    def fill(self, columns: list[tuple[Values, Ints, Bytes]]) -> None:
        """Copy each column's values to `out_offsets` of its output; waits for the chunks that they need."""
        remaining = self.needed([values for values, _, _ in columns])
        copied = 0
        while len(remaining):
            with self._consumer.acquire(remaining) as held:
                here = held.chunk_nos
                for arena, chunk_nos, offsets in held.groups:
                    copied += self._copy(columns, arena, chunk_nos, offsets)
            if len(here) == len(remaining):
                break
            remaining = np.setdiff1d(remaining, here, assume_unique=True)
        expected = sum(int(values.size.sum()) for values, _, _ in columns)
        assert copied == expected, f"gathered {copied} of {expected} bytes"

    def needed(self, columns: list[Values]) -> Ints:
        """The chunks in which these values lie, each once, rising."""
        self._scratch.reserve(self._chunk_count)
        parts = [
            needed_chunks(values.first_chunk, values.offset, values.size, self._chunk_bytes, self._scratch.seen)
            for values in columns
        ]
        if len(parts) == 1:
            return parts[0]
        return np.unique(np.concatenate(parts)) if parts else np.empty(0, np.int64)

    def _copy(self, columns: list[tuple[Values, Ints, Bytes]], arena: Bytes, chunk_nos: Ints, offsets: Ints) -> int:
        table = self._scratch.chunk_offset
        table[chunk_nos] = offsets
        try:
            return sum(
                gather(arena, table, self._chunk_bytes, v.first_chunk, v.offset, v.size, out_offsets[:-1], out)
                for v, out_offsets, out in columns
            )
        finally:
            table[chunk_nos] = -1
