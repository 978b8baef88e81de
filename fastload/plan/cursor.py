"""From the order to a rank's batches, as sample counts become known: one cursor for a data set and for a mixture.

The samples of an epoch stand in one sequence. It has lanes, one a partition, whose samples alternate in it: position q
is number q // P of lane q mod P (see `lanes`). A rank has every position that `assignment` gives it. A cursor says
which window to open next, is given the counts of one window after the other, and answers with the batches that are
settled by then. How many samples the windows of other nodes hold, which this node does not open, it asks for.

A sequence is walked through by groups: a global batch, or as many as there are workers where these share samples. The
samples of a group are given out once all its windows are open here, and once nothing that is still unknown can move
them: the sequence is known to be as long. So nothing about the order depends on when something became known.

At the end up to W-1 positions are left over: `tail="pad"` fills the group of W with samples of the window in
which the lane of the missing position ends (or, where that lane ended before the last global batch, of the window
with the last sample of all), from its first sample on and around; `"drop"` leaves them out, `"uneven"` gives them
to the first turns. All of that lies after every batch given out before, so a resumed run sees it too.

Pure: no clock, no I/O, and the work per window is a few calls over arrays, whatever it holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Generic, Literal

import numpy as np
from numpy.typing import NDArray

from fastload.errors import ConfigError, StateError
from fastload.plan.assignment import Assignment, LaneSpan
from fastload.plan.lanes import lane_length
from fastload.plan.order import EpochOrder, WindowKey
from fastload.plan.position import Position, check_place
from fastload.plan.ranks import Ranks, Tail, check_tail
from fastload.plan.sample_sequence import Entry, SampleRow, SampleSequence
from fastload.plan.samples import BatchEntry
from fastload.plan.sequence import EpochSequence

Split = Literal["batches", "samples"]

# What is planned in one go, however large windows are: enough to share the cost of the calls.
_SAMPLES_AT_ONCE = 1 << 16


@dataclass(frozen=True, slots=True)
class Batching:
    """Which rank's samples are read, and how they are cut into batches; see `Cursor`. Raises `ConfigError`."""

    ranks: Ranks
    batch_size: int
    drop_last: bool = False
    tail: Tail = "pad"
    worker: tuple[int, int] = (0, 1)
    split: Split = "batches"

    def __post_init__(self) -> None:
        check_tail(self.tail)
        if self.batch_size < 1:
            raise ConfigError(f"batch_size={self.batch_size} must be at least 1")
        if not 0 <= self.worker[0] < self.worker[1]:
            raise ConfigError(f"worker={self.worker[0]} must be from 0 to {self.worker[1] - 1}")

    @property
    def global_batch(self) -> int:
        """Positions of a batch on every rank."""
        return self.batch_size * self.ranks.world_size

    @property
    def group(self) -> int:
        """Positions that are dealt to workers together: batches go to workers in turn, or each worker takes its part
        of a group as large as a batch for every worker.
        """
        return self.global_batch * (self.worker[1] if self.split == "samples" else 1)


class Cursor(Generic[Entry]):
    """The batches of one rank in one epoch. Not thread-safe; made anew for each epoch, by `epoch_cursor` for a data set
    that is read alone, and by `mixture.mixture_cursor` for several.

    Until `next_window` is None, open that window and `add` it; where `counts_wanted` names objects, `add_counts` their
    sample counts first (any that are known may be given at any time); at last `finish`. Where a window holds very many
    samples, each of these gives only the first batches; then call `settled` until it gives none, and only then ask for
    what comes next. Windows that are not among `needed` may be closed once the batches given out so far are made; one
    of them may be asked for again. Nodes never wait for one another for ever if each counts the windows that it opens,
    and those of the partitions that it reads which another node wants. With a mixture that never ends there is always
    another window to open, and `finish` is never called.

    `worker=(w, n)` is one of n workers that share the rank's samples. With `split="batches"` it gets every
    n-th batch, beginning with its own number, which is the order in which torch's DataLoader asks its
    workers. With `split="samples"` it gets every n-th sample, in batches of its own; together they are the
    rank's samples, each once.
    """

    def __init__(
        self,
        sequence: SampleSequence[Entry],
        assignment: Assignment,
        batching: Batching,
        beginning: Position,
        start: Position,
    ) -> None:
        """`beginning` is that of the epoch, and `start` where to begin, which fits (see `Position.check`)."""
        self._sequence, self._assignment, self._batching = sequence, assignment, batching
        self.partitions = assignment.partitions
        self._beginning, self.start = beginning, start
        self.ranks, self.batch_size = batching.ranks, batching.batch_size
        self.drop_last, self.tail = batching.drop_last, batching.tail
        self._global_batch, self._group = batching.global_batch, batching.group
        # How many groups to give out at a time: a window may hold any number.
        self._groups_at_once = max(1, _SAMPLES_AT_ONCE // (batching.group // self.ranks.world_size))
        self._delivered = start.samples
        self._number_start = -(-start.samples // self._global_batch)
        self._groups_given = 0
        self._given = self._forgotten = start.samples  # positions that are given out; that need no window
        self._next: WindowKey | None = None
        self._is_next_known = False

    @property
    def epoch(self) -> int:
        """The epoch that is walked through."""
        return self._beginning.epoch

    @property
    def home(self) -> list[int]:
        """The partitions that this node reads until some of them end."""
        return self._assignment.home

    @property
    def total(self) -> int | None:
        """The samples of the epoch, over all ranks and without repeats; None while not known, or without end."""
        return self._sequence.total

    @property
    def is_counted(self) -> bool:
        """Whether the length of the epoch is known, or that it has no end, so that `windows_ahead` is exact."""
        return self._sequence.is_measured

    @property
    def next_window(self) -> WindowKey | None:
        """The window to open next; None where all are open, and where `counts_wanted` are needed first."""
        if not self._is_next_known:
            self._next, self._is_next_known = self._find_next(), True
        return self._next

    @property
    def needed(self) -> frozenset[WindowKey]:
        """The open windows that a batch still to come may need."""
        return frozenset(self._sequence.open_windows)

    @property
    def counts_wanted(self) -> dict[int, NDArray[np.int32]]:
        """Objects whose counts are needed before anything can continue, int32, by source. Empty where `next_window` is
        not None, where batches are settled that were not given out yet, and at the end.

        They are the next windows of other nodes, where these may have too few samples for the batch that is due,
        all that has no count where a lane has come to the end of its partition, and windows that lie before the
        first sample that is needed. A count of any other object helps too. Without counts, a node can be sure of
        no more samples in all than are counted, so it needs counts of the others' windows about as often as it
        opens one of its own; where all counts are given at the start, it never asks.
        """
        if self.next_window is not None:
            return {}
        others = [p for p in range(self.partitions) if self._assignment.is_cut or p not in self.home]
        last = None
        if (tail := self._tail_position) is not None and self._tail_source is None:
            number, lane = divmod(tail[0], self.partitions)
            last = lane, number
        return self._sequence.counts_wanted(self._needs(), self._given + self._group, others, self.home, last)

    def objects_of(self, key: WindowKey) -> NDArray[np.int32]:
        """The object numbers of a window in its source, int32; `add` wants one count for each."""
        return self._sequence.objects_of(key)

    def windows_ahead(self) -> Iterator[WindowKey]:
        """The windows that this node still needs, in the order in which batches come to them, each once; without end
        where the epoch has none. Not to be used further once counts were given or a window was added.

        Windows that are open are among them. While counts are not known, partitions are taken to hold as many samples
        a byte, and windows that other nodes may come to need help with are left in; a source of which nothing is
        counted is taken to hold as many as the others.
        """
        return self._sequence.windows_ahead(self._given, self.home)

    def add_counts(self, source: int, object_nos: NDArray[np.int32], counts: NDArray[np.int64]) -> list[Entry]:
        """The batches that are settled by the sample counts, int64, of some objects of a source."""
        self._sequence.add_counts(source, object_nos, np.asarray(counts, np.int64))
        return self.settled()

    def add(self, key: WindowKey, counts: NDArray[np.int64]) -> list[Entry]:
        """A window is open: the batches that are settled by that, and by the counts of its objects, int64.

        Raises `StateError` where the start lies beyond the samples that there are, or another count was given before,
        and `ConfigError` where a source of a mixture turns out to have fewer samples than it must.
        """
        self._sequence.add(key, np.asarray(counts, np.int64))
        return self.settled()

    def settled(self) -> list[Entry]:
        """The next batches that are settled already, where not all were given out at once."""
        total = self._sequence.total
        if total is not None and total < self._delivered:
            raise StateError(
                f"the state has delivered {self._delivered} samples of the {total} that there are: "
                "the shards are not those it was saved with; load another state"
            )
        self._is_next_known = False
        entries: list[Entry] = []
        self._extend()
        # Another worker's groups give none, and what lies behind them may be open already.
        while not entries and (groups := self._groups_ready()):
            entries = self._give(min(groups, self._groups_at_once))
            self._extend()
        self._close_windows()
        return entries

    def finish(self) -> list[Entry]:
        """After the last window: what the tail leaves, at most one batch (one a worker). Called once."""
        total = self._sequence.total
        assert total is not None, "not all sample counts are known"
        assert not self._groups_ready(), "there are more batches that are settled"
        assert self.next_window is None, f"window {self.next_window} has not been added"
        whole = total - (total - self._given) % self.ranks.world_size
        samples, repeats = self._sequence.samples(self._assignment.positions(self._given, whole)), 0
        if (source := self._tail_source) is not None:
            samples = samples.then(self._sequence.sample_at(*source))
            repeats = int(whole + self._assignment.turn >= total)
        self._given = total
        return self._last_batch(samples, repeats, total)

    def position(self, entry: Entry | None) -> Position:
        """The position after `entry` was delivered; for None, where the cursor started."""
        return self.start if entry is None else self.position_at(entry.samples_after)

    def position_at(self, samples: int) -> Position:
        """The position after so many samples: as many as where the cursor started, or a multiple of the global batch
        above that, or all. What is known of windows by now makes it exact; it is right in any case.
        """
        if samples == self.start.samples:
            return self.start
        total = self._sequence.total
        assert samples > self._delivered, f"{samples} samples lie before the start, at {self._delivered}"
        assert total is None or samples <= total, f"there are only {total} samples, not {samples}"
        assert samples == total or samples % self._global_batch == 0, f"no global batch ends after {samples} samples"
        return replace(
            self._beginning,
            batches=-(-samples // self._global_batch),
            samples=samples,
            sources=self._sequence.position(samples),
        )

    def _find_next(self) -> WindowKey | None:
        missing = self._sequence.due_in(self._needs())
        if missing:
            return min(missing, key=itemgetter(0))[1]
        source = self._tail_source
        return source[0] if source is not None and source[0] not in self._sequence.open_windows else None

    def _needs(self) -> list[LaneSpan]:
        """What the node needs of lanes for the next group; nothing where that depends on counts yet to come."""
        end, total = self._given + self._group, self._sequence.total
        if self._assignment.is_cut and total is None and end > self._sequence.known:
            return []
        return self._assignment.needs(self._given, end if total is None else min(end, total))

    def _groups_ready(self) -> int:
        known = self._sequence.known
        if self._given + self._group > known:
            return 0
        limit = self._given + (known - self._given) // self._group * self._group
        return (
            self._assignment.settled(self._given, limit, self._group, self._sequence.reaches()) - self._given
        ) // self._group

    def _extend(self) -> None:
        """Let lanes continue through windows that are open."""
        if self._assignment.is_cut:  # otherwise every number of a lane is needed
            self._sequence.skip(self._needs())
        self._sequence.extend()

    def _give(self, groups: int) -> list[Entry]:
        """The worker's batches of the next groups."""
        (worker, stride), given, first = self._batching.worker, self._given, self._groups_given
        stop, mine = given + groups * self._group, range(groups)
        positions = self._assignment.positions(given, stop).reshape(groups, -1)
        if self._batching.split == "batches":
            mine = mine[(worker - first) % stride :: stride]
            positions, worker, stride = positions[mine.start :: stride], 0, 1
        samples = self._sequence.samples(positions[:, worker::stride].ravel())
        self._given, self._groups_given = stop, first + groups
        return samples.batches(
            self.batch_size,
            (self._number_start + (first + i) * stride + worker for i in mine),
            (given + (i + 1) * self._group for i in mine),
        )

    def _last_batch(self, samples: SampleRow[Entry], repeats: int, samples_after: int) -> list[Entry]:
        """The worker's batch from the rank's last samples, of which the last `repeats` are repeats."""
        (worker, stride), group = self._batching.worker, self._groups_given
        if self._batching.split == "batches":
            if group % stride != worker:
                return []
            worker, stride = 0, 1
        mine = samples.part(worker, len(samples), stride)
        if len(mine) == 0 or (self.drop_last and len(mine) < self.batch_size):
            return []
        has_repeat = (len(samples) - 1) % stride == worker
        number = self._number_start + group * stride + worker
        return [mine.batch(number, repeats if has_repeat else 0, samples_after)]

    def _close_windows(self) -> None:
        """Forget what no batch to come needs."""
        if self._forgotten < self._given:
            self._sequence.forget(self._given)
            self._forgotten = self._given
        source = self._tail_source
        self._sequence.close_all_but(None if source is None else source[0])

    @property
    def _tail_position(self) -> tuple[int, int] | None:
        """The position whose window has the one sample that the tail gives this rank, left over or repeated, and which
        of the repeats it is, or -1; None where it gives none, or more is left than that and a multiple of the ranks.
        """
        total = self._sequence.total
        if total is None or total - self._given >= self._group:
            return None
        left_over = (total - self._given) % self.ranks.world_size
        position = total - left_over + self._assignment.turn
        if not left_over or self.tail == "drop" or (position >= total and self.tail != "pad"):
            return None
        if position < total:
            return position, -1
        return self._last_of_lane(position % self.partitions, total), position - total

    def _last_of_lane(self, lane: int, total: int) -> int:
        """The last position of a lane; of all, where the lane has none in the last global batch."""
        position = (lane_length(lane, total, self.partitions) - 1) * self.partitions + lane
        return position if position >= (total - 1) // self._global_batch * self._global_batch else total - 1

    @property
    def _tail_source(self) -> tuple[WindowKey, int] | None:
        """Window and offset of the tail's sample; None where there is none, or its counts are missing."""
        if (tail := self._tail_position) is None:
            return None
        position, repeat = tail
        number, lane = divmod(position, self.partitions)
        if (found := self._sequence.find(lane, number)) is None:
            return None
        key, offset, count = found
        return key, offset if repeat < 0 else repeat % count


def epoch_cursor(
    orders: Sequence[EpochOrder],
    ranks: Ranks,
    batch_size: int,
    *,
    drop_last: bool = False,
    tail: Tail = "pad",
    start: Position | None = None,
    worker: tuple[int, int] = (0, 1),
    split: Split = "batches",
) -> Cursor[BatchEntry]:
    """The cursor over one data set; `orders` are those of all partitions.

    Raises `ConfigError` for arguments that do not fit and `StateError` where `start` belongs to another run.
    """
    batching = Batching(ranks, batch_size, drop_last, tail, worker, split)
    order, partitions = orders[0], len(orders)
    belongs_to = [(order.options, order.manifest.fingerprint)]
    beginning = Position.start(order.epoch, None, belongs_to, ranks, batch_size, tail)
    start = beginning if start is None else start
    start.check(beginning)
    (at,) = start.sources
    for place, each in zip(at.places, orders, strict=True):
        check_place(place, each.window_count)
    is_at_end = all(place.window >= each.window_count for place, each in zip(at.places, orders, strict=True))
    if not is_at_end or (at.taken and sum(at.taken) != start.samples):
        start.check_boundary(beginning)
    assignment = Assignment(ranks, partitions, batching.global_batch)
    lengths = [lane_length(lane, start.samples, partitions) for lane in range(partitions)]
    starts = {lane: lengths[lane] for lane in assignment.lanes}
    sequence = EpochSequence(orders, starts, at.places, at.taken or lengths)
    return Cursor(sequence, assignment, batching, beginning, start)
