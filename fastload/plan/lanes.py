"""The one line of an epoch's samples: partitions side by side, made equally long.

Position q of the line belongs to *lane* q mod P, of P lanes, one a partition, and is number q // P there; so
every run of positions takes an equal share from each lane, at most one sample more from some than from others,
whatever its length. With N samples in all, lane p is as long as there are positions of it below N: its *quota*.

Partitions are dealt by bytes and do not hold equally many samples. A lane is the first samples of its own
partition, as many as its quota; where the partition has fewer, the lane goes on with samples that other
partitions have beyond their quotas. These stand in one row, by partition, and the short lanes take their parts
of it one after the other. So all lanes end together, and a lane passes through at most one window at a time and
few that another lane passes through too. A lane's first samples are the same for any N above them, which is
what lets an epoch begin before samples are counted: position q is settled once N is known to be above q and the
partition of its lane to reach it.

Rejected: dealing the samples of the partitions that are left, sample by sample, to everybody. Every node would
then read all that is left, and hold a window of every partition at once.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastload.plan.tally import Tally, WindowKey


def lane_length(lane: int, position: int, partitions: int) -> int:
    """How many positions below `position` are of `lane`."""
    return (position - lane + partitions - 1) // partitions


def lane_lengths(position: int, partitions: int) -> NDArray[np.int64]:
    """`lane_length` of every lane, int64[partitions]."""
    return (position - np.arange(partitions, dtype=np.int64) + partitions - 1) // partitions


class Piece(NamedTuple):
    """Samples of a partition, from `start` up to `stop` in its order."""

    partition: int
    start: int
    stop: int


class Levels:
    """How lanes are made equally long, once every partition's number of samples is known.

    `total` samples in all; `quota` is the length of each lane, `own` how much of it its partition gives.
    """

    def __init__(self, totals: NDArray[np.int64]) -> None:
        self.total = int(totals.sum())
        self.quota = lane_lengths(self.total, len(totals))
        self.own = np.minimum(totals, self.quota)
        self._surplus = totals - self.own
        self._row_end = np.cumsum(self._surplus)
        lacking = self.quota - self.own
        self._row_start_of_lane = np.cumsum(lacking) - lacking

    def pieces(self, lane: int, start: int, stop: int) -> list[Piece]:
        """What `lane` holds from number `start` up to `stop`."""
        own = int(self.own[lane])
        pieces = [Piece(lane, start, min(stop, own))] if start < min(stop, own) else []
        at = int(self._row_start_of_lane[lane]) + max(start, own) - own
        row_stop = int(self._row_start_of_lane[lane]) + stop - own
        while at < row_stop:
            partition = int(np.searchsorted(self._row_end, at, side="right"))
            end = min(row_stop, int(self._row_end[partition]))
            shift = int(self.own[partition]) - int(self._row_end[partition] - self._surplus[partition])
            pieces.append(Piece(partition, at + shift, end + shift))
            at = end
        return pieces


class Stop(NamedTuple):
    """Where a lane goes next: `length` samples of a window from `offset` on.

    The length is 0 while the window is not counted; then the offset may lie beyond it.
    """

    key: WindowKey
    offset: int
    length: int


class Leg(NamedTuple):
    """A lane's numbers from `start` up to `stop` are the samples of a window from `offset` on."""

    start: int
    stop: int
    key: WindowKey
    offset: int


class Lane:
    """How far one lane is covered by open windows, and where it goes from there."""

    def __init__(self, number: int, start: int) -> None:
        self.number, self.first, self.covered = number, start, start
        self.legs: list[Leg] = []
        self._pieces: list[Piece] | None = None  # None: its own partition, to an end that is not known yet
        self._stop: Stop | None = None  # the next, where it is known for good

    def level(self, levels: Levels) -> None:
        """From now on the lane's end is known, and what it holds beyond its own partition."""
        own = int(levels.own[self.number])
        if self.legs and self.covered > own:
            self.covered = own
            self.legs = [leg._replace(stop=min(leg.stop, own)) for leg in self.legs if leg.start < own]
        self._pieces, self._stop = levels.pieces(self.number, self.covered, int(levels.quota[self.number])), None

    def stop(self, tally: Tally) -> Stop | None:
        """The next window that the lane needs open; None at its end, or while what follows is not known."""
        if self._stop is None or not self._stop.length:
            self._stop = self._find_stop(tally)
        return self._stop

    def _find_stop(self, tally: Tally) -> Stop | None:
        piece = Piece(self.number, self.covered, 1 << 62) if self._pieces is None else next(iter(self._pieces), None)
        found = None if piece is None else tally.find(piece.partition, piece.start)
        if piece is None or found is None:
            return None
        window, offset, count = found
        length = 0 if count < 0 else min(count - offset, piece.stop - piece.start)
        return Stop(WindowKey(piece.partition, window), offset, length)

    def take(self, stop: Stop) -> None:
        """Go through the window of `stop`, which is open."""
        self.legs.append(Leg(self.covered, self.covered + stop.length, stop.key, stop.offset))
        self._move(stop.length)

    def skip_to(self, number: int) -> None:
        """Nobody here needs what lies before `number`."""
        while self.covered < number and (self._pieces is None or self._pieces):
            here = number - self.covered
            self._move(here if self._pieces is None else min(here, self._pieces[0].stop - self._pieces[0].start))

    def forget_before(self, number: int) -> None:
        """Legs that end at or before `number` are over."""
        self.legs = [leg for leg in self.legs if leg.stop > number]

    def _move(self, length: int) -> None:
        self.covered, self._stop = self.covered + length, None
        if self._pieces is not None:
            first = self._pieces[0]
            rest = first._replace(start=first.start + length)
            self._pieces[:1] = [rest] if rest.start < rest.stop else []
