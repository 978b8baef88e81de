"""From the order to a rank's batches, as sample counts become known.

The samples of an epoch stand in one line, in which partitions alternate (see `lanes`), and a rank has every
position of it whose turn is its own (see `deal`). An `EpochCursor` says which window to open next, is told the
counts of one window after the other, and answers with the batches that are settled by then: those whose windows
are all open, and whose positions nothing that is still unknown can move. What is unknown to one node and known to
another (how many samples its windows hold) it asks for, and goes on from there; nothing about the order depends
on when a count was told.

At the end up to W-1 positions are left over: `tail="pad"` fills the group of W with samples of the window in
which the lane of the missing position ends (or, where that lane ended before the last global batch, of the window
with the last sample of all), from its first sample on and around; `"drop"` leaves them out, `"uneven"` gives them
to the first turns. All of that lies after every batch given out before, so a resumed run sees it too.

Pure: no clock, no I/O, and the work per window is a few calls over arrays, whatever it holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fastload.errors import ConfigError, StateError
from fastload.plan.deal import Deal
from fastload.plan.lanes import Lane, Leg, Levels, Stop, lane_length
from fastload.plan.lookahead import windows_by_bytes
from fastload.plan.order import EpochOrder
from fastload.plan.position import Place, Position
from fastload.plan.ranks import Ranks
from fastload.plan.samples import NO_SAMPLES, BatchEntry, OpenWindow, Samples
from fastload.plan.tail import Tail, check_tail
from fastload.plan.tally import Tally, WindowKey

Split = Literal["batches", "samples"]

# What is planned in one go where windows are as large as partitions: enough to share the cost of the calls.
_SAMPLES_AT_ONCE = 1 << 16


class EpochCursor:
    """The batches of one rank in one epoch. One user at a time; made anew for each epoch.

    `orders` are those of all partitions. Until `next_window` is None, open that window and `add` it; where
    `counts_wanted` names objects, `tell` their sample counts first (any that are known may be told at any time);
    at last `finish`. With `shuffle="global"`, where a window holds very many samples, each of these gives only the
    first batches, and `settled` more until it gives none. Windows that are not among `needed` may be closed once the
    batches given out so far are made; one of them may be asked for again. Nodes never wait for one another for ever if
    each counts the windows that it opens, and those of the partitions that it reads which another node wants.

    `worker=(w, n)` is one of n workers that share the rank's samples. With `split="batches"` it gets every
    n-th batch, beginning with its own number, which is the order in which torch's DataLoader asks its
    workers. With `split="samples"` it gets every n-th sample, in batches of its own; together they are the
    rank's samples, each once.

    Raises `ConfigError` for arguments that do not fit and `StateError` where `start` belongs to another run.
    """

    def __init__(
        self,
        orders: Sequence[EpochOrder],
        ranks: Ranks,
        batch_size: int,
        *,
        drop_last: bool = False,
        tail: Tail = "pad",
        start: Position | None = None,
        worker: tuple[int, int] = (0, 1),
        split: Split = "batches",
    ) -> None:
        _check_arguments(batch_size, worker)
        self.orders, self.ranks, self.batch_size = tuple(orders), ranks, batch_size
        self.drop_last, self.tail = drop_last, check_tail(tail)
        self.start = start if start is not None else Position.start(orders[0], ranks, batch_size, tail)
        self.start.check(self.orders, ranks, batch_size, tail)
        self._worker, self._split = worker, split
        self._partitions, self._global_batch = len(self.orders), batch_size * ranks.world_size
        # Batches are dealt to workers; or each worker takes its part of a group as large as a batch for every
        # worker.
        self._group = self._global_batch * (worker[1] if split == "samples" else 1)
        # How many groups to give out at a time, among them one of each worker; 0: all, since windows are small.
        at_once = max(worker[1], _SAMPLES_AT_ONCE // (self._group // ranks.world_size))
        self._groups_at_once = at_once if self.orders[0].options.shuffle == "global" else 0
        self._number_start = -(-self.start.samples // self._global_batch)
        self._groups_given = 0
        self._given = self.start.samples  # positions of the line that are given out
        self._deal = Deal(ranks, self._partitions, self._global_batch)
        self._tally = Tally(self.orders, self.start.places, self.start.taken or self._lengths(self._given))
        self._lanes = {p: Lane(p, lane_length(p, self._given, self._partitions)) for p in self._deal.lanes}
        self._open: dict[WindowKey, OpenWindow] = {}
        self._levels: Levels | None = None
        self._level()

    @property
    def epoch(self) -> int:
        """The epoch that is walked through."""
        return self.orders[0].epoch

    @property
    def is_counted(self) -> bool:
        """Whether all sample counts are known, so that `windows_ahead` is exact and nothing is wanted any more."""
        return self._levels is not None

    @property
    def home(self) -> Sequence[int]:
        """The partitions that this node reads until some of them end."""
        return self._deal.home

    def objects_of(self, key: WindowKey) -> NDArray[np.int32]:
        """The object numbers of a window, int32; `add` wants one count for each."""
        return self.orders[key.partition].window_objects(key.window)

    @property
    def next_window(self) -> WindowKey | None:
        """The window to open next; None where all are open, and where `counts_wanted` must be told before."""
        missing = [
            (lane.covered * self._partitions + lane.number, stop.key)
            for lane, _ in self._uncovered()
            if (stop := lane.stop(self._tally)) is not None and self._is_due(lane, stop)
        ]
        if missing:
            return min(missing)[1]
        source = self._tail_source
        return source[0] if source is not None and source[0] not in self._open else None

    @property
    def counts_wanted(self) -> NDArray[np.int32]:
        """Objects whose counts must be told before anything can go on, int32; empty where `next_window` is not
        None, and at the end.

        They are the next windows of other nodes, where these may have too few samples for the batch that is due,
        all that has no count where a lane has come to the end of its partition, and windows that lie before the
        first sample that is needed. A count of any other object helps too. Without counts, a node can be sure of
        no more samples in all than are counted, so it needs to hear of the others' windows about as often as it
        opens one of its own; where all counts are told at the start, it never asks.
        """
        if self._levels is not None or self.next_window is not None:
            return np.empty(0, np.int32)
        missing = [lane for lane, _ in self._uncovered()]
        if any(lane.stop(self._tally) is None for lane in missing):
            return self._tally.uncounted_objects()
        if missing:
            return self._tally.next_uncounted([lane.number for lane in missing])
        others = [p for p in range(self._partitions) if self._deal.is_cut or p not in self._deal.home]
        found = self._tally.next_uncounted(others)
        return found if len(found) else self._tally.next_uncounted(self._deal.home)

    def _is_due(self, lane: Lane, stop: Stop) -> bool:
        """Whether a lane needs a window, or may lie beyond its end, which only a count can tell."""
        is_start = lane.covered == lane.first and stop.key.window == self.start.places[lane.number].window
        return stop.length > 0 or stop.offset == 0 or is_start

    @property
    def needed(self) -> frozenset[WindowKey]:
        """The open windows that a batch still to come may need."""
        return frozenset(self._open)

    def windows_ahead(self) -> list[WindowKey]:
        """The windows that this node still needs, in the order in which batches come to them, each once.

        Windows that are open are among them. Before all counts are known, partitions are taken to hold as many
        samples a byte, and windows that other nodes may come to need help with are left in.
        """
        if self._levels is None:
            return windows_by_bytes(self.orders, self._deal.home, self._places(self._given))
        return self._exact_windows_ahead(self._levels)

    def tell(self, object_nos: NDArray[np.int32], counts: NDArray[np.int64]) -> list[BatchEntry]:
        """The batches that are settled by the sample counts, int64, of some objects."""
        self._tally.tell(object_nos, np.asarray(counts, np.int64))
        self._level()
        return self._settle()

    def add(self, key: WindowKey, counts: NDArray[np.int64]) -> list[BatchEntry]:
        """A window is open: the batches that are settled by that, and by the counts of its objects, int64.

        Raises `StateError` where the start lies beyond the samples that there are, or a count was told
        otherwise.
        """
        objects, counts = self.objects_of(key), np.asarray(counts, np.int64)
        assert len(counts) == len(objects), f"{len(counts)} counts for {len(objects)} objects"
        assert not len(counts) or counts.min() >= 0, "a sample count is negative"
        total = int(counts.sum())
        self._check_start(key, total)
        line = self.orders[key.partition].window_permutation(key.window, total)
        self._tally.tell(objects, counts)
        self._open[key] = OpenWindow(line, objects, counts)
        self._level()
        return self._settle()

    def settled(self) -> list[BatchEntry]:
        """The next batches that are settled already. Only with `shuffle="global"` are there any that were not given
        out at once.
        """
        return self._settle()

    def finish(self) -> list[BatchEntry]:
        """After the last window: what the tail leaves, at most one batch (one a worker). Called once."""
        assert self._levels is not None, "not all sample counts are known"
        assert not self._groups_ready(), "there are more batches that are settled"
        assert self.next_window is None, f"window {self.next_window} has not been added"
        total, source = self._levels.total, self._tail_source
        whole = total - (total - self._given) % self.ranks.world_size
        samples = self._samples_at(self._deal.positions(self._given, whole))
        repeats = 0
        if source is not None:
            key, offset = source
            samples = samples.then(self._open[key].located(np.array([offset]), key))
            repeats = int(whole + self._deal.turn >= total)
        self._given = total
        entry = self._entry(self._groups_given, samples, repeats, total)
        return [] if entry is None else [entry]

    def position(self, entry: BatchEntry | None) -> Position:
        """The position after `entry` was delivered; for None, where the cursor started."""
        if entry is None:
            return self.start
        samples = entry.samples_after
        return Position(
            epoch=self.epoch,
            batches=-(-samples // self._global_batch),
            samples=samples,
            places=self._places(samples),
            options=self.orders[0].options,
            fingerprint=self.orders[0].manifest.fingerprint,
            world_size=self.ranks.world_size,
            batch_size=self.batch_size,
            tail=self.tail,
            taken=tuple(self._taken(samples)) if self._partitions > 1 else (),
        )

    def _lengths(self, position: int) -> list[int]:
        return [lane_length(p, position, self._partitions) for p in range(self._partitions)]

    def _taken(self, samples: int) -> list[int]:
        """How many of each partition's samples lanes have taken from its front; its length is not exceeded where
        that is known.
        """
        if self._levels is not None and samples == self._levels.total:
            return [int(count) for count in self._tally.totals()]
        lengths = (self._tally.length(p) for p in range(self._partitions))
        return [n if of is None else min(n, of) for n, of in zip(self._lengths(samples), lengths, strict=True)]

    def _places(self, samples: int) -> tuple[Place, ...]:
        if self._levels is not None and samples == self._levels.total:
            return tuple(Place(order.window_count, 0) for order in self.orders)
        return tuple(self._tally.place(p, taken) for p, taken in enumerate(self._taken(samples)))

    def _check_start(self, key: WindowKey, count: int) -> None:
        window, offset = self.start.places[key.partition]
        # With several partitions an offset may reach beyond its window, and the whole partition is looked at.
        if self._partitions == 1 and key.window == window and offset and offset >= count:
            raise StateError(
                f"the state is at sample {offset} of window {window}, which has {count} samples: "
                "the shards are not those it was saved with; load another state"
            )

    def _level(self) -> None:
        """Once everything is counted: settle where lanes end."""
        if self._levels is None and self._tally.is_complete:
            self._levels = Levels(self._tally.totals())
            if self._levels.total < self.start.samples:
                raise StateError(
                    f"the state has delivered {self.start.samples} samples of the {self._levels.total} that there are: "
                    "the shards are not those it was saved with; load another state"
                )
            for lane in self._lanes.values():
                lane.level(self._levels)

    def _needs(self) -> list[tuple[int, int, int]]:
        """What the node needs of lanes for the next group; nothing where that depends on counts yet to come."""
        end = self._given + self._group
        if self._deal.is_cut and self._levels is None and end > self._tally.at_least:
            return []
        return self._deal.needs(self._given, end if self._levels is None else min(end, self._levels.total))

    def _uncovered(self) -> list[tuple[Lane, int]]:
        """The lanes that do not yet reach as far as the next group needs, and how far that is."""
        spans = ((self._lanes[lane], end) for lane, _, end in self._needs())
        return [(lane, end) for lane, end in spans if lane.covered < end]

    def _extend(self) -> None:
        """Let lanes go on through windows that are open."""
        for number, start, _ in self._needs():
            self._lanes[number].skip_to(start)
        for lane in self._lanes.values():
            while (stop := lane.stop(self._tally)) is not None and stop.key in self._open:
                lane.take(stop)

    def _groups_ready(self) -> int:
        known = self._tally.at_least if self._levels is None else self._levels.total
        if self._given + self._group > known:
            return 0
        reach = {number: lane.covered for number, lane in self._lanes.items()}
        limit = self._given + (known - self._given) // self._group * self._group
        return (self._deal.settled(self._given, limit, self._group, reach) - self._given) // self._group

    def _settle(self) -> list[BatchEntry]:
        entries: list[BatchEntry] = []
        self._extend()
        while (groups := self._groups_ready()) and not (entries and self._groups_at_once):
            entries += self._give(min(groups, self._groups_at_once or groups))
            self._extend()
        self._close_windows()
        return entries

    def _give(self, groups: int) -> list[BatchEntry]:
        """The worker's batches of the next groups."""
        (worker, stride), given, first = self._worker, self._given, self._groups_given
        stop, mine = given + groups * self._group, range(groups)
        positions = self._deal.positions(given, stop).reshape(groups, -1)
        if self._split == "batches":
            mine = mine[(worker - first) % stride :: stride]
            positions, worker, stride = positions[mine.start :: stride], 0, 1
        samples = self._samples_at(positions[:, worker::stride].ravel())
        self._given, self._groups_given = stop, first + groups
        return samples.batches(
            self.batch_size,
            (self._number_start + (first + i) * stride + worker for i in mine),
            (given + (i + 1) * self._group for i in mine),
        )

    def _close_windows(self) -> None:
        """Forget what no batch to come needs."""
        needed = {leg.key for lane in self._lanes.values() for leg in self._legs_left(lane)}
        if self._levels is not None and (source := self._tail_source) is not None:
            needed.add(source[0])
        self._open = {key: window for key, window in self._open.items() if key in needed}

    def _legs_left(self, lane: Lane) -> list[Leg]:
        lane.forget_before(lane_length(lane.number, self._given, self._partitions))
        return lane.legs

    @property
    def _tail_source(self) -> tuple[WindowKey, int] | None:
        """Window and offset of the one sample that the tail gives this rank, left over or repeated, if it gives
        one and is all that is left beside whole rounds.
        """
        if self._levels is None or self._levels.total - self._given >= self._group:
            return None
        total = self._levels.total
        left_over = (total - self._given) % self.ranks.world_size
        position = total - left_over + self._deal.turn
        if not left_over or self.tail == "drop" or (position >= total and self.tail != "pad"):
            return None
        if position < total:
            window, offset, _ = self._found(position)
            return window, offset
        window, _, count = self._found(self._last_of_lane(position % self._partitions))
        return window, (position - total) % count

    def _last_of_lane(self, lane: int) -> int:
        """The last position of a lane; of all, where the lane has none in the last global batch."""
        assert self._levels is not None
        total = self._levels.total
        position = (int(self._levels.quota[lane]) - 1) * self._partitions + lane
        return position if position >= (total - 1) // self._global_batch * self._global_batch else total - 1

    def _found(self, position: int) -> tuple[WindowKey, int, int]:
        """Window, offset and the window's samples, of a position of the line."""
        assert self._levels is not None
        number, lane = divmod(position, self._partitions)
        piece = self._levels.pieces(lane, number, number + 1)[0]
        found = self._tally.find(piece.partition, piece.start)
        assert found is not None, "a position below the total lies in a window"
        return WindowKey(piece.partition, found[0]), found[1], found[2]

    def _samples_at(self, positions: NDArray[np.int64]) -> Samples:
        """The samples of some positions, rising, whose windows are open."""
        if self._partitions == 1:
            return self._of_lane(0, positions)
        lanes = (positions % self._partitions).astype(np.int32)
        by_lane = np.argsort(lanes, kind="stable")
        bounds = np.searchsorted(lanes[by_lane], np.arange(self._partitions + 1))
        parts = [
            self._of_lane(p, positions[by_lane[bounds[p] : bounds[p + 1]]] // self._partitions)
            for p in np.flatnonzero(np.diff(bounds)).tolist()
        ]
        return Samples.joined(parts).part_at(np.argsort(by_lane, kind="stable")) if parts else NO_SAMPLES

    def _of_lane(self, lane: int, numbers: NDArray[np.int64]) -> Samples:
        """The samples of rising numbers of one lane."""
        legs = self._lanes[lane].legs
        bounds = np.searchsorted(numbers, [leg.start for leg in legs] + [leg.stop for leg in legs[-1:]])
        parts = [
            self._open[leg.key].located(numbers[first:stop] - (leg.start - leg.offset), leg.key)
            for leg, first, stop in zip(legs, bounds, bounds[1:], strict=False)
            if first < stop
        ]
        return Samples.joined(parts) if parts else NO_SAMPLES

    def _entry(self, group: int, samples: Samples, repeats: int, samples_after: int) -> BatchEntry | None:
        """The worker's batch from a group of the rank's samples, of which the last `repeats` are repeats."""
        worker, stride = self._worker
        if self._split == "batches":
            if group % stride != worker:
                return None
            worker, stride = 0, 1
        mine = samples.part(worker, len(samples), stride)
        if len(mine) == 0 or (self.drop_last and len(mine) < self.batch_size):
            return None
        has_repeat = (len(samples) - 1) % stride == worker
        return BatchEntry(
            self._number_start + group * stride + worker,
            mine.object_no,
            mine.sample_no,
            repeats if has_repeat else 0,
            mine.windows(),
            samples_after,
        )

    def _exact_windows_ahead(self, levels: Levels) -> list[WindowKey]:
        first: dict[WindowKey, int] = {}
        for number in self._deal.home:
            at = lane_length(number, self._given, self._partitions)
            for piece in levels.pieces(number, at, int(levels.quota[number])):
                for key, sample in self._tally.windows(*piece):
                    position = (at + sample - piece.start) * self._partitions + number
                    first[key] = min(position, first.get(key, position))
                at += piece.stop - piece.start
        return sorted(first, key=lambda key: (first[key], key))


def _check_arguments(batch_size: int, worker: tuple[int, int]) -> None:
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size} must be at least 1")
    if not 0 <= worker[0] < worker[1]:
        raise ConfigError(f"worker={worker[0]} must be from 0 to {worker[1] - 1}")
