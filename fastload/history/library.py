"""The reads of earlier runs, laid out so that what is being read finds its place among them.

All traces of all runs stand one after the other, the newest run first, in one array of keys; a *place* is an index in
it. Beside it the same keys sorted, each with its place, so that a key's places are a binary search away.

What comes after a place is the rest of its trace; and after the trace's end, what the whole run read from then on. So
where worker processes are made anew for each epoch, the next epoch's beginning is what follows the end of this one's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastload.history.keys import UInt64, chunk_keys
from fastload.history.runfile import Run
from fastload.store.table import ObjectTable
from fastload.store.types import ObjectInfo

WARMING = "warm"
"""The name of readers that only fill a cache (see `fastload.prepare`)."""

OPENING = "fastload.open"
"""The name of readers of files, which read objects as they are stored."""

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Trace:
    """Where one reader's reads stand: places from `start` up to `end`. `number` counts traces over all runs."""

    number: int
    start: int
    end: int


class Library:
    """Immutable; made in any thread. Takes 44 bytes a read, and what the objects take."""

    def __init__(self, runs: Sequence[Run], chunk_bytes: int) -> None:
        """Of these runs, the newest first, those whose chunks are of the same size. Not of those that only warmed a
        cache: no job reads in their order.
        """
        runs = [run for run in runs if run.summary.chunk_bytes == chunk_bytes and len(run.reads)]
        shelves = [_Shelf(run) for run in runs if set(run.summary.traces) != {WARMING}]
        self._shelves = shelves
        counts = [len(shelf) for shelf in shelves]
        self._shelf_starts: Int64 = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        trace_starts = [
            shelf.trace_starts[:-1] + start for shelf, start in zip(shelves, self._shelf_starts, strict=False)
        ]
        self._trace_starts: Int64 = np.concatenate([*trace_starts, self._shelf_starts[-1:]]).astype(np.int64)
        self.keys: UInt64 = np.concatenate([np.empty(0, np.uint64), *(shelf.keys for shelf in shelves)])
        jumps = [shelf.jumps + start for shelf, start in zip(shelves, self._shelf_starts, strict=False)]
        self._jumps: Int32 = np.concatenate([np.empty(0, np.int32), *jumps]).astype(np.int32)
        heads = [shelf.heads + start for shelf, start in zip(shelves, self._shelf_starts, strict=False)]
        self._heads: Int32 = np.concatenate([*heads, self._shelf_starts[-1:]]).astype(np.int32)
        for shelf, start in zip(shelves, self._shelf_starts.tolist(), strict=False):
            shelf.hand_over(self.keys[start : start + len(shelf)])
        order = np.argsort(self.keys, kind="stable")
        self._sorted_keys, self._places = self.keys[order], order.astype(np.int32)
        self.key_count = int(np.count_nonzero(np.diff(self._sorted_keys))) + bool(len(order))  # different ones

    def __len__(self) -> int:
        return len(self.keys)

    def places(self, key: int, at_most: int) -> list[int]:
        """Where the key stands, in the newest runs first."""
        wanted = np.uint64(key)
        first = int(self._sorted_keys.searchsorted(wanted))
        last = int(self._sorted_keys[first : first + at_most].searchsorted(wanted, side="right"))
        return [int(place) for place in self._places[first : first + last]]

    def trace(self, place: int) -> Trace:
        number = int(self._trace_starts.searchsorted(place, side="right")) - 1
        return Trace(number, int(self._trace_starts[number]), int(self._trace_starts[number + 1]))

    def jumps_before(self, place: int, at_most: int) -> list[int]:
        """Keys of the last reads of the trace before this place that were not of the next chunk of the same object."""
        end = int(self._jumps.searchsorted(np.int32(place)))
        jumps = self._jumps[max(0, end - at_most) : end]
        found: list[int] = self.keys[jumps[jumps >= self.trace(place).start]].tolist()
        return found

    def rest_of_object(self, place: int) -> int:
        """How many reads of the trace follow until another object is read."""
        # Of the array's own type: for any other the whole array would be converted each time.
        return int(self._heads[self._heads.searchsorted(np.int32(place), side="right")]) - place - 1

    def at_the_time(self, place: int, key: int, within: int) -> int | None:
        """The nearest place of the key among what all traces of the run read so many reads before and after this
        one.
        """
        number = self._shelf_of(place)
        start = int(self._shelf_starts[number])
        found = self._shelves[number].at_the_time(place - start, key, within)
        return None if found is None else start + found

    def after(self, place: int, count: int) -> Int64:
        """The places that follow this one, in the order of their reads; at most `count`."""
        trace = self.trace(place)
        rest = np.arange(place + 1, min(trace.end, place + 1 + count), dtype=np.int64)
        if len(rest) == count:
            return rest
        number = self._shelf_of(place)
        start = int(self._shelf_starts[number])
        later = self._shelves[number].read_after(trace.end - 1 - start, count - len(rest))
        return np.concatenate([rest, later + start])

    def chunk(self, place: int) -> tuple[ObjectInfo, int]:
        """The object that was read at a place, as it was then, and which chunk of it."""
        number = self._shelf_of(place)
        return self._shelves[number].chunk(place - int(self._shelf_starts[number]))

    def _shelf_of(self, place: int) -> int:
        return int(self._shelf_starts.searchsorted(place, side="right")) - 1


class _Shelf:
    """One run. Its places begin at 0."""

    def __init__(self, run: Run) -> None:
        reads = run.reads
        by_trace = np.argsort(reads.traces, kind="stable")
        self._objects: ObjectTable = run.objects
        self._object_nos, self._chunks = reads.objects[by_trace], reads.chunks[by_trace]
        self.keys = chunk_keys(run.keys[self._object_nos], self._chunks)
        _, firsts = np.unique(reads.traces[by_trace], return_index=True)
        self.trace_starts: Int64 = np.append(firsts, len(reads)).astype(np.int64)
        self.heads, self.jumps = _heads_and_jumps(reads.traces[by_trace], self._object_nos, self._chunks)
        self._in_time: Int32 = _inverse(by_trace)  # the place of each read, in the order of reading
        self._when: Int32 = by_trace.astype(np.int32)  # and the other way round

    def __len__(self) -> int:
        return len(self.keys)

    def hand_over(self, keys: UInt64) -> None:
        """The library has its own copy of what is laid out, these keys among it."""
        self.keys = keys
        del self.trace_starts, self.heads, self.jumps

    def read_after(self, place: int, count: int) -> Int64:
        """The places of what all traces read after this place was."""
        when = int(self._when[place]) + 1
        return self._in_time[when : when + count].astype(np.int64)

    def at_the_time(self, place: int, key: int, within: int) -> int | None:
        when = int(self._when[place])
        first = max(0, when - within)
        places = self._in_time[first : when + within]
        (found,) = np.nonzero(self.keys[places] == np.uint64(key))
        return int(places[found[np.abs(found + first - when).argmin()]]) if len(found) else None

    def chunk(self, place: int) -> tuple[ObjectInfo, int]:
        return self._objects[int(self._object_nos[place])], int(self._chunks[place])


def _heads_and_jumps(
    traces: npt.NDArray[np.uint16], objects: npt.NDArray[np.uint32], chunks: npt.NDArray[np.uint32]
) -> tuple[Int32, Int32]:
    """The places where another object is read than before, and those whose reads are not of the chunk that follows on
    the one before.
    """
    is_head = np.ones(len(traces), bool)
    is_head[1:] = (traces[1:] != traces[:-1]) | (objects[1:] != objects[:-1])
    is_jump = is_head.copy()
    is_jump[1:] |= chunks[1:] != chunks[:-1] + np.uint32(1)
    return np.flatnonzero(is_head).astype(np.int32), np.flatnonzero(is_jump).astype(np.int32)


def _inverse(permutation: npt.NDArray[np.integer[Any]]) -> Int32:
    inverse = np.empty(len(permutation), np.int32)
    inverse[permutation] = np.arange(len(permutation), dtype=np.int32)
    return inverse
