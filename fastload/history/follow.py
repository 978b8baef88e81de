"""Whether a reader goes the way of an earlier one: where in the library it is, and how far ahead to believe that.

It is *found* by the read at hand and the few before it: at a place close before which some of them stand, in their
order. A reader that has only begun is found by its first read, where a trace began so. From then on each read is looked
for a little ahead of where the reader is, so that it may leave some out, and then in what other traces read at the
time; one that is not there is an insertion. *Trust* grows by one with each read that came as predicted, falls by one
where the reader leaves out many or moves to another trace, and by two with each read that did not come: below zero the
reader has departed, and is looked for anew, also where the earlier run went on otherwise after a common beginning.

As in the detection of sequences within a file, what is expected grows with what has come true: 2 to the power of trust.
So a wrong beginning has cost two chunks.

That an object's next chunk is read proves nothing: a reader of objects of many chunks in an order of its own would
soon be believed to read the next objects as before, all in vain. So only *jumps*, reads of anything else, find a place
and gain trust. And as jumps within an object say nothing of which object comes next, trust beyond the object at hand is
counted apart, by jumps to other objects.

Pure: no clock, no bytes. Not for several threads.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from fastload.history.keys import chunk_key
from fastload.history.library import Library, Trace

# Reads that may be left out from one to the next: a sampler that skips what was trained on, a batch that is dropped.
_SKIP_MAX = 64
# One that is farther ahead than this may be there by chance.
_NEAR = 8
# Jumps by which a place is found, and how far back they may be spread: some may be insertions, some left out. With
# twice as many, a reader of 200 objects in an order of its own was taken for one of eight earlier ones all the time.
_RECENT, _SPREAD = 4, 6
# Of a reader that did not begin like an earlier one, so many of the recent ones have to fit besides the last; among few
# chunks, which stand close to each other by chance, one more.
_FITTING_MIN, _FEW = 2, 500
# How many reads before or after, of all traces, a reader may go on in another trace: with batches of another size
# workers share the samples in another way, in about the same order.
_TRACES_WITHIN = 128
# A reader that has moved just now will soon move again, and its prediction is then made anew: so little of it until so
# many reads have come in one trace.
_TRUST_MOVED, _STAYS = 5, 32
# Jumps in which a chunk that is read again says nothing.
_AGAIN = 8
# Places of one key that are looked at; the newest runs are the first.
_PLACES_MAX = 8
# After so many reads without a place, only every eighth is looked for: most readers of an order of their own find none.
_EAGER_MAX, _SELDOM = 64, 8
_TRUST_MAX = 12
_DEPARTED, _MOVED = 2, 1


@dataclass(frozen=True, slots=True)
class _Found:
    """How well a place fits: of the recent jumps so many, and to so many objects besides the one at hand."""

    place: int
    fitting: int
    objects: int


class Follower:
    """Of one reader."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self._recent: deque[tuple[int, int]] = deque(maxlen=_RECENT)  # jumps: key of the chunk, of the object
        self._lately: deque[int] = deque(maxlen=_AGAIN)
        self._last: tuple[int, int] | None = None  # object and chunk that were read last
        self._jump_count = 0
        self._lost_count = 0  # jumps since there was a place
        self._trust = 0
        self._stayed = 0  # reads that came in the trace it is in
        self._beyond = 0  # trust beyond the object at hand
        self._trace: Trace | None = None
        self.place: int | None = None  # of the read that came last as predicted; None: not found

    @property
    def ahead_max(self) -> int:
        """How many reads ahead the prediction is to be believed."""
        if self.place is None:
            return 0
        return min(1 << self._trust, self.library.rest_of_object(self.place) + (1 << self._beyond))

    @property
    def is_at_end(self) -> bool:
        """Whether the earlier reader read nothing more."""
        return self.place is not None and self._trace is not None and self.place + 1 == self._trace.end

    def expect(self, of_object: int) -> bool:
        """This object is probably what is read next, and no read yet. Whether the reader's place was found by it."""
        return self._find(of_object, of_object)

    def saw(self, of_object: int, index: int = 0) -> bool:
        """A chunk of an object is read. Whether that was at a place that follows, or the reader's place was found."""
        key, last, self._last = chunk_key(of_object, index), self._last, (of_object, index)
        if last == (of_object, index - 1):
            return self._come(key) is not None
        is_other = last is None or last[0] != of_object
        came = self._follow(key, int(is_other)) or self._find(key, of_object)
        if key not in self._lately:
            self._recent.append((key, of_object))
            self._lately.append(key)
            self._jump_count += 1
        return came

    def _come(self, key: int) -> int | None:
        """Go on to where the key follows in the trace; how many reads that left out, None where it does not follow."""
        if self.place is None or self._trace is None:
            return None
        start = self.place + 1
        ahead = self.library.keys[start : min(self._trace.end, start + _SKIP_MAX)]
        (found,) = np.nonzero(ahead == np.uint64(key))
        if not len(found):
            return None
        self.place = start + int(found[0])
        return int(found[0])

    def _follow(self, key: int, gain_beyond: int) -> bool:
        """A jump: whether it came as predicted, and what that does to trust."""
        if self.place is None:
            return False
        if int(self.library.keys[self.place]) == key:
            return True
        left_out = self._come(key)
        if left_out is not None and left_out < _NEAR:
            self._stayed += 1
            most = _TRUST_MAX if self._stayed >= _STAYS else _TRUST_MOVED
            self._trust, self._beyond = min(most, self._trust + 1), min(most, self._beyond + gain_beyond)
            return True
        if left_out is None and key in self._lately:  # again
            return False
        if left_out is not None or self._move(key):
            self._lose(_MOVED, _MOVED)
            return self.place is not None
        self._lose(_DEPARTED, _DEPARTED * gain_beyond)
        return False

    def _move(self, key: int) -> bool:
        """Go on in another trace, where that read the chunk at about the time."""
        assert self.place is not None, "a reader that is nowhere"
        place = self.library.at_the_time(self.place, key, _TRACES_WITHIN)
        trace = None if place is None else self.library.trace(place)
        if trace is None or trace == self._trace:
            return False
        self.place, self._trace, self._stayed = place, trace, 0
        self._trust, self._beyond = min(_TRUST_MOVED, self._trust), min(_TRUST_MOVED, self._beyond)
        return True

    def _lose(self, trust: int, beyond: int) -> None:
        self._trust -= trust
        self._beyond = max(0, self._beyond - beyond)
        if self._trust < 0:
            self.place = self._trace = None
            self._trust = self._beyond = 0

    def _find(self, key: int, of_object: int) -> bool:
        """Look for the reader's place, unless it has one."""
        if self.place is not None:
            return False
        self._lost_count += 1
        if self._lost_count > _EAGER_MAX and self._lost_count % _SELDOM:
            return False
        places = self.library.places(key, _PLACES_MAX)
        best = max((self._fit(place, of_object) for place in places), key=lambda each: each.fitting, default=None)
        if best is None or best.fitting < 0:
            return False
        self.place, self._trace = best.place, self.library.trace(best.place)
        self._trust, self._beyond = max(1, best.fitting), max(1, best.objects)
        self._lost_count, self._stayed = 0, _STAYS
        return True

    def _fit(self, place: int, of_object: int) -> _Found:
        """How well a place fits the recent jumps; -1 where too few do."""
        trace = self.library.trace(place)
        before = self.library.jumps_before(place, _SPREAD)
        at, objects, fitting = -1, set(), 0
        for key, its_object in self._recent:
            if key in before[at + 1 :]:
                at = before.index(key, at + 1)
                fitting += 1
                objects.add(its_object)
        least = _FITTING_MIN + (self.library.key_count < _FEW)
        has_begun_so = len(before) <= self._jump_count + 1 and fitting == self._jump_count < least
        fits = fitting >= least or (has_begun_so and place - trace.start <= _SKIP_MAX)
        return _Found(place, fitting if fits else -1, len(objects - {of_object}))
