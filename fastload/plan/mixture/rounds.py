"""One source of a mixture: its lanes, through one epoch after the other.

A lane of a source goes through its part of the source's epoch and then on with the same lane of the source's next
epoch, without end. Lanes need not be in the same round: their quotas differ by up to a sample. A round's line is made
when a lane comes to it, and kept while one is in it. See `epochs` for what rounds are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from fastload.plan.deal import Span
from fastload.plan.line import Line
from fastload.plan.mixture.epochs import SourceEpochs
from fastload.plan.mixture.position import SourcePosition
from fastload.plan.position import Place
from fastload.plan.samples import Samples
from fastload.plan.tally import WindowKey

_ALL = 1 << 62

RoundKey = tuple[int, WindowKey]


class Rounds:
    """The lanes of `epochs` that this node may need."""

    def __init__(self, epochs: SourceEpochs, samples: Sequence[int]) -> None:
        """`samples`: how many samples each lane, of all, has given before."""
        self.epochs = epochs
        self._skipped = {lane: samples[lane] for lane in epochs.lanes}  # samples before that are not needed here
        self._round = {lane: epochs.began[lane][0] for lane in epochs.lanes}  # up to which all windows were opened
        self._given = dict(self._round)
        self._over_at = dict.fromkeys(epochs.lanes, 0)  # no window of a lane is over before this sample
        self._is_changed = True
        self._line(min(self._round.values()))

    def open_windows(self) -> Iterator[RoundKey]:
        """The windows that are open."""
        return ((round_no, key) for round_no, line in self.epochs.lines.items() for key in line.open_windows)

    def objects_of(self, key: RoundKey) -> NDArray[np.int32]:
        """The object numbers of a window, int32."""
        return self.epochs.glimpse(key[0]).objects_of(key[1])

    def tell(self, object_nos: NDArray[np.int32], counts: NDArray[np.int64]) -> None:
        """The sample counts of some objects, which are the same in every round."""
        self._is_changed, self._over_at = True, dict.fromkeys(self._over_at, 0)
        self.epochs.tell(object_nos, counts)

    def add(self, key: RoundKey, counts: NDArray[np.int64]) -> None:
        """A window is open, and these are the counts of its objects."""
        line = self._line(key[0])
        line.add(key[1], counts)
        self.tell(line.objects_of(key[1]), counts)

    def skip_to(self, lane: int, sample: int) -> None:
        """Nobody here needs samples of `lane` before `sample`."""
        self._skipped[lane], self._is_changed = sample, True
        round_no, number = self.epochs.locate(lane, sample)
        self._round[lane] = max(round_no, self._round[lane])
        if round_no in self.epochs.lines:
            self.epochs.lines[round_no].lanes[lane].skip_to(number)

    def extend(self) -> bool:
        """Let lanes go on through windows that are open; whether anything may have changed since the last time."""
        is_changed, self._is_changed = self._is_changed, False
        if is_changed:
            for line in self.epochs.lines.values():
                line.extend()
        return is_changed

    def reach(self, lane: int) -> int:
        """Up to which sample the windows of `lane` are open, and it is known in which round they are."""
        quota = self.epochs.quota(lane)
        if not self.epochs.has_rounds:
            return min(quota, self.epochs.lines[0].lanes[lane].covered)
        round_no = self._round[lane]
        while round_no in self.epochs.lines and self.epochs.lines[round_no].lanes[lane].covered >= quota:
            round_no += 1
        self._round[lane] = round_no
        if round_no in self.epochs.lines:
            return round_no * quota + self.epochs.lines[round_no].lanes[lane].covered
        return max(round_no * quota, self._skipped[lane])

    def due(self, lane: int, end: int) -> list[tuple[int, RoundKey]]:
        """The window, if any, that has to be opened for `lane` to reach sample `end`, and the sample from which it is
        needed; none where a count must be told before.
        """
        return [
            (round_no * self.epochs.quota(lane) + number, (round_no, key))
            for round_no, local_end in self._missing(lane, end)
            for number, key in self._line(round_no).due(lane, local_end)
        ]

    def wanted(self, lanes: Sequence[int], ends: Sequence[int]) -> NDArray[np.int32]:
        """Objects whose counts must be told before `lanes` can go on to samples `ends`."""
        missing: dict[int, list[Span]] = {}
        for lane, end in zip(lanes, ends, strict=True):
            for round_no, local_end in self._missing(lane, end):
                missing.setdefault(round_no, []).append((lane, 0, local_end))
        found = [self._line(round_no).wanted(spans) for round_no, spans in missing.items()]
        return np.unique(np.concatenate([np.empty(0, np.int32), *found]))

    def next_uncounted(self, partitions: Sequence[int]) -> NDArray[np.int32]:
        """The objects without counts of the next window that has any, of each of `partitions`, int32. Only while the
        number of samples is not known.
        """
        return self.epochs.lines[0].next_uncounted(partitions)

    def forget_before(self, lane: int, sample: int) -> None:
        """Samples of `lane` before `sample` are not needed any more."""
        if sample < self._over_at[lane]:
            return
        self._given[lane], number = self.epochs.locate(lane, sample)
        for round_no, line in self.epochs.lines.items():
            if round_no <= self._given[lane] and lane in line.lanes:
                line.lanes[lane].forget_before(number if round_no == self._given[lane] else _ALL)
        current, base = self.epochs.lines.get(self._given[lane]), sample - number
        legs = current.lanes[lane].legs if current is not None else []
        end = base + legs[0].stop if legs else 0
        self._over_at[lane] = min(end, base + self.epochs.quota(lane)) if self.epochs.has_rounds else end

    def close_all_but(self, kept: RoundKey | None) -> None:
        """Close the windows that no lane needs from where it was forgotten on, but for `kept`."""
        for round_no, line in self.epochs.lines.items():
            line.close_all_but(kept[1] if kept is not None and kept[0] == round_no else None)
        self.epochs.end_before(min(self._given.values()))

    def samples_of(self, lane: int, samples: NDArray[np.int64]) -> Iterator[tuple[int, slice, Samples]]:
        """Some samples of a lane, rising: for each round in which they lie, which of them these are, and themselves."""
        first, last = (self.epochs.locate(lane, int(sample))[0] for sample in (samples[0], samples[-1]))
        for round_no in range(first, last + 1):
            base = round_no * self.epochs.quota(lane)
            low, high = 0, len(samples)
            if first < last:
                low, high = np.searchsorted(samples, (base, base + self.epochs.quota(lane))).tolist()
            yield round_no, slice(low, high), self.epochs.lines[round_no].samples_of(lane, samples[low:high] - base)

    def find(self, lane: int, sample: int) -> tuple[RoundKey, int, int] | None:
        """Window, offset and the window's samples, of a sample of a lane, whoever reads it; None where counts that are
        still missing could move it.
        """
        round_no, number = self.epochs.locate(lane, sample)
        found = self.epochs.glimpse(round_no).find(lane, number)
        return None if found is None else ((round_no, found[0]), found[1], found[2])

    def wanted_to_find(self, lane: int, sample: int) -> NDArray[np.int32]:
        """Objects whose counts must be told before `find` can answer, int32."""
        return self.epochs.glimpse(self.epochs.locate(lane, sample)[0]).uncounted_objects()

    def sample_at(self, key: RoundKey, offset: int) -> Samples:
        """The one sample at an offset in an open window."""
        return self.epochs.lines[key[0]].sample_at(key[1], offset)

    def position(self, samples: Sequence[int]) -> SourcePosition:
        """Where the source stands when lanes have given so many samples."""
        located = [self.epochs.locate(lane, sample) for lane, sample in enumerate(samples)]
        numbers = [number for _, number in located]
        taken, places = list(numbers), [Place(0, 0)] * len(numbers)
        for round_no in sorted({round_no for round_no, number in located if number}):
            line = self.epochs.glimpse(round_no)
            taken_here = line.taken(numbers)
            places_here = line.places(taken_here)
            for lane in (lane for lane, at in enumerate(located) if at[0] == round_no):
                taken[lane], places[lane] = taken_here[lane], places_here[lane]
        return SourcePosition(self.epochs.total, tuple(places), () if taken == numbers else tuple(taken))

    def windows_from(self, lane: int, sample: int, samples_a_byte: float) -> Iterator[list[tuple[int, RoundKey]]]:
        """Round by round from `sample` on, the windows to which a lane comes, each with the sample where it does.

        While counts are missing it is taken to go through its own partition, with so many samples a byte everywhere.
        """
        round_no, number = self.epochs.locate(lane, sample)
        while True:
            line, quota = self.epochs.glimpse(round_no), self.epochs.quota(lane)
            if line.total is None:
                byte_count = int(line.orders[lane].window_bytes.sum())
                quota = quota if self.epochs.total is not None else max(quota, int(byte_count * samples_a_byte), 1)
                windows = line.windows_guessed(lane, number, quota)
            else:
                windows = line.windows_of(lane, number)
            yield [(round_no * quota + at, (round_no, key)) for at, key in windows]
            if not self.epochs.is_endless:
                return
            round_no, number = round_no + 1, 0

    def _missing(self, lane: int, end: int) -> list[tuple[int, int]]:
        """The round in which `lane` has to go on to reach sample `end`, and up to which number there; if it has to."""
        at, quota = self.reach(lane), self.epochs.quota(lane)
        if self.epochs.total is not None and not self.epochs.is_endless:
            end = min(end, quota)
        if at >= end:
            return []
        if not self.epochs.has_rounds:
            return [(0, end)]
        round_no = self._round[lane]
        return [(round_no, min(end - round_no * quota, quota))]

    def _line(self, round_no: int) -> Line:
        if round_no not in self.epochs.lines:
            line = self.epochs.line(round_no)
            for lane, sample in self._skipped.items():
                skipped_round, number = self.epochs.locate(lane, sample)
                if skipped_round == round_no:
                    line.lanes[lane].skip_to(number)
        return self.epochs.lines[round_no]
