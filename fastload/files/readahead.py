"""In which order one object is read, found out from the accesses themselves: what is likely to be read next.

Places are *units*, parts of an object of one size. An access covers a run of units. A *stream* is a reader that goes
through the object in one way: forward or backward from neighbour to neighbour, or in steps of one length. One file may
hold several, whose accesses come mixed (members of an archive, columns of a table).

Neighbours are believed at the second access, since most readers are sequential; steps only at the fourth, since among a
few accesses without any order some are as far apart as others. Small gaps do not end a stream. What is expected grows
with what has come true, so that a reader that goes elsewhere after two accesses has cost two units.

Pure: no clock, no bytes. Not for several threads.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

# Readers of one file at the same time. A table is read by columns, but those of one chunk are one stream.
_STREAMS_MAX = 8
# Accesses among which a new stream is looked for.
_HISTORY = 12
# Units, or steps, that a stream may leave out.
_GAP = 2
# A stream of which so many accesses knew nothing has ended.
_FORGOTTEN_AFTER = 64
# Accesses that steps of one length take to be believed.
_STEPS_BELIEVED = 4


@dataclass(frozen=True, slots=True)
class _Access:
    first: int
    last: int


@dataclass(slots=True)
class _Stream:
    """`step`: 1 or -1 for neighbours; else how far apart accesses begin. `run` counts those that came true."""

    first: int
    last: int
    step: int
    run: int
    seen: int

    def takes(self, first: int, last: int) -> bool:
        """Whether an access is the stream's; if so, the stream is there now."""
        if self.first <= first and last <= self.last:  # a part of what it had last
            return True
        if not self._fits(first, last):
            return False
        self.first, self.last = first, last
        self.run += 1
        return True

    def _fits(self, first: int, last: int) -> bool:
        if self.step == 1:
            return self.last < last and first - self.last <= 1 + _GAP and first >= self.first
        if self.step == -1:
            return first < self.first and self.first - last <= 1 + _GAP and last <= self.last
        steps, odd = divmod(first - self.first, self.step)
        return not odd and 1 <= steps <= 1 + _GAP

    def is_at(self, other: _Stream) -> bool:
        """Whether both are at one place."""
        return self.first <= other.last and other.first <= self.last

    def ahead(self, count_max: int) -> list[int]:
        """What it will read next, the next first."""
        width = self.last - self.first + 1
        count = min(count_max, self.run * width)
        if self.step == 1:
            return list(range(self.last + 1, self.last + 1 + count))
        if self.step == -1:
            return list(range(self.first - 1, self.first - 1 - count, -1))
        times = max(1, count // width)
        return [self.first + self.step * time + unit for time in range(1, 1 + times) for unit in range(width)]


class Streams:
    """The streams of one file."""

    def __init__(self, unit_count: int) -> None:
        """`unit_count`: how many units the object has."""
        self._unit_count = unit_count
        self._streams: list[_Stream] = []  # the one that was seen last is the first
        self._history: deque[_Access] = deque(maxlen=_HISTORY)
        self._clock = 0

    def saw(self, first: int, last: int) -> None:
        """The units from `first` to `last` are being read."""
        self._clock += 1
        stream = next((each for each in self._streams if each.takes(first, last)), None)
        if stream is None:
            stream = self._found(first, last)
        if stream is not None:
            stream.seen = self._clock
            self._keep(stream)

    def ahead(self, count_max: int) -> list[int]:
        """Units that are expected next, at most `count_max` of each stream; of the stream that was seen last first."""
        found: dict[int, None] = {}
        for stream in self._streams:
            found.update(dict.fromkeys(stream.ahead(count_max)))
        return [unit for unit in found if 0 <= unit < self._unit_count]

    def _keep(self, stream: _Stream) -> None:
        """The stream is the first now. Others have ended that were not seen for long, or whose place it has reached."""
        others = [each for each in self._streams if each is not stream]
        live = [each for each in others if self._clock - each.seen < _FORGOTTEN_AFTER and not stream.is_at(each)]
        self._streams = [stream, *live[: _STREAMS_MAX - 1]]

    def _found(self, first: int, last: int) -> _Stream | None:
        """The stream that begins to show with this access."""
        earlier = list(self._history)
        if earlier and earlier[-1].first <= first and last <= earlier[-1].last:
            return None  # it says nothing new
        self._history.append(_Access(first, last))
        step = _neighbour(earlier, first, last) or _step(earlier, first)
        if not step:
            return None
        run = 2 if step in (1, -1) else _STEPS_BELIEVED
        return _Stream(first, last, step, run, self._clock)


def _neighbour(earlier: list[_Access], first: int, last: int) -> int:
    """1 or -1 where the access is next to an earlier one, 0 where it is not."""
    for access in reversed(earlier):
        if last > access.last and access.first <= first <= access.last + 1:
            return 1
        if first < access.first and access.first - 1 <= last <= access.last:
            return -1
    return 0


def _step(earlier: list[_Access], first: int) -> int:
    """The length of the steps whose fourth begins at `first`, 0 where there are none."""
    firsts = [access.first for access in earlier]
    for at in range(len(firsts) - 1, 1, -1):
        step = first - firsts[at]
        if step and _has_steps(firsts[:at], firsts[at] - step, step):
            return step
    return 0


def _has_steps(firsts: list[int], before: int, step: int) -> bool:
    """Whether `before`, and earlier the one a step further back, are among `firsts`."""
    return before in firsts and before - step in firsts[: firsts.index(before)]
