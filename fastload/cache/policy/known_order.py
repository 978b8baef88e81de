"""Known future (Belady's MIN): what is needed last goes first.

The order is known, so it is given ahead: which unit is used first, second, ... as far as is worth knowing. `NextUses`
turns that into the next use of every unit, exact as far as it was given. Four times as many uses as there are units are
enough: of a random order that is all but 2 % of the gaps between two uses of a unit, and those are longer than the time
for which even a cache of three quarters of the units should hold one.

A use is added once, and passed once, each in constant time: it is linked to the use of its unit before it. Nothing is
searched, and no pass over the whole order is made. Rejected: an array of next uses for an epoch made back to front,
which has to begin with the last sample before the first can be read, and takes four times the memory.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["FAR", "NextUses", "lookahead"]

Int64 = npt.NDArray[np.int64]

FAR = np.iinfo(np.int64).max
"""Not used as far as is known."""

_LOOKAHEAD_MAX = 1 << 20
_RING_AT_FIRST = 1 << 10


def lookahead(unit_count: int) -> int:
    """How many uses ahead are worth knowing."""
    return min(_LOOKAHEAD_MAX, 4 * unit_count)


class NextUses:
    """Of units 0 ... count-1. Uses are numbered by their places in the order; those from `cursor` up to `end` are known
    and not passed. Memory: 16 bytes a unit, and 8 to 16 for each of these.
    """

    def __init__(self, count: int) -> None:
        self.cursor = self.end = 0
        self._next = np.full(count + 1, FAR, np.int64)  # the last is that of unit -1
        self._last = np.full(count, -1, np.int64)  # the last known use of each unit
        self._units = np.empty(_RING_AT_FIRST, np.int32)  # by place, around
        self._gaps = np.zeros(_RING_AT_FIRST, np.int32)  # how far it is to the next use of the same unit; 0: not known

    def __len__(self) -> int:
        return len(self._last)

    def of(self, units: Int64) -> Int64:
        """The next use of each of these units, `FAR` for none that is known; -1 is a unit that is never used."""
        return self._next.take(units)

    def add(self, first: int, units: npt.NDArray[np.int32]) -> None:
        """From place `first` on these units are used, in this order. A gap after what was added makes that void, and so
        does going back.
        """
        if first != self.end:
            self._begin_at(first)
        self._reserve(len(units))
        places = np.arange(first, first + len(units))
        self._units[places & self._mask] = units
        order = np.argsort(units, kind="stable")
        sorted_units, sorted_places = units[order], places[order]
        bounds = np.ones(len(units) + 1, bool)  # where another unit begins, and the end
        np.not_equal(sorted_units[1:], sorted_units[:-1], out=bounds[1:-1])
        before = self._last.take(sorted_units)
        np.copyto(before[1:], sorted_places[:-1], where=~bounds[1:-1])
        is_linked = before >= self.cursor
        before, after = before[is_linked], sorted_places[is_linked]
        self._gaps[before & self._mask] = after - before
        self._next[sorted_units[~is_linked]] = sorted_places[~is_linked]
        is_last = bounds[1:]
        self._last[sorted_units[is_last]] = sorted_places[is_last]
        self.end = first + len(units)

    def advance(self, place: int) -> None:
        """The uses before `place` have been made."""
        place = min(place, self.end)
        if place <= self.cursor:
            return
        places = np.arange(self.cursor, place)
        ring = places & self._mask
        gaps = self._gaps[ring]
        # Where a unit comes twice, numpy keeps what is written last, which is its later use.
        self._next[self._units[ring]] = np.where(gaps > 0, places + gaps, FAR)
        self._gaps[ring] = 0
        self.cursor = place

    @property
    def _mask(self) -> int:
        return len(self._units) - 1

    def _begin_at(self, place: int) -> None:
        self.cursor = self.end = place
        self._next.fill(FAR)
        self._last.fill(-1)
        self._gaps.fill(0)

    def _reserve(self, count: int) -> None:
        """Room for so many more uses."""
        size = len(self._units)
        while size < self.end - self.cursor + count:
            size *= 2
        if size > len(self._units):
            places = np.arange(self.cursor, self.end)
            units, gaps = np.empty(size, np.int32), np.zeros(size, np.int32)
            units[places & (size - 1)] = self._units[places & self._mask]
            gaps[places & (size - 1)] = self._gaps[places & self._mask]
            self._units, self._gaps = units, gaps
