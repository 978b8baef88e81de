"""The sequence of one data set in one epoch, as far as it is known.

What is known are sample counts that were told and windows that are open; from these follows how far each lane reaches,
which windows or counts it needs to reach further, and which samples stand at its numbers. Nothing here knows who reads
the line, or how far he is; he says which windows may be closed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastload.errors import StateError
from fastload.plan.assignment import LaneSpan
from fastload.plan.epoch_counts import EpochCounts
from fastload.plan.lanes import LaneQuotas, PartitionRange, lane_length
from fastload.plan.lookahead import windows_by_bytes
from fastload.plan.order import EpochOrder, WindowKey
from fastload.plan.position import Place
from fastload.plan.samples import NO_SAMPLES, OpenWindow, Samples


class NextWindow(NamedTuple):
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
        self._pieces: list[PartitionRange] | None = None  # None: its own partition, to an end that is not known yet
        self._stop: NextWindow | None = None  # the next, where it is known for good

    def level(self, levels: LaneQuotas) -> None:
        """From now on the lane's end is known, and what it holds beyond its own partition."""
        own = int(levels.own[self.number])
        if self.legs and self.covered > own:
            self.covered = own
            self.legs = [leg._replace(stop=min(leg.stop, own)) for leg in self.legs if leg.start < own]
        self._pieces, self._stop = levels.pieces(self.number, self.covered, int(levels.quota[self.number])), None

    def stop(self, tally: EpochCounts) -> NextWindow | None:
        """The next window that the lane needs open; None at its end, or while what follows is not known."""
        if self._stop is None or not self._stop.length:
            self._stop = self._find_stop(tally)
        return self._stop

    def _find_stop(self, tally: EpochCounts) -> NextWindow | None:
        piece = (
            PartitionRange(self.number, self.covered, 1 << 62)
            if self._pieces is None
            else next(iter(self._pieces), None)
        )
        found = None if piece is None else tally.find(piece.partition, piece.start)
        if piece is None or found is None:
            return None
        window, offset, count = found
        length = 0 if count < 0 else min(count - offset, piece.stop - piece.start)
        return NextWindow(WindowKey(piece.partition, window), offset, length)

    def take(self, stop: NextWindow) -> None:
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


class EpochSequence:
    """`orders` are those of all partitions. `starts` are the lanes that are walked through, and from which number.

    What lies before `places` is not counted: `taken` says how many samples of each partition that is, or more where it
    has fewer. `lanes` says how far each is; whoever reads them may let one skip, and forget, what he does not need.
    """

    def __init__(
        self,
        orders: Sequence[EpochOrder],
        starts: Mapping[int, int],
        places: Sequence[Place],
        taken: Sequence[int],
    ) -> None:
        self.orders = tuple(orders)
        self._partitions, self._places = len(orders), places
        self._tally = EpochCounts(orders, places, taken)
        self.lanes = {lane: Lane(lane, number) for lane, number in starts.items()}
        self._open: dict[WindowKey, OpenWindow] = {}
        self._levels: LaneQuotas | None = None
        self._level()

    @property
    def total(self) -> int | None:
        """Its samples; None while not all are counted."""
        return None if self._levels is None else self._levels.total

    @property
    def known(self) -> int:
        """It has this many samples at least."""
        return self._tally.at_least if self._levels is None else self._levels.total

    @property
    def open_windows(self) -> Collection[WindowKey]:
        """The windows that are open."""
        return self._open.keys()

    def objects_of(self, key: WindowKey) -> NDArray[np.int32]:
        """The object numbers of a window, int32."""
        return self.orders[key.partition].window_objects(key.window)

    def tell(self, object_nos: NDArray[np.int32], counts: NDArray[np.int64]) -> None:
        """The sample counts of some objects. Raises `StateError` where one was told otherwise."""
        self._tally.tell(object_nos, counts)
        self._level()

    def add(self, key: WindowKey, counts: NDArray[np.int64]) -> None:
        """A window is open, and these are the counts of its objects. Raises `StateError` as `tell` does, and where the
        line starts beyond the window's samples.
        """
        objects = self.objects_of(key)
        assert len(counts) == len(objects), f"{len(counts)} counts for {len(objects)} objects"
        assert not len(counts) or counts.min() >= 0, "a sample count is negative"
        total = int(counts.sum())
        self._check_start(key, total)
        permutation = self.orders[key.partition].window_permutation(key.window, total)
        self._tally.tell(objects, counts)
        self._open[key] = OpenWindow(permutation, objects, counts)
        self._level()

    def close_all_but(self, kept: WindowKey | None) -> None:
        """Close the windows that no lane needs from where it was forgotten on, but for `kept`."""
        needed = {leg.key for lane in self.lanes.values() for leg in lane.legs} | {kept}
        self._open = {key: window for key, window in self._open.items() if key in needed}

    def skip(self, spans: Sequence[LaneSpan]) -> None:
        """Nobody here needs what lanes hold before their `spans`."""
        for lane, start, _ in spans:
            self.lanes[lane].skip_to(start)

    def forget(self, position: int) -> None:
        """What lies before `position` is not needed any more."""
        for lane in self.lanes.values():
            lane.forget_before(lane_length(lane.number, position, self._partitions))

    def extend(self) -> None:
        """Let lanes go on through windows that are open."""
        for lane in self.lanes.values():
            while (stop := lane.stop(self._tally)) is not None and stop.key in self._open:
                lane.take(stop)

    def reaches(self) -> dict[int, int]:
        """For each lane up to which number its windows are open."""
        return {number: lane.covered for number, lane in self.lanes.items()}

    def due_in(self, spans: Sequence[LaneSpan]) -> list[tuple[int, WindowKey]]:
        """The windows that have to be opened for lanes to reach the ends of their `spans`, each with the position from
        which it is needed.
        """
        return [
            (number * self._partitions + lane, key) for lane, _, end in spans for number, key in self.due(lane, end)
        ]

    def due(self, lane: int, end: int) -> list[tuple[int, WindowKey]]:
        """The window, if any, that has to be opened for `lane` to reach `end`, and the number from which it is needed;
        none where a count must be told before.
        """
        found = self.lanes[lane]
        stop = found.stop(self._tally) if found.covered < end else None
        return [(found.covered, stop.key)] if stop is not None and self._is_due(found, stop) else []

    def wanted(self, spans: Sequence[LaneSpan]) -> NDArray[np.int32]:
        """Objects whose counts must be told before lanes can go on to the ends of their `spans`; those of the next
        windows, or all where a lane has come to the end of its partition.
        """
        missing = [self.lanes[lane] for lane, _, end in spans if self.lanes[lane].covered < end]
        if any(lane.stop(self._tally) is None for lane in missing):
            return self._tally.uncounted_objects()
        return self._tally.next_uncounted([lane.number for lane in missing])

    def next_uncounted(self, partitions: Sequence[int]) -> NDArray[np.int32]:
        """The objects without counts of the next window that has any, of each of `partitions`, int32."""
        return self._tally.next_uncounted(partitions)

    def uncounted_objects(self) -> NDArray[np.int32]:
        """All objects whose counts are missing, int32."""
        return self._tally.uncounted_objects()

    def samples(self, positions: NDArray[np.int64]) -> Samples:
        """The samples at some positions, rising, that lanes have reached."""
        if self._partitions == 1:
            return self.samples_of(0, positions)
        # numpy sorts small integers by their digits, in a tenth of the time.
        lanes = (positions % self._partitions).astype(np.min_scalar_type(self._partitions))
        by_lane = np.argsort(lanes, kind="stable")
        numbers = positions[by_lane] // self._partitions
        ends = np.cumsum(np.bincount(lanes, minlength=self._partitions)).tolist()
        parts = [
            self.samples_of(lane, numbers[start:end])
            for lane, (start, end) in enumerate(pairwise((0, *ends)))
            if start < end
        ]
        return Samples.joined(parts).placed(by_lane) if parts else NO_SAMPLES

    def samples_of(self, lane: int, numbers: NDArray[np.int64]) -> Samples:
        """The samples at rising numbers of one lane."""
        legs = self.lanes[lane].legs
        if len(numbers) and numbers[-1] < legs[0].stop:  # mostly, and then there is nothing to look for
            return self._samples_of_leg(legs[0], numbers)
        bounds = np.searchsorted(numbers, [leg.start for leg in legs] + [leg.stop for leg in legs[-1:]])
        parts = [
            self._samples_of_leg(leg, numbers[first:stop])
            for leg, first, stop in zip(legs, bounds, bounds[1:], strict=False)
            if first < stop
        ]
        return Samples.joined(parts) if parts else NO_SAMPLES

    def _samples_of_leg(self, leg: Leg, numbers: NDArray[np.int64]) -> Samples:
        return self._open[leg.key].located(numbers - (leg.start - leg.offset), leg.key)

    def find(self, lane: int, number: int) -> tuple[WindowKey, int, int] | None:
        """Window, offset and the window's samples, of a number of a lane, whoever reads it; None where counts that
        are still missing could move it.
        """
        if self._levels is None:
            return None
        piece = self._levels.pieces(lane, number, number + 1)[0]
        found = self._tally.find(piece.partition, piece.start)
        assert found is not None, "a number below the quota lies in a window"
        return WindowKey(piece.partition, found[0]), found[1], found[2]

    def sample_at(self, key: WindowKey, offset: int) -> Samples:
        """The one sample at an offset in an open window."""
        return self._open[key].located(np.array([offset]), key)

    def taken(self, lengths: Sequence[int]) -> list[int]:
        """How many of each partition's samples lanes of some lengths have taken from its front; all that there are
        where that is known to be fewer.
        """
        return [self._taken(partition, length) for partition, length in enumerate(lengths)]

    def totals(self) -> list[int]:
        """The samples of each partition. Only once all are counted."""
        return [int(count) for count in self._tally.totals()]

    def places(self, taken: Sequence[int]) -> tuple[Place, ...]:
        """The place in each partition after so many of its samples."""
        return tuple(self._tally.place(partition, number) for partition, number in enumerate(taken))

    def windows_ahead(self, starts: Mapping[int, int], places: Sequence[Place]) -> list[WindowKey]:
        """The windows that lanes need from `starts` on, in the order in which positions come to them, each once.

        Before all counts are known, partitions are taken from `places` on, and to hold as many samples a byte.
        """
        if self._levels is None:
            return windows_by_bytes(self.orders, list(starts), places)
        first: dict[WindowKey, int] = {}
        for lane, number in starts.items():
            for at, key in self.windows_of(lane, number):
                position = at * self._partitions + lane
                first[key] = min(position, first.get(key, position))
        return sorted(first, key=lambda key: (first[key], key))

    def windows_of(self, lane: int, start: int) -> list[tuple[int, WindowKey]]:
        """From `start` on, where `lane` comes to a window, and which. Only once all is counted."""
        assert self._levels is not None, "not all sample counts are known"
        found = []
        for piece in self._levels.pieces(lane, start, int(self._levels.quota[lane])):
            for key, sample in self._tally.windows(*piece):
                found.append((start + sample - piece.start, key))
            start += piece.stop - piece.start
        return found

    def windows_guessed(self, lane: int, start: int, quota: int) -> list[tuple[int, WindowKey]]:
        """The same before all is counted, if `lane` has `quota` samples, its partition's alone, and a byte of it is as
        many samples everywhere.
        """
        order = self.orders[lane]
        first = self._tally.place(lane, self._taken(lane, start)).window
        ends = np.cumsum(order.window_bytes)
        numbers = (ends - order.window_bytes) * (quota / max(1, int(ends[-1]) if len(ends) else 1))
        return [
            (max(start, int(number)), WindowKey(lane, first + i)) for i, number in enumerate(numbers[first:].tolist())
        ]

    def _is_due(self, lane: Lane, stop: NextWindow) -> bool:
        """Whether a lane needs a window, or may lie beyond its end, which only a count can tell."""
        is_start = lane.covered == lane.first and stop.key.window == self._places[lane.number].window
        return stop.length > 0 or stop.offset == 0 or is_start

    def _taken(self, partition: int, length: int) -> int:
        counted = self._tally.length(partition)
        return length if counted is None else min(length, counted)

    def _check_start(self, key: WindowKey, count: int) -> None:
        window, offset = self._places[key.partition]
        # With several partitions an offset may reach beyond its window, and the whole partition is looked at.
        if self._partitions == 1 and key.window == window and offset and offset >= count:
            raise StateError(
                f"the state is at sample {offset} of window {window}, which has {count} samples: "
                "the shards are not those it was saved with; load another state"
            )

    def _level(self) -> None:
        """Once everything is counted: settle where lanes end."""
        if self._levels is None and self._tally.is_complete:
            self._levels = LaneQuotas(self._tally.totals())
            for lane in self.lanes.values():
                lane.level(self._levels)
