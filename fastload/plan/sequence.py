"""The samples of one data set in one epoch, in the order in which they are delivered, as far as that is known.

Known are sample counts that were learned and windows that are open. From these follows how far each lane reaches, which
windows or counts it needs to reach further, and which samples stand at its numbers (see `lanes`). A sequence does not
know who reads it, or how far: its reader decides which windows may be closed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
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
from fastload.plan.position import Place, SourcePosition
from fastload.plan.samples import OpenWindow, Origin, Samples, no_samples


class NextWindow(NamedTuple):
    """The next `length` samples of a lane: those of a window from `offset` on.

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
    """How far one lane is covered by open windows, and where it continues."""

    def __init__(self, number: int, start: int, origin: Origin) -> None:
        self.number, self.first, self.covered, self._origin = number, start, start, origin
        self.legs: list[Leg] = []
        self._ranges: list[PartitionRange] | None = None  # None: its own partition, to an end that is not known yet
        self._next: NextWindow | None = None  # where it is known for good

    def end_at(self, quotas: LaneQuotas) -> None:
        """From now on the lane's end is known, and what it holds beyond its own partition."""
        own = int(quotas.own[self.number])
        if self.legs and self.covered > own:
            self.covered = own
            self.legs = [leg._replace(stop=min(leg.stop, own)) for leg in self.legs if leg.start < own]
        self._ranges, self._next = quotas.ranges(self.number, self.covered, int(quotas.quota[self.number])), None

    def next_window(self, counts: EpochCounts) -> NextWindow | None:
        """The next window that the lane needs open; None at its end, or while what follows is not known."""
        if self._next is None or not self._next.length:
            self._next = self._find_next(counts)
        return self._next

    def _find_next(self, counts: EpochCounts) -> NextWindow | None:
        if self._ranges is None:
            coming = PartitionRange(self.number, self.covered, 1 << 62)
        elif self._ranges:
            coming = self._ranges[0]
        else:
            return None
        if (found := counts.find(coming.partition, coming.start)) is None:
            return None
        window, offset, count = found
        length = 0 if count < 0 else min(count - offset, coming.stop - coming.start)
        return NextWindow(WindowKey(*self._origin, coming.partition, window), offset, length)

    def take(self, following: NextWindow) -> None:
        """Go through the next window, which is open."""
        self.legs.append(Leg(self.covered, self.covered + following.length, following.key, following.offset))
        self._move(following.length)

    def skip_to(self, number: int) -> None:
        """No rank of this node needs what lies before `number`."""
        while self.covered < number and (self._ranges is None or self._ranges):
            here = number - self.covered
            self._move(here if self._ranges is None else min(here, self._ranges[0].stop - self._ranges[0].start))

    def forget_before(self, number: int) -> None:
        """Legs that end at or before `number` are over."""
        self.legs = [leg for leg in self.legs if leg.stop > number]

    def _move(self, length: int) -> None:
        self.covered, self._next = self.covered + length, None
        if self._ranges is not None:
            first = self._ranges[0]
            rest = first._replace(start=first.start + length)
            self._ranges[:1] = [rest] if rest.start < rest.stop else []


class EpochSequence:
    """A `SampleSequence`, which says what its methods do.

    `orders` are those of all partitions. `starts` are the lanes that are read, and the number where each begins.

    What lies before `places` is not counted: `taken` says how many samples of each partition that is, or more where it
    has fewer. `lanes` says how far each is; the reader may let one skip, and forget, what it does not need. `source` is
    the data set's number in a mixture.
    """

    def __init__(
        self,
        orders: Sequence[EpochOrder],
        starts: Mapping[int, int],
        places: Sequence[Place],
        taken: Sequence[int],
        source: int = 0,
    ) -> None:
        self.orders = tuple(orders)
        self._partitions, self._places = len(orders), places
        self._source, self._origin = source, (source, orders[0].epoch)
        self._counts = EpochCounts(orders, places, taken)
        self.lanes = {lane: Lane(lane, number, self._origin) for lane, number in starts.items()}
        self._open: dict[WindowKey, OpenWindow] = {}
        self._quotas: LaneQuotas | None = None
        self._set_quotas()

    @property
    def total(self) -> int | None:
        """Its samples; None while not all are counted."""
        return None if self._quotas is None else self._quotas.total

    @property
    def known(self) -> int:
        """It has at least this many samples."""
        return self._counts.at_least if self._quotas is None else self._quotas.total

    @property
    def is_measured(self) -> bool:
        """Whether all samples are counted."""
        return self._quotas is not None

    @property
    def open_windows(self) -> Collection[WindowKey]:
        return self._open.keys()

    def key(self, partition: int, window: int) -> WindowKey:
        return WindowKey(*self._origin, partition, window)

    def objects_of(self, key: WindowKey) -> NDArray[np.int32]:
        """The object numbers of a window, int32."""
        return self.orders[key.partition].window_objects(key.window)

    def add_counts(self, source: int, object_nos: NDArray[np.int32], counts: NDArray[np.int64]) -> None:
        """The sample counts of some objects. Raises `StateError` where another count of one was given before."""
        assert source == self._source, f"counts of source {source} for source {self._source}"
        self._counts.add_counts(object_nos, counts)
        self._set_quotas()

    def add(self, key: WindowKey, counts: NDArray[np.int64]) -> None:
        """A window is open, and these are the counts of its objects. Raises `StateError` as `add_counts` does, and
        where the sequence starts beyond the window's samples.
        """
        objects = self.objects_of(key)
        assert len(counts) == len(objects), f"{len(counts)} counts for {len(objects)} objects"
        assert not len(counts) or counts.min() >= 0, "a sample count is negative"
        total = int(counts.sum())
        self._check_start(key, total)
        permutation = self.orders[key.partition].window_permutation(key.window, total)
        self._counts.add_counts(objects, counts)
        self._open[key] = OpenWindow(permutation, objects, counts)
        self._set_quotas()

    def close_all_but(self, kept: WindowKey | None) -> None:
        needed = {leg.key for lane in self.lanes.values() for leg in lane.legs} | {kept}
        self._open = {key: window for key, window in self._open.items() if key in needed}

    def skip(self, spans: Sequence[LaneSpan]) -> None:
        for lane, start, _ in spans:
            self.lanes[lane].skip_to(start)

    def forget(self, position: int) -> None:
        for lane in self.lanes.values():
            lane.forget_before(lane_length(lane.number, position, self._partitions))

    def extend(self) -> None:
        for lane in self.lanes.values():
            while (following := lane.next_window(self._counts)) is not None and following.key in self._open:
                lane.take(following)

    def reaches(self) -> dict[int, int]:
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
        none where a count is needed first.
        """
        found = self.lanes[lane]
        following = found.next_window(self._counts) if found.covered < end else None
        if following is None or not self._is_due(found, following):
            return []
        return [(found.covered, following.key)]

    def counts_wanted(
        self,
        spans: Sequence[LaneSpan],
        end: int,
        others: Sequence[int],
        home: Sequence[int],
        last: tuple[int, int] | None,
    ) -> dict[int, NDArray[np.int32]]:
        """Objects whose counts are needed next, by source; see `SampleSequence`."""
        wanted = self.wanted(spans)
        if not len(wanted) and self._quotas is None and end > self.known:
            wanted = self.next_uncounted(others)
            wanted = wanted if len(wanted) else self.next_uncounted(home)
        return {self._source: wanted} if len(wanted) else {}

    def wanted(self, spans: Sequence[LaneSpan]) -> NDArray[np.int32]:
        """Objects whose counts are needed before lanes can continue to the ends of their `spans`: those of the next
        windows, or all where a lane has come to the end of its partition.
        """
        missing = [self.lanes[lane] for lane, _, end in spans if self.lanes[lane].covered < end]
        if any(lane.next_window(self._counts) is None for lane in missing):
            return self._counts.uncounted_objects()
        return self._counts.next_uncounted([lane.number for lane in missing])

    def next_uncounted(self, partitions: Sequence[int]) -> NDArray[np.int32]:
        """The objects without counts of the next window that has any, of each of `partitions`, int32."""
        return self._counts.next_uncounted(partitions)

    def uncounted_objects(self) -> NDArray[np.int32]:
        """All objects whose counts are missing, int32."""
        return self._counts.uncounted_objects()

    def samples(self, positions: NDArray[np.int64]) -> Samples:
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
        return Samples.joined(parts).placed(by_lane) if parts else no_samples(self._origin)

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
        return Samples.joined(parts) if parts else no_samples(self._origin)

    def _samples_of_leg(self, leg: Leg, numbers: NDArray[np.int64]) -> Samples:
        return self._open[leg.key].located(numbers - (leg.start - leg.offset), leg.key)

    def find(self, lane: int, number: int) -> tuple[WindowKey, int, int] | None:
        if self._quotas is None:
            return None
        piece = self._quotas.ranges(lane, number, number + 1)[0]
        found = self._counts.find(piece.partition, piece.start)
        assert found is not None, "a number below the quota lies in a window"
        return self.key(piece.partition, found[0]), found[1], found[2]

    def sample_at(self, key: WindowKey, offset: int) -> Samples:
        return self._open[key].located(np.array([offset]), key)

    def taken(self, lengths: Sequence[int]) -> list[int]:
        """How many of each partition's samples lanes of some lengths have taken from its front; all of them where the
        partition is known to have fewer.
        """
        return [self._taken(partition, length) for partition, length in enumerate(lengths)]

    def places(self, taken: Sequence[int]) -> tuple[Place, ...]:
        """The place in each partition after so many of its samples."""
        return tuple(self._counts.place(partition, number) for partition, number in enumerate(taken))

    def position(self, samples: int) -> tuple[SourcePosition, ...]:
        """Where the data set stands when so many samples are delivered."""
        places, taken = self._at(samples)
        return (SourcePosition(None, places, tuple(taken) if self._partitions > 1 else ()),)

    def _at(self, samples: int) -> tuple[tuple[Place, ...], list[int]]:
        """The place in each partition after so many samples, and how many of the partition's lie before it."""
        if samples == self.total:
            places = tuple(Place(order.window_count, 0) for order in self.orders)
            return places, [int(count) for count in self._counts.totals()]
        taken = self.taken([lane_length(lane, samples, self._partitions) for lane in range(self._partitions)])
        return self.places(taken), taken

    def windows_ahead(self, position: int, lanes: Sequence[int]) -> Iterator[WindowKey]:
        """The windows that `lanes` need from `position` on, in the order in which positions come to them, each once.

        Before all counts are known, all partitions are taken to hold as many samples a byte.
        """
        if self._quotas is None:
            return iter(windows_by_bytes(self.orders, lanes, self._at(position)[0], self._source))
        first: dict[WindowKey, int] = {}
        for lane in lanes:
            for number, key in self.windows_of(lane, lane_length(lane, position, self._partitions)):
                at = number * self._partitions + lane
                first[key] = min(at, first.get(key, at))
        return iter(sorted(first, key=lambda key: (first[key], key)))

    def windows_of(self, lane: int, start: int) -> list[tuple[int, WindowKey]]:
        """From `start` on, where `lane` comes to a window, and which. Only once all is counted."""
        assert self._quotas is not None, "not all sample counts are known"
        found = []
        for piece in self._quotas.ranges(lane, start, int(self._quotas.quota[lane])):
            for window, sample in self._counts.windows(*piece):
                found.append((start + sample - piece.start, self.key(piece.partition, window)))
            start += piece.stop - piece.start
        return found

    def windows_guessed(self, lane: int, start: int, quota: int) -> list[tuple[int, WindowKey]]:
        """The same before all is counted, if `lane` has `quota` samples, its partition's alone, and a byte of it is as
        many samples everywhere.
        """
        order = self.orders[lane]
        first = self._counts.place(lane, self._taken(lane, start)).window
        ends = np.cumsum(order.window_bytes)
        numbers = (ends - order.window_bytes) * (quota / max(1, int(ends[-1]) if len(ends) else 1))
        return [
            (max(start, int(number)), self.key(lane, first + i)) for i, number in enumerate(numbers[first:].tolist())
        ]

    def _is_due(self, lane: Lane, following: NextWindow) -> bool:
        """Whether a lane needs a window, or may lie beyond its end, which only a count can tell."""
        is_start = lane.covered == lane.first and following.key.window == self._places[lane.number].window
        return following.length > 0 or following.offset == 0 or is_start

    def _taken(self, partition: int, length: int) -> int:
        counted = self._counts.length(partition)
        return length if counted is None else min(length, counted)

    def _check_start(self, key: WindowKey, count: int) -> None:
        window, offset = self._places[key.partition]
        # With several partitions an offset may reach beyond its window, and the whole partition is looked at.
        if self._partitions == 1 and key.window == window and offset and offset >= count:
            raise StateError(
                f"the state is at sample {offset} of window {window}, which has {count} samples: "
                "the shards are not those it was saved with; load another state"
            )

    def _set_quotas(self) -> None:
        """Once everything is counted: settle where lanes end."""
        if self._quotas is None and self._counts.is_complete:
            self._quotas = LaneQuotas(self._counts.totals())
            for lane in self.lanes.values():
                lane.end_at(self._quotas)
