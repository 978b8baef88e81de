"""From the order to a rank's batches, as sample counts become known.

The samples of an epoch stand in one line: the windows, one after the other, each in its permuted order.
Position p of the line (counted from where the run starts or resumes) belongs to rank p mod world_size, and
global batch g is the positions from g·B·W up to (g+1)·B·W, so that its samples are the same at every world
size W for which B·W is the same.

A `RankCursor` is told the counts of one window after the other and answers with the batches that are settled
by then. A batch is settled once all its positions are known, since until then nobody can say whether a full
group of W follows. At the end up to W-1 positions are left over: `tail="pad"` fills the group with the first
samples of the last window that has any (and with those again, if it has fewer), `"drop"` leaves them out,
`"uneven"` gives them to the first ranks. What is left over lies after every batch given out before, so a
resumed run always sees the window that it is padded from.

Pure: no clock, no I/O, and the work per window is a few calls over arrays, whatever it holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fastload.errors import ConfigError, StateError
from fastload.plan.order import EpochOrder
from fastload.plan.position import Place, Position
from fastload.plan.ranks import Ranks
from fastload.plan.tail import Tail, check_tail

Split = Literal["batches", "samples"]


@dataclass(frozen=True, slots=True, eq=False)
class BatchEntry:
    """One batch of one rank (or of one of its workers), as numbers.

    `number` counts the rank's batches through the epoch. Sample i is number `sample_no[i]` (int64) of object
    `object_no[i]` (int32). The last `repeats` samples are repeats made to fill the tail. All samples lie in
    the windows from `window_first` to `window_last`. `after` and `samples_after` are the position once every
    rank has this batch.
    """

    number: int
    object_no: NDArray[np.int32]
    sample_no: NDArray[np.int64]
    repeats: int
    window_first: int
    window_last: int
    after: Place
    samples_after: int

    def __len__(self) -> int:
        return len(self.object_no)


class RankCursor:
    """The batches of one rank in one epoch. One user at a time; made anew for each epoch.

    `worker=(w, n)` is one of n workers that share the rank's samples. With `split="batches"` it gets every
    n-th batch, beginning with its own number, which is the order in which torch's DataLoader asks its
    workers. With `split="samples"` it gets every n-th sample, in batches of its own; together they are the
    rank's samples, each once.

    Raises `ConfigError` for arguments that do not fit and `StateError` where `start` belongs to another run.
    """

    def __init__(
        self,
        order: EpochOrder,
        ranks: Ranks,
        batch_size: int,
        *,
        drop_last: bool = False,
        tail: Tail = "pad",
        start: Position | None = None,
        worker: tuple[int, int] = (0, 1),
        split: Split = "batches",
    ) -> None:
        _check_arguments(order, batch_size, worker)
        self.order, self.ranks, self.batch_size = order, ranks, batch_size
        self.drop_last, self.tail = drop_last, check_tail(tail)
        self.start = start if start is not None else Position.start(order, ranks, batch_size, tail)
        self.start.check(order, ranks, batch_size, tail)
        place = self.start.places[order.partition]
        self._next_window, self._skip = place
        self._worker, self._split = worker, split
        # Batches are dealt to workers; or each worker takes its part of a group as large as a batch for every
        # worker.
        self._group_size = batch_size * (worker[1] if split == "samples" else 1)
        self._number_start = -(-self.start.samples // (batch_size * ranks.world_size))
        self._known = 0  # positions of the line so far, over all ranks, from the start
        self._groups_given = 0
        self._pending = _NO_SAMPLES  # this rank's samples that no batch has yet
        self._last_window = _NO_SAMPLES  # what the tail would be padded with

    @property
    def windows(self) -> range:
        """The windows that are still to be added, in order."""
        return range(self._next_window, self.order.window_count)

    @property
    def oldest_window(self) -> int:
        """The oldest window that a batch still to come may need; if none of those added, the next."""
        held = (samples for samples in (self._pending, self._last_window) if len(samples))
        return min((int(samples.window[0]) for samples in held), default=self._next_window)

    def window_objects(self, window: int) -> NDArray[np.int32]:
        """The object numbers of a window, int32; `add_window` wants one count for each."""
        return self.order.window_objects(window)

    def add_window(self, window: int, counts: NDArray[np.int64]) -> list[BatchEntry]:
        """The batches that are settled by the sample counts of a window's objects, int64[objects].

        Windows come in the order of `windows`. Raises `StateError` where the start lies beyond the window's
        samples.
        """
        assert window == self._next_window, f"window {window} out of turn; next is {self._next_window}"
        counts = np.asarray(counts, np.int64)
        line = self._window_line(window, counts)
        skip, self._skip = self._skip, 0
        if skip and skip >= len(line):
            raise StateError(
                f"the state is at sample {skip} of window {window}, which has {len(line)} samples: "
                "the shards are not those it was saved with; load another state"
            )
        self._next_window += 1
        known_before, self._known = self._known, self._known + len(line) - skip
        first = skip + (self.ranks.rank - known_before) % self.ranks.world_size
        objects = self.order.window_objects(window)
        if len(line) and self.tail == "pad":
            self._last_window = _Samples.located(line[: self.ranks.world_size], objects, counts, window)
        share = line[first :: self.ranks.world_size]
        self._pending = self._pending.then(_Samples.located(share, objects, counts, window))
        return self._settled(known_before, skip, window, len(line))

    def finish(self) -> list[BatchEntry]:
        """After the last window: what the tail leaves, at most one batch. Called once."""
        assert not self.windows, f"windows {self.windows} have not been added"
        full, left_over = divmod(self._known, self.ranks.world_size)
        rest = full - self._groups_given * self._group_size
        has_own = self.tail != "drop" and self.ranks.rank < left_over
        samples = self._pending.part(0, rest + has_own)
        repeats = int(self.tail == "pad" and 0 < left_over <= self.ranks.rank)
        if repeats:
            repeat = (self.ranks.rank - left_over) % len(self._last_window)
            samples = samples.then(self._last_window.part(repeat, repeat + 1))
        end = Place(self.order.window_count, 0)
        entry = self._entry(self._groups_given, samples, repeats, end, self.start.samples + self._known)
        return [] if entry is None else [entry]

    def position(self, entry: BatchEntry | None) -> Position:
        """The position after `entry` was delivered; for None, where the cursor started."""
        if entry is None:
            return self.start
        global_batch = self.batch_size * self.ranks.world_size
        return Position(
            epoch=self.order.epoch,
            batches=-(-entry.samples_after // global_batch),
            samples=entry.samples_after,
            places=(entry.after,),
            options=self.order.options,
            fingerprint=self.order.manifest.fingerprint,
            world_size=self.ranks.world_size,
            batch_size=self.batch_size,
            tail=self.tail,
        )

    def _window_line(self, window: int, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64: the samples of a window in their order, numbered through its objects."""
        objects = self.order.window_objects(window)
        assert len(counts) == len(objects), f"{len(counts)} counts for {len(objects)} objects"
        assert not len(counts) or counts.min() >= 0, "a sample count is negative"
        return self.order.window_permutation(window, int(counts.sum()))

    def _settled(self, known_before: int, skip: int, window: int, line_length: int) -> list[BatchEntry]:
        """The batches that end in `window`; every batch settled by it does, since its last position was
        unknown before.
        """
        world_size, size = self.ranks.world_size, self._group_size
        group_count = self._known // world_size // size - self._groups_given
        entries = []
        for i in range(group_count):
            number = self._groups_given + i
            samples_end = (number + 1) * size * world_size
            offset = skip + samples_end - known_before
            after = Place(window, offset) if offset < line_length else Place(window + 1, 0)
            samples = self._pending.part(i * size, (i + 1) * size)
            entries.append(self._entry(number, samples, 0, after, self.start.samples + samples_end))
        self._groups_given += group_count
        self._pending = self._pending.part(group_count * size, len(self._pending))
        return [entry for entry in entries if entry is not None]

    def _entry(
        self, group: int, samples: _Samples, repeats: int, after: Place, samples_after: int
    ) -> BatchEntry | None:
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
            int(mine.window[0]),
            int(mine.window[-1]),
            after,
            samples_after,
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Samples:
    """Samples in order: object_no int32[n], sample_no int64[n], and the window of each, int32[n], never
    falling.
    """

    object_no: NDArray[np.int32]
    sample_no: NDArray[np.int64]
    window: NDArray[np.int32]

    @classmethod
    def located(
        cls, line: NDArray[np.int64], objects: NDArray[np.int32], counts: NDArray[np.int64], window: int
    ) -> _Samples:
        """The samples of a window that `line` numbers through its `objects`, which hold `counts` samples."""
        ends = np.cumsum(counts)
        # "right" steps over objects without samples.
        place = np.searchsorted(ends, line, side="right")
        sample_no = line - (ends - counts)[place]
        return cls(objects[place], sample_no, np.full(len(line), window, np.int32))

    def __len__(self) -> int:
        return len(self.object_no)

    def part(self, start: int, stop: int, step: int = 1) -> _Samples:
        """Those from `start` to `stop`, or every `step`-th of them; views."""
        part = slice(start, stop, step)
        return _Samples(self.object_no[part], self.sample_no[part], self.window[part])

    def then(self, more: _Samples) -> _Samples:
        """These and `more` after them; a copy where both hold some."""
        if not len(self) or not len(more):
            return self if len(self) else more
        return _Samples(
            np.concatenate((self.object_no, more.object_no)),
            np.concatenate((self.sample_no, more.sample_no)),
            np.concatenate((self.window, more.window)),
        )


_NO_SAMPLES = _Samples(np.empty(0, np.int32), np.empty(0, np.int64), np.empty(0, np.int32))


def _check_arguments(order: EpochOrder, batch_size: int, worker: tuple[int, int]) -> None:
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size} must be at least 1")
    if order.options.partitions != 1:
        raise ConfigError(f"partitions={order.options.partitions} must be 1: all ranks share one partition's samples")
    if not 0 <= worker[0] < worker[1]:
        raise ConfigError(f"worker={worker[0]} must be from 0 to {worker[1] - 1}")
