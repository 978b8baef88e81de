"""What a walk asks of a line, which is that of one data set or that of a mixture.

A line has lanes, one a partition; position q is number q // P of lane q mod P. See `line` and `walk`.

A rank's walk along a line: which groups of positions are settled, what it needs for the next, and its batches.

A line is walked through by groups: a global batch, or as many as there are workers where these share samples. The
samples of a group are given out once all its windows are open here, and once nothing that is still unknown can move
them: the line is known to be as long. So nothing about the order depends on when something became known.

At the end up to W-1 positions are left over: `tail="pad"` fills the group of W with samples of the window in
which the lane of the missing position ends (or, where that lane ended before the last global batch, of the window
with the last sample of all), from its first sample on and around; `"drop"` leaves them out, `"uneven"` gives them
to the first turns. All of that lies after every batch given out before, so a resumed run sees it too.

Pure: no clock, no I/O, and the work per window is a few calls over arrays, whatever it holds.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Generic, Literal, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastload.errors import ConfigError, StateError
from fastload.plan.assignment import Assignment, LaneSpan
from fastload.plan.lanes import lane_length
from fastload.plan.ranks import Ranks, Tail, check_tail

Key = TypeVar("Key")  # names a window
Entry = TypeVar("Entry")  # a batch, as numbers


class Row(Protocol[Entry]):
    """Samples in an order, from which batches are cut."""

    def __len__(self) -> int: ...

    def part(self, start: int, stop: int, step: int = 1) -> Self:
        """Those from `start` to `stop`, or every `step`-th of them."""
        ...

    def then(self, more: Self) -> Self:
        """These and `more` after them."""
        ...

    def batch(self, number: int, repeats: int, samples_after: int) -> Entry:
        """All of them as one batch, whose last `repeats` are repeats."""
        ...

    def batches(self, size: int, numbers: Iterable[int], samples_after: Iterable[int]) -> list[Entry]:
        """Whole batches of `size`, one after the other."""
        ...


class WalkedLine(Protocol[Key, Entry]):
    """What a walk asks of a line."""

    @property
    def known(self) -> int:
        """How many positions are known to be there, and settled but for the windows that must be open."""
        ...

    @property
    def total(self) -> int | None:
        """How many positions there are; None where that is not known, or there is no end."""
        ...

    @property
    def open_windows(self) -> Collection[Key]:
        """The windows that are open."""
        ...

    def skip(self, spans: Sequence[LaneSpan]) -> None:
        """Nobody here needs what lanes hold before their `spans`."""
        ...

    def extend(self) -> None:
        """Let lanes go on through windows that are open."""
        ...

    def reaches(self) -> Mapping[int, int]:
        """For each lane up to which number its windows are open."""
        ...

    def due_in(self, spans: Sequence[LaneSpan]) -> list[tuple[int, Key]]:
        """The windows that have to be opened for lanes to reach the ends of their `spans`, each with the position from
        which it is needed; without those for which a count must be told before.
        """
        ...

    def forget(self, position: int) -> None:
        """What lies before `position` is not needed any more."""
        ...

    def close_all_but(self, kept: Key | None) -> None:
        """Close the windows that no lane needs from where it was forgotten on, but for `kept`."""
        ...

    def samples(self, positions: NDArray[np.int64]) -> Row[Entry]:
        """The samples at some positions, rising, that lanes have reached."""
        ...

    def find(self, lane: int, number: int) -> tuple[Key, int, int] | None:
        """Window, offset and the window's samples, of a number of a lane, whoever reads it; None where counts that
        are still missing could move it.
        """
        ...

    def sample_at(self, key: Key, offset: int) -> Row[Entry]:
        """The one sample at an offset in an open window."""
        ...


Split = Literal["batches", "samples"]
# What is planned in one go, however large windows are: enough to share the cost of the calls.
_SAMPLES_AT_ONCE = 1 << 16


@dataclass(frozen=True, slots=True)
class Reader:
    """Who reads a line and how; see `EpochCursor`. Raises `ConfigError`."""

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


class Walk(Generic[Key, Entry]):
    """What the cursors over one data set and over a mixture have in common; see `EpochCursor` for how one is used."""

    def __init__(self, line: WalkedLine[Key, Entry], deal: Assignment, reader: Reader, delivered: int) -> None:
        self._line, self._deal, self._reader, self._partitions = line, deal, reader, deal.partitions
        self.ranks, self.batch_size = reader.ranks, reader.batch_size
        self.drop_last, self.tail = reader.drop_last, reader.tail
        self._global_batch, self._group = reader.global_batch, reader.group
        # How many groups to give out at a time: a window may hold any number.
        self._groups_at_once = max(1, _SAMPLES_AT_ONCE // (reader.group // self.ranks.world_size))
        self._delivered = delivered
        self._number_start = -(-delivered // self._global_batch)
        self._groups_given = 0
        self._given = self._forgotten = delivered  # positions of the line that are given out; that need no window
        self._next: Key | None = None
        self._is_next_known = False

    @property
    def home(self) -> list[int]:
        """The partitions that this node reads until some of them end."""
        return self._deal.home

    @property
    def total(self) -> int | None:
        """The samples of the line, over all ranks and without repeats; None while that is not known."""
        return self._line.total

    @property
    def next_window(self) -> Key | None:
        """The window to open next; None where all are open, and where `counts_wanted` must be told before."""
        if not self._is_next_known:
            self._next, self._is_next_known = self._find_next(), True
        return self._next

    @property
    def needed(self) -> frozenset[Key]:
        """The open windows that a batch still to come may need."""
        return frozenset(self._line.open_windows)

    def settled(self) -> list[Entry]:
        """The next batches that are settled already, where not all were given out at once."""
        return self._settle()

    def finish(self) -> list[Entry]:
        """After the last window: what the tail leaves, at most one batch (one a worker). Called once."""
        total = self._line.total
        assert total is not None, "not all sample counts are known"
        assert not self._groups_ready(), "there are more batches that are settled"
        assert self.next_window is None, f"window {self.next_window} has not been added"
        whole = total - (total - self._given) % self.ranks.world_size
        samples, repeats = self._line.samples(self._deal.positions(self._given, whole)), 0
        if (source := self._tail_source) is not None:
            samples = samples.then(self._line.sample_at(*source))
            repeats = int(whole + self._deal.turn >= total)
        self._given = total
        return self._last_batch(samples, repeats, total)

    def _assert_is_boundary(self, samples: int) -> None:
        """A run can begin after so many samples of the line, and this one ends there or comes by."""
        total = self._line.total
        assert samples > self._delivered, f"{samples} samples lie before the start, at {self._delivered}"
        assert total is None or samples <= total, f"there are only {total} samples, not {samples}"
        assert samples == total or samples % self._global_batch == 0, f"no global batch ends after {samples} samples"

    def _find_next(self) -> Key | None:
        missing = self._line.due_in(self._needs())
        if missing:
            return min(missing, key=itemgetter(0))[1]
        source = self._tail_source
        return source[0] if source is not None and source[0] not in self._line.open_windows else None

    def _needs(self) -> list[LaneSpan]:
        """What the node needs of lanes for the next group; nothing where that depends on counts yet to come."""
        end, total = self._given + self._group, self._line.total
        if self._deal.is_cut and total is None and end > self._line.known:
            return []
        return self._deal.needs(self._given, end if total is None else min(end, total))

    def _groups_ready(self) -> int:
        known = self._line.known
        if self._given + self._group > known:
            return 0
        limit = self._given + (known - self._given) // self._group * self._group
        return (self._deal.settled(self._given, limit, self._group, self._line.reaches()) - self._given) // self._group

    def _settle(self) -> list[Entry]:
        total = self._line.total
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

    def _extend(self) -> None:
        """Let lanes go on through windows that are open."""
        if self._deal.is_cut:  # otherwise every number of a lane is needed
            self._line.skip(self._needs())
        self._line.extend()

    def _give(self, groups: int) -> list[Entry]:
        """The worker's batches of the next groups."""
        (worker, stride), given, first = self._reader.worker, self._given, self._groups_given
        stop, mine = given + groups * self._group, range(groups)
        positions = self._deal.positions(given, stop).reshape(groups, -1)
        if self._reader.split == "batches":
            mine = mine[(worker - first) % stride :: stride]
            positions, worker, stride = positions[mine.start :: stride], 0, 1
        samples = self._line.samples(positions[:, worker::stride].ravel())
        self._given, self._groups_given = stop, first + groups
        return samples.batches(
            self.batch_size,
            (self._number_start + (first + i) * stride + worker for i in mine),
            (given + (i + 1) * self._group for i in mine),
        )

    def _last_batch(self, samples: Row[Entry], repeats: int, samples_after: int) -> list[Entry]:
        """The worker's batch from the rank's last samples, of which the last `repeats` are repeats."""
        (worker, stride), group = self._reader.worker, self._groups_given
        if self._reader.split == "batches":
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
            self._line.forget(self._given)
            self._forgotten = self._given
        source = self._tail_source
        self._line.close_all_but(None if source is None else source[0])

    @property
    def _tail_position(self) -> tuple[int, int] | None:
        """The position whose window has the one sample that the tail gives this rank, left over or repeated, and
        which of the repeats it is, or -1; None where it gives none, or more is left than that and whole rounds.
        """
        total = self._line.total
        if total is None or total - self._given >= self._group:
            return None
        left_over = (total - self._given) % self.ranks.world_size
        position = total - left_over + self._deal.turn
        if not left_over or self.tail == "drop" or (position >= total and self.tail != "pad"):
            return None
        if position < total:
            return position, -1
        return self._last_of_lane(position % self._partitions, total), position - total

    def _last_of_lane(self, lane: int, total: int) -> int:
        """The last position of a lane; of all, where the lane has none in the last global batch."""
        position = (lane_length(lane, total, self._partitions) - 1) * self._partitions + lane
        return position if position >= (total - 1) // self._global_batch * self._global_batch else total - 1

    @property
    def _tail_source(self) -> tuple[Key, int] | None:
        """Window and offset of the tail's sample; None where there is none, or its counts are missing."""
        if (tail := self._tail_position) is None:
            return None
        position, repeat = tail
        number, lane = divmod(position, self._partitions)
        if (found := self._line.find(lane, number)) is None:
            return None
        key, offset, count = found
        return key, offset if repeat < 0 else repeat % count
