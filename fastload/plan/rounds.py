"""One source of a mixture: the sequences of those of its epochs that are being read, and its lanes through them.

The epochs that are read are counted in *rounds*, from the one with which the mixture begins. Sample c of a lane lies in
round c div quota, where the lane's *quota* is its length in an epoch of the source (see `lanes`). It follows from how
many samples the source has, so it is the same in every round. While that is not known all samples are taken to lie in
the first, and callers make sure that none is needed that might not.

A lane of a source goes through its part of the source's epoch and continues with the same lane of the source's next
epoch, without end. Lanes need not be in the same round: their quotas differ by up to a sample. A round's sequence is
made when a lane comes to it, and kept while one is in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from fastload.errors import ConfigError, StateError
from fastload.plan.assignment import LaneSpan
from fastload.plan.lanes import lane_length, lane_lengths
from fastload.plan.order import SourcePlan, WindowKey, epoch_orders
from fastload.plan.position import Place, SourcePosition, check_place
from fastload.plan.samples import Samples
from fastload.plan.sequence import EpochSequence

# Sequences that are not being read are kept for a while: of rounds that are over, since it may be asked where in them a
# batch ended, and of those to come, whose windows are fetched ahead.
_SEQUENCES_ASIDE = 4


class SourceEpochs:
    """Source number `source` of a mixture, read from the epoch `first_epoch` on; one epoch, unless `is_endless`.

    `samples` says how many of its samples each lane has given before `start`; `lanes` are those that this node may
    need.
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
        self._source, self._plan, self._first_epoch, self.lanes = source, plan, first_epoch, lanes
        self._start, self.is_endless = start, is_endless
        self._counts = np.full(len(plan.manifest), -1, np.int64)
        self.sequences: dict[int, EpochSequence] = {}
        self._aside: dict[int, EpochSequence] = {}  # in the order of their last use
        self.total: int | None = None  # its samples, once that is known
        if start.total is not None:
            self._learn_total(start.total)
        self.began = [self.locate(lane, sample) for lane, sample in enumerate(samples)]

    @property
    def known(self) -> int:
        """It has this many samples at least."""
        return self.sequences[0].known if self.total is None else self.total

    @property
    def has_rounds(self) -> bool:
        """Whether it is known which samples lie in which round."""
        return self.is_endless and self.total is not None

    def quotas(self) -> NDArray[np.int64]:
        """How many samples each lane has in a round, int64; at least so many, while that is not known."""
        return lane_lengths(self.known, self._plan.options.partitions)

    def quota(self, lane: int) -> int:
        """The same for one lane."""
        return lane_length(lane, self.known, self._plan.options.partitions)

    def round_of(self, key: WindowKey) -> int:
        """The round in which a window lies."""
        return key.epoch - self._first_epoch

    def locate(self, lane: int, sample: int) -> tuple[int, int]:
        """The round of a sample of a lane, and its number there."""
        return divmod(sample, self.quota(lane)) if self.has_rounds else (0, sample)

    def add_counts(self, object_nos: NDArray[np.int32], counts: NDArray[np.int64]) -> None:
        """The sample counts of some objects, which are the same in every round."""
        for sequence in (*self.sequences.values(), *self._aside.values()):
            sequence.add_counts(self._source, object_nos, counts)
        self._counts[object_nos] = counts
        for sequence in self.sequences.values():
            if sequence.total is not None:
                self._learn_total(sequence.total)

    def sequence(self, round_no: int) -> EpochSequence:
        """The sequence of a round, which is being read from now on."""
        if round_no not in self.sequences:
            self.sequences[round_no] = self.glimpse(round_no)
            del self._aside[round_no]
        return self.sequences[round_no]

    def glimpse(self, round_no: int) -> EpochSequence:
        """The sequence of a round, to look at."""
        if round_no in self.sequences:
            return self.sequences[round_no]
        sequence = self._aside.pop(round_no, None)
        if sequence is None:
            sequence, is_counted = self._made(round_no), np.flatnonzero(self._counts >= 0).astype(np.int32)
            sequence.add_counts(self._source, is_counted, self._counts[is_counted])
        self._put_aside(round_no, sequence)
        return sequence

    def end_before(self, round_no: int) -> None:
        """Rounds before are over, but for those with open windows."""
        for number in [
            number for number, sequence in self.sequences.items() if number < round_no and not sequence.open_windows
        ]:
            self._put_aside(number, self.sequences.pop(number))

    def samples_a_byte(self) -> float | None:
        """How many samples a byte holds, where any object is counted."""
        is_counted = self._counts >= 0
        byte_count = int(self._plan.manifest.sizes[is_counted].sum())
        return int(self._counts[is_counted].sum()) / byte_count if byte_count else None

    def _put_aside(self, round_no: int, sequence: EpochSequence) -> None:
        self._aside[round_no] = sequence
        if len(self._aside) > _SEQUENCES_ASIDE:
            del self._aside[next(iter(self._aside))]

    def _made(self, round_no: int) -> EpochSequence:
        orders = epoch_orders(self._plan.manifest, self._plan.options, self._first_epoch + round_no)
        taken, places = [0] * len(orders), [Place(0, 0)] * len(orders)
        for lane, (began, number) in enumerate(self.began):
            if began == round_no:
                taken[lane] = self._start.taken[lane] if self._start.taken else number
                places[lane] = self._start.places[lane]
                check_place(places[lane], orders[lane].window_count)
        began_here = {lane: self.began[lane] for lane in self.lanes if self.began[lane][0] <= round_no}
        starts = {lane: number if began == round_no else 0 for lane, (began, number) in began_here.items()}
        return EpochSequence(orders, starts, places, taken, self._source)

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


_ALL = 1 << 62


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
        self._sequence(min(self._round.values()))

    def open_windows(self) -> Iterator[WindowKey]:
        return (key for sequence in self.epochs.sequences.values() for key in sequence.open_windows)

    def objects_of(self, key: WindowKey) -> NDArray[np.int32]:
        """The object numbers of a window, int32."""
        return self.epochs.glimpse(self.epochs.round_of(key)).objects_of(key)

    def add_counts(self, object_nos: NDArray[np.int32], counts: NDArray[np.int64]) -> None:
        """The sample counts of some objects, which are the same in every round."""
        self._is_changed, self._over_at = True, dict.fromkeys(self._over_at, 0)
        self.epochs.add_counts(object_nos, counts)

    def add(self, key: WindowKey, counts: NDArray[np.int64]) -> None:
        """A window is open, and these are the counts of its objects."""
        sequence = self._sequence(self.epochs.round_of(key))
        sequence.add(key, counts)
        self.add_counts(sequence.objects_of(key), counts)

    def skip_to(self, lane: int, sample: int) -> None:
        """No rank of this node needs samples of `lane` before `sample`."""
        self._skipped[lane], self._is_changed = sample, True
        round_no, number = self.epochs.locate(lane, sample)
        self._round[lane] = max(round_no, self._round[lane])
        if round_no in self.epochs.sequences:
            self.epochs.sequences[round_no].lanes[lane].skip_to(number)

    def extend(self) -> bool:
        """Let lanes continue through windows that are open; whether anything may have changed since the last time."""
        is_changed, self._is_changed = self._is_changed, False
        if is_changed:
            for sequence in self.epochs.sequences.values():
                sequence.extend()
        return is_changed

    def reach(self, lane: int) -> int:
        """Up to which sample the windows of `lane` are open, and it is known in which round they are."""
        quota = self.epochs.quota(lane)
        if not self.epochs.has_rounds:
            return min(quota, self.epochs.sequences[0].lanes[lane].covered)
        round_no = self._round[lane]
        while round_no in self.epochs.sequences and self.epochs.sequences[round_no].lanes[lane].covered >= quota:
            round_no += 1
        self._round[lane] = round_no
        if round_no in self.epochs.sequences:
            return round_no * quota + self.epochs.sequences[round_no].lanes[lane].covered
        return max(round_no * quota, self._skipped[lane])

    def due(self, lane: int, end: int) -> list[tuple[int, WindowKey]]:
        """The window, if any, that has to be opened for `lane` to reach sample `end`, and the sample from which it is
        needed; none where a count is needed first.
        """
        return [
            (round_no * self.epochs.quota(lane) + number, key)
            for round_no, local_end in self._missing(lane, end)
            for number, key in self._sequence(round_no).due(lane, local_end)
        ]

    def wanted(self, lanes: Sequence[int], ends: Sequence[int]) -> NDArray[np.int32]:
        """Objects whose counts are needed before `lanes` can go on to samples `ends`."""
        missing: dict[int, list[LaneSpan]] = {}
        for lane, end in zip(lanes, ends, strict=True):
            for round_no, local_end in self._missing(lane, end):
                missing.setdefault(round_no, []).append((lane, 0, local_end))
        found = [self._sequence(round_no).wanted(spans) for round_no, spans in missing.items()]
        return np.unique(np.concatenate([np.empty(0, np.int32), *found]))

    def next_uncounted(self, partitions: Sequence[int]) -> NDArray[np.int32]:
        """The objects without counts of the next window that has any, of each of `partitions`, int32. Only while the
        number of samples is not known.
        """
        return self.epochs.sequences[0].next_uncounted(partitions)

    def forget_before(self, lane: int, sample: int) -> None:
        """Samples of `lane` before `sample` are not needed any more."""
        if sample < self._over_at[lane]:
            return
        self._given[lane], number = self.epochs.locate(lane, sample)
        for round_no, sequence in self.epochs.sequences.items():
            if round_no <= self._given[lane] and lane in sequence.lanes:
                sequence.lanes[lane].forget_before(number if round_no == self._given[lane] else _ALL)
        current, base = self.epochs.sequences.get(self._given[lane]), sample - number
        legs = current.lanes[lane].legs if current is not None else []
        end = base + legs[0].stop if legs else 0
        self._over_at[lane] = min(end, base + self.epochs.quota(lane)) if self.epochs.has_rounds else end

    def close_all_but(self, kept: WindowKey | None) -> None:
        """Close the windows that no lane needs from where it was forgotten on, but for `kept`."""
        for sequence in self.epochs.sequences.values():
            sequence.close_all_but(kept)
        self.epochs.end_before(min(self._given.values()))

    def samples_of(self, lane: int, samples: NDArray[np.int64]) -> Iterator[tuple[int, slice, Samples]]:
        """Some samples of a lane, rising: for each round in which they lie, which of them these are, and themselves."""
        first, last = (self.epochs.locate(lane, int(sample))[0] for sample in (samples[0], samples[-1]))
        for round_no in range(first, last + 1):
            base = round_no * self.epochs.quota(lane)
            low, high = 0, len(samples)
            if first < last:
                low, high = np.searchsorted(samples, (base, base + self.epochs.quota(lane))).tolist()
            yield round_no, slice(low, high), self.epochs.sequences[round_no].samples_of(lane, samples[low:high] - base)

    def find(self, lane: int, sample: int) -> tuple[WindowKey, int, int] | None:
        """Window, offset and the window's samples, of a sample of any lane; None where counts that are still missing
        could move it.
        """
        round_no, number = self.epochs.locate(lane, sample)
        return self.epochs.glimpse(round_no).find(lane, number)

    def wanted_to_find(self, lane: int, sample: int) -> NDArray[np.int32]:
        """Objects whose counts are needed before `find` can answer, int32."""
        return self.epochs.glimpse(self.epochs.locate(lane, sample)[0]).uncounted_objects()

    def sample_at(self, key: WindowKey, offset: int) -> Samples:
        """The one sample at an offset in an open window."""
        return self.epochs.sequences[self.epochs.round_of(key)].sample_at(key, offset)

    def position(self, samples: Sequence[int]) -> SourcePosition:
        """Where the source stands when lanes have given so many samples."""
        located = [self.epochs.locate(lane, sample) for lane, sample in enumerate(samples)]
        numbers = [number for _, number in located]
        taken, places = list(numbers), [Place(0, 0)] * len(numbers)
        for round_no in sorted({round_no for round_no, number in located if number}):
            sequence = self.epochs.glimpse(round_no)
            taken_here = sequence.taken(numbers)
            places_here = sequence.places(taken_here)
            for lane in (lane for lane, at in enumerate(located) if at[0] == round_no):
                taken[lane], places[lane] = taken_here[lane], places_here[lane]
        return SourcePosition(self.epochs.total, tuple(places), () if taken == numbers else tuple(taken))

    def windows_from(self, lane: int, sample: int, samples_a_byte: float) -> Iterator[list[tuple[int, WindowKey]]]:
        """Round by round from `sample` on, the windows to which a lane comes, each with the sample where it does.

        While counts are missing it is taken to go through its own partition, with so many samples a byte everywhere.
        """
        round_no, number = self.epochs.locate(lane, sample)
        while True:
            sequence, quota = self.epochs.glimpse(round_no), self.epochs.quota(lane)
            if sequence.total is None:
                byte_count = int(sequence.orders[lane].window_bytes.sum())
                quota = quota if self.epochs.total is not None else max(quota, int(byte_count * samples_a_byte), 1)
                windows = sequence.windows_guessed(lane, number, quota)
            else:
                windows = sequence.windows_of(lane, number)
            yield [(round_no * quota + at, key) for at, key in windows]
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

    def _sequence(self, round_no: int) -> EpochSequence:
        if round_no not in self.epochs.sequences:
            sequence = self.epochs.sequence(round_no)
            for lane, sample in self._skipped.items():
                skipped_round, number = self.epochs.locate(lane, sample)
                if skipped_round == round_no:
                    sequence.lanes[lane].skip_to(number)
        return self.epochs.sequences[round_no]
