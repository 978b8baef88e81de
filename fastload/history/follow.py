"""Whether a reader goes the way of an earlier one: where in the library it is, and how far ahead to believe that.

It is *found* by the read at hand and the few before it: at a place where most of them stand close before. A reader
that has only begun is found by its first read, where a lane began so. From then on each read is looked for a little
ahead of where the reader is, so that it may leave some out; one that is not there is an insertion. *Trust* grows by one
with each read that came as predicted and falls by two with each that did not: below zero the reader has departed, and
is looked for anew, also where the earlier run went on otherwise after a common beginning.

As in the detection of sequences within a file, what is expected grows with what has come true: 2 to the power of trust.
So a wrong beginning has cost two chunks.

Pure: no clock, no bytes. Not for several threads.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from fastload.history.library import Lane, Library

# Reads that may be left out from one to the next: a sampler that skips what was trained on, a batch that is dropped.
_SKIP_MAX = 64
# Reads by which a place is found, and how far back they may be spread: some may be insertions, some left out.
_RECENT, _SPREAD = 8, 16
# Of a reader that did not begin like an earlier one, so many reads of the recent ones have to fit besides the last.
_FITTING_MIN = 2
# Places of one key that are looked at; the newest runs are the first.
_PLACES_MAX = 8
# After so many reads without a place, only every eighth is looked for: most readers of an order of their own find none.
_EAGER_MAX, _SELDOM = 64, 8
_TRUST_MAX = 12
_DEPARTED = 2


@dataclass(frozen=True, slots=True)
class _Found:
    place: int
    fitting: int


class Follower:
    """Of one reader."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self._recent: deque[int] = deque(maxlen=_RECENT)
        self._read_count = 0
        self._lost_count = 0  # reads since there was a place
        self._trust = 0
        self._lane: Lane | None = None
        self.place: int | None = None  # of the read that came last as predicted; None: not found

    @property
    def ahead_max(self) -> int:
        """How many reads ahead the prediction is to be believed."""
        return 0 if self.place is None else 1 << self._trust

    def expect(self, key: int) -> bool:
        """This is probably what is read next, and no read yet. Whether the reader's place was found by it."""
        return self._find(key)

    def saw(self, key: int) -> bool:
        """A read. Whether it was at a place that follows, or the reader's place was found by it."""
        came = self._follow(key) or self._find(key)
        self._recent.append(key)
        self._read_count += 1
        return came

    def _follow(self, key: int) -> bool:
        if self.place is None or self._lane is None:
            return False
        if int(self.library.keys[self.place]) == key:
            return True
        start = self.place + 1
        ahead = self.library.keys[start : min(self._lane.end, start + _SKIP_MAX)]
        (found,) = np.nonzero(ahead == np.uint64(key))
        if len(found):
            self.place = start + int(found[0])
            self._trust = min(_TRUST_MAX, self._trust + 1)
            return True
        if key in self._recent:  # again
            return False
        self._trust -= _DEPARTED
        if self._trust < 0:
            self.place = self._lane = None
            self._trust = 0
        return False

    def _find(self, key: int) -> bool:
        """Look for the reader's place, unless it has one."""
        if self.place is not None:
            return False
        self._lost_count += 1
        if self._lost_count > _EAGER_MAX and self._lost_count % _SELDOM:
            return False
        places = self.library.places(key, _PLACES_MAX)
        best = max((self._fit(place) for place in places), key=lambda each: each.fitting, default=None)
        if best is None or best.fitting < 0:
            return False
        self.place, self._lane = best.place, self.library.lane(best.place)
        self._trust = 1 + best.fitting
        self._lost_count = 0
        return True

    def _fit(self, place: int) -> _Found:
        """How many of the recent reads stand close before a place; -1 where that is too few."""
        lane = self.library.lane(place)
        before = set(self.library.keys[max(lane.start, place - _SPREAD) : place].tolist())
        fitting = sum(key in before for key in self._recent)
        has_begun_so = place - lane.start <= self._read_count + 1 and fitting == self._read_count < _FITTING_MIN
        return _Found(place, fitting if has_begun_so or fitting >= _FITTING_MIN else -1)
