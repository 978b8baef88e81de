"""What is known of sample counts so far, and where a partition's samples lie in its windows.

Counts come in any order and from anywhere: a window that was opened, a stored index, another node. Nothing is
ever forgotten and nothing depends on when a count became known. Where an epoch is resumed, the windows before the
position are never counted: the position says how many samples they held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastload.errors import StateError
from fastload.plan.order import EpochOrder
from fastload.plan.position import Place

# Counts that are taken down in one go; a million would take 50 MB meanwhile.
_OBJECTS_AT_ONCE = 1 << 16


@dataclass(slots=True, eq=False)
class _PartitionCounts:
    """One partition. Arrays are by window: `count` so far, how many objects are `uncounted`, and `start`, the
    number of the window's first sample, known up to window `known`.
    """

    order: EpochOrder
    first: int
    count: NDArray[np.int64]
    uncounted: NDArray[np.int64]
    start: NDArray[np.int64]
    known: int

    def advance(self) -> None:
        while self.known < len(self.count) and not self.uncounted[self.known]:
            self.start[self.known + 1] = self.start[self.known] + self.count[self.known]
            self.known += 1


class EpochCounts:
    """The counts of one epoch from `places` on.

    `taken` samples of each partition lie before its place, or all that it has, where these are fewer.
    """

    def __init__(self, orders: Sequence[EpochOrder], places: Sequence[Place], taken: Sequence[int]) -> None:
        bases = np.cumsum([0, *(order.window_count for order in orders)])
        self._counts = np.full(len(orders[0].manifest), -1, np.int64)
        self._window_of = np.full(len(self._counts), -1, np.int32)
        self._window_count, self._window_uncounted = np.zeros((2, int(bases[-1])), np.int64)
        self._parts = []
        self.at_least = 0  # the samples of the epoch are known to be no fewer
        for order, base, place, before in zip(orders, bases, places, taken, strict=False):
            self._parts.append(self._part(order, int(base), place, before))
        self._uncounted = int(self._window_uncounted.sum())

    def _part(self, order: EpochOrder, base: int, place: Place, taken: int) -> _PartitionCounts:
        first = min(place.window, order.window_count)
        windows = slice(base, base + order.window_count)
        sizes = np.diff(order.window_start)
        uncounted = self._window_uncounted[windows]
        uncounted[first:] = sizes[first:]
        numbers = np.repeat(np.arange(base + first, windows.stop, dtype=np.int32), sizes[first:])
        self._window_of[order.object_order[order.window_start[first] :]] = numbers
        start = np.zeros(order.window_count + 1, np.int64)
        start[first] = taken - place.offset
        self.at_least += int(start[first])
        return _PartitionCounts(order, first, self._window_count[windows], uncounted, start, first)

    @property
    def is_complete(self) -> bool:
        """Whether the number of samples of every partition is known."""
        return self._uncounted == 0

    def totals(self) -> NDArray[np.int64]:
        """The samples of every partition, int64[partitions]. Only when complete."""
        return np.array([part.start[-1] for part in self._parts], np.int64)

    def length(self, partition: int) -> int | None:
        """The samples of a partition; None while not all are counted."""
        part = self._parts[partition]
        return int(part.start[-1]) if part.known == len(part.count) else None

    def add_counts(self, object_nos: NDArray[np.int32], counts: NDArray[np.int64]) -> None:
        """The sample counts of some objects, each given once; adding them again changes nothing.

        Raises `StateError` where an object had another count before.
        """
        for start in range(0, len(object_nos), _OBJECTS_AT_ONCE):
            self._add(object_nos[start : start + _OBJECTS_AT_ONCE], counts[start : start + _OBJECTS_AT_ONCE])
        for part in self._parts:
            part.advance()

    def _add(self, object_nos: NDArray[np.int32], counts: NDArray[np.int64]) -> None:
        before = self._counts[object_nos]
        wrong = np.flatnonzero((before >= 0) & (before != counts))
        if len(wrong):
            at = wrong[0]
            raise StateError(
                f"object {object_nos[at]} has {counts[at]} samples, and {before[at]} were counted before: what is "
                "known of it is out of date; index the shards again"
            )
        fresh = before < 0
        object_nos, counts = object_nos[fresh], counts[fresh]
        self._counts[object_nos] = counts
        windows = self._window_of[object_nos]
        ahead = windows >= 0
        windows, counts = windows[ahead], counts[ahead]
        np.add.at(self._window_count, windows, counts)
        np.subtract.at(self._window_uncounted, windows, 1)
        self.at_least += int(counts.sum())
        self._uncounted -= len(windows)

    def find(self, partition: int, number: int) -> tuple[int, int, int] | None:
        """Where sample `number` of a partition's order is: window, offset in it, samples of it.

        While that is not known, the first window without counts, the offset from there, which may lie beyond
        the window, and -1; None beyond the end.
        """
        part = self._parts[partition]
        if number < part.start[part.known]:
            starts = part.start[part.first : part.known + 1]
            window = part.first + int(starts.searchsorted(number, side="right")) - 1
            return window, number - int(part.start[window]), int(part.count[window])
        return (part.known, number - int(part.start[part.known]), -1) if part.known < len(part.count) else None

    def windows(self, partition: int, start: int, stop: int) -> list[tuple[int, int]]:
        """The windows of a counted partition with samples from `start` up to `stop`, and the first such sample."""
        part, found = self._parts[partition], []
        while start < stop and (at := self.find(partition, start)) is not None:
            found.append((at[0], start))
            start = int(part.start[at[0] + 1])
        return found

    def place(self, partition: int, number: int) -> Place:
        """The place after `number` samples of a partition; as exact as what is known: an offset may reach
        beyond its window where that is not counted.
        """
        part = self._parts[partition]
        starts = part.start[part.first : part.known + 1]
        window = part.first + max(0, int(np.searchsorted(starts, number, side="left")) - 1)
        offset = number - int(part.start[window])
        if window < part.known and offset == part.count[window]:
            return Place(window + 1, 0)
        return Place(window, offset)

    def uncounted_objects(self) -> NDArray[np.int32]:
        """All objects that lie ahead and have no count, int32."""
        return np.flatnonzero((self._window_of >= 0) & (self._counts < 0)).astype(np.int32)

    def next_uncounted(self, partitions: Sequence[int]) -> NDArray[np.int32]:
        """The objects without counts of the next window that has any, of each of `partitions`, int32."""
        parts = [self._parts[partition] for partition in partitions]
        found = [part.order.window_objects(part.known) for part in parts if part.known < len(part.count)]
        objects = np.concatenate(found) if found else np.empty(0, np.int32)
        return objects[self._counts[objects] < 0]
