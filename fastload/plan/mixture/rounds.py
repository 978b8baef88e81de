"""One source of a mixture: its lanes, through one epoch after the other.

A lane of a source goes through its part of the source's epoch, its *quota* (see `lanes`), and then on with the same
lane of the source's next epoch, without end: sample c of the lane is number c mod quota of *round* c div quota. The
quota follows from how many samples the source has, so it is the same in every round. While that is not known, only
those samples are settled that are certain to lie in the first round. Lanes need not be in the same round: their quotas
differ by up to a sample.

A round's line is made when a lane comes to it, and kept while one is in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastload.errors import ConfigError, StateError
from fastload.plan.deal import Span
from fastload.plan.lanes import lane_length, lane_lengths
from fastload.plan.line import Line
from fastload.plan.manifest import Manifest
from fastload.plan.mixture.position import SourcePosition
from fastload.plan.order import OrderOptions, epoch_orders
from fastload.plan.position import Place, check_place
from fastload.plan.samples import Samples
from fastload.plan.tally import WindowKey

# Lines of rounds that are over are kept for a while, since it may be asked where in them a batch ended.
_LINES_KEPT = 2

_ALL = 1 << 62

RoundKey = tuple[int, WindowKey]


class SourcePlan(NamedTuple):
    """One source: its data and the order of its samples."""

    manifest: Manifest
    options: OrderOptions


class Rounds:
    """Source number `source` of a mixture, read from the epoch `first_epoch` on.

    `samples` says how many of its samples each lane has given before `start`; `lanes` are those that this node may
    need. Unless `is_endless`, there is one round, and nothing is asked of what lies beyond.
    """

    def __init__(
        self,
        source: int,
        plan: SourcePlan,
        first_epoch: int,
        lanes: Sequence[int],
        samples: Sequence[int],
        start: SourcePosition,
        *,
        is_endless: bool,
    ) -> None:
        self._source, self._plan, self._first_epoch, self._lanes = source, plan, first_epoch, lanes
        self._start, self._is_endless = start, is_endless
        self._counts = np.full(len(plan.manifest), -1, np.int64)
        self.total: int | None = None  # how many samples the source has, once that is known
        if start.total is not None:
            self._learn_total(start.total)
        self._began = [self._locate(lane, sample) for lane, sample in enumerate(samples)]
        self._skipped = {lane: samples[lane] for lane in lanes}  # samples before that are not needed here
        self._round = {lane: self._began[lane][0] for lane in lanes}  # up to which all windows were opened
        self._given = dict(self._round)
        self._lines: dict[int, Line] = {}
        self._over: dict[int, Line] = {}
        self._line(min(self._round.values()))

    @property
    def known(self) -> int:
        """It has this many samples at least."""
        return self._lines[0].known if self.total is None else self.total

    def quotas(self) -> NDArray[np.int64]:
        """How many samples each lane has in a round, int64; at least so many, while that is not known."""
        return lane_lengths(self.known, self._plan.options.partitions)

    def open_windows(self) -> Iterator[RoundKey]:
        """The windows that are open."""
        return ((round_no, key) for round_no, line in self._lines.items() for key in line.open_windows)

    def objects_of(self, key: RoundKey) -> NDArray[np.int32]:
        """The object numbers of a window, int32."""
        return self._line(key[0]).objects_of(key[1])

    def tell(self, object_nos: NDArray[np.int32], counts: NDArray[np.int64]) -> None:
        """The sample counts of some objects, which are the same in every round."""
        for line in self._lines.values():
            line.tell(object_nos, counts)
        self._counts[object_nos] = counts
        for line in self._lines.values():
            if line.total is not None:
                self._learn_total(line.total)

    def add(self, key: RoundKey, counts: NDArray[np.int64]) -> None:
        """A window is open, and these are the counts of its objects."""
        line = self._line(key[0])
        line.add(key[1], counts)
        self.tell(line.objects_of(key[1]), counts)

    def skip_to(self, lane: int, sample: int) -> None:
        """Nobody here needs samples of `lane` before `sample`."""
        self._skipped[lane] = sample
        round_no, number = self._locate(lane, sample)
        self._round[lane] = max(round_no, self._round[lane])
        if round_no in self._lines:
            self._lines[round_no].skip_to(lane, number)

    def extend(self) -> None:
        """Let lanes go on through windows that are open."""
        for line in self._lines.values():
            line.extend()

    def reach(self, lane: int) -> int:
        """Up to which sample the windows of `lane` are open, and it is known in which round they are."""
        quota = self._quota(lane)
        if not self._has_rounds:
            return min(quota, self._lines[0].reach(lane))
        round_no = self._round[lane]
        while round_no in self._lines and self._lines[round_no].reach(lane) >= quota:
            round_no += 1
        self._round[lane] = round_no
        if round_no in self._lines:
            return round_no * quota + self._lines[round_no].reach(lane)
        return max(round_no * quota, self._skipped[lane])

    def due(self, lane: int, end: int) -> list[tuple[int, RoundKey]]:
        """The window, if any, that has to be opened for `lane` to reach sample `end`, and the sample from which it is
        needed; none where a count must be told before.
        """
        return [
            (round_no * self._quota(lane) + number, (round_no, key))
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
        return self._lines[0].next_uncounted(partitions)

    def forget_before(self, lane: int, sample: int) -> None:
        """Samples of `lane` before `sample` are not needed any more."""
        self._given[lane], number = self._locate(lane, sample)
        for round_no, line in self._lines.items():
            if self._began[lane][0] <= round_no <= self._given[lane]:
                line.forget_before(lane, number if round_no == self._given[lane] else _ALL)

    def close_all_but(self, kept: RoundKey | None) -> None:
        """Close the windows that no lane needs from where it was forgotten on, but for `kept`."""
        oldest = min(self._given.values())
        for round_no, line in list(self._lines.items()):
            line.close_all_but(kept[1] if kept is not None and kept[0] == round_no else None)
            if round_no < oldest and not line.open_windows:
                self._over[round_no] = self._lines.pop(round_no)
        while len(self._over) > _LINES_KEPT:
            del self._over[min(self._over)]

    def samples_of(self, lane: int, samples: NDArray[np.int64]) -> Iterator[tuple[int, slice, Samples]]:
        """Some samples of a lane, rising: for each round in which they lie, which of them these are, and themselves."""
        first, last = (self._locate(lane, int(sample))[0] for sample in (samples[0], samples[-1]))
        for round_no in range(first, last + 1):
            base = round_no * self._quota(lane)
            low, high = 0, len(samples)
            if first < last:
                low, high = np.searchsorted(samples, (base, base + self._quota(lane))).tolist()
            yield round_no, slice(low, high), self._lines[round_no].samples_of(lane, samples[low:high] - base)

    def find(self, lane: int, sample: int) -> tuple[RoundKey, int, int] | None:
        """Window, offset and the window's samples, of a sample of a lane, whoever reads it; None where counts that are
        still missing could move it.
        """
        round_no, number = self._locate(lane, sample)
        found = self._line(round_no).find(lane, number)
        return None if found is None else ((round_no, found[0]), found[1], found[2])

    def wanted_to_find(self, lane: int, sample: int) -> NDArray[np.int32]:
        """Objects whose counts must be told before `find` can answer, int32."""
        return self._line(self._locate(lane, sample)[0]).uncounted_objects()

    def sample_at(self, key: RoundKey, offset: int) -> Samples:
        """The one sample at an offset in an open window."""
        return self._lines[key[0]].sample_at(key[1], offset)

    def position(self, samples: Sequence[int]) -> SourcePosition:
        """Where the source stands when lanes have given so many samples."""
        located = [self._locate(lane, sample) for lane, sample in enumerate(samples)]
        numbers = [number for _, number in located]
        taken, places = list(numbers), [Place(0, 0)] * len(numbers)
        for round_no in sorted({round_no for round_no, _ in located}):
            line = self._line(round_no)
            taken_here = line.taken(numbers)
            places_here = line.places(taken_here)
            for lane in (lane for lane, at in enumerate(located) if at[0] == round_no):
                taken[lane], places[lane] = taken_here[lane], places_here[lane]
        return SourcePosition(self.total, tuple(places), () if taken == numbers else tuple(taken))

    def windows_from(
        self, lane: int, sample: int, samples_a_byte: float, line_of: Callable[[int], Line]
    ) -> Iterator[list[tuple[int, RoundKey]]]:
        """Round by round from `sample` on, the windows to which a lane comes, each with the sample where it does.

        While counts are missing it is taken to go through its own partition, with so many samples a byte everywhere.
        `line_of` is `line_ahead`, or remembers its answers.
        """
        round_no, number = self._locate(lane, sample)
        while True:
            line, quota = line_of(round_no), self._quota(lane)
            if line.total is None:
                byte_count = int(line.orders[lane].window_bytes.sum())
                quota = quota if self.total is not None else max(quota, int(byte_count * samples_a_byte), 1)
                windows = line.windows_guessed(lane, number, quota)
            else:
                windows = line.windows_of(lane, number)
            yield [(round_no * quota + at, (round_no, key)) for at, key in windows]
            if not self._is_endless:
                return
            round_no, number = round_no + 1, 0

    def line_ahead(self, round_no: int) -> Line:
        """The line of a round, to look at; whether it has begun or not."""
        return self._lines[round_no] if round_no in self._lines else self._made(round_no)

    def samples_a_byte(self) -> float | None:
        """How many samples a byte holds, where any object is counted."""
        is_counted = self._counts >= 0
        byte_count = int(self._plan.manifest.sizes[is_counted].sum())
        return int(self._counts[is_counted].sum()) / byte_count if byte_count else None

    @property
    def _has_rounds(self) -> bool:
        """Whether samples are known to lie in one round or another, by the number of samples."""
        return self._is_endless and self.total is not None

    def _quota(self, lane: int) -> int:
        return lane_length(lane, self.known, self._plan.options.partitions)

    def _locate(self, lane: int, sample: int) -> tuple[int, int]:
        """The round of a sample of a lane, and its number there."""
        return divmod(sample, self._quota(lane)) if self._has_rounds else (0, sample)

    def _missing(self, lane: int, end: int) -> list[tuple[int, int]]:
        """The round in which `lane` has to go on to reach sample `end`, and up to which number there; if it has to."""
        at, quota = self.reach(lane), self._quota(lane)
        if self.total is not None and not self._is_endless:
            end = min(end, quota)
        if at >= end:
            return []
        if not self._has_rounds:
            return [(0, end)]
        round_no = self._round[lane]
        return [(round_no, min(end - round_no * quota, quota))]

    def _line(self, round_no: int) -> Line:
        if round_no not in self._lines:
            line = self._over.pop(round_no, None) or self._made(round_no)
            self._lines[round_no] = line
            for lane in self._lanes:
                skipped_round, number = self._locate(lane, self._skipped[lane])
                if skipped_round == round_no:
                    line.skip_to(lane, number)
        return self._lines[round_no]

    def _made(self, round_no: int) -> Line:
        orders = epoch_orders(self._plan.manifest, self._plan.options, self._first_epoch + round_no)
        starts = {lane: self._began[lane] for lane in self._lanes if self._began[lane][0] <= round_no}
        taken, places = [0] * len(orders), [Place(0, 0)] * len(orders)
        for lane, (began, number) in enumerate(self._began):
            if began == round_no:
                taken[lane] = self._start.taken[lane] if self._start.taken else number
                places[lane] = self._start.places[lane]
                check_place(places[lane], orders[lane].window_count)
        line = Line(orders, {lane: at[1] if at[0] == round_no else 0 for lane, at in starts.items()}, places, taken)
        is_counted = np.flatnonzero(self._counts >= 0).astype(np.int32)
        line.tell(is_counted, self._counts[is_counted])
        return line

    def _learn_total(self, total: int) -> None:
        if self.total is not None and total != self.total:
            raise StateError(
                f"the state was saved with {self.total} samples in source {self._source}, but there are {total}: the "
                "shards are not those it was saved with; load another state"
            )
        partitions = self._plan.options.partitions
        if total < partitions:
            raise ConfigError(
                f"source {self._source} of the mixture has {total} samples for {partitions} partitions, and needs one "
                "for each; leave it out, or lower partitions"
            )
        self.total = total
