"""The windows of one data set in one pass: planned, opened, held by batches, and released.

A reader connects a pass to its consumer. It sends the plan, wants the chunks of a window that is opened, releases them
when the last batch from that window is made, and reports progress through the plan. Windows of one partition are opened
and closed in plan order; those of several partitions overlap, and progress is then whatever lies before the first
window that is not closed.

With `shuffle="global"` every batch takes samples from anywhere, and a window is a whole partition. Its shards are
indexed, but its chunks are not leased: each entry wants the chunks of its own samples when it is due, and releases them
when its batch is made (`ScatteredReader`). The plan has the service fill the cache with all of the data: after the
first epoch the disk tier holds it, and reads go there. Which chunks will be read is announced (*foreseen*) some hundred
thousand samples ahead, so that RAM keeps what is needed soonest. This is allowed where the cache holds the data, or
where samples are so large that fetching the chunks of each costs little more than the samples themselves; otherwise an
epoch would fetch the data many times over.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastload import shares
from fastload.cache.policy.known_order import lookahead
from fastload.client.consumer import Consumer
from fastload.config import format_bytes
from fastload.errors import ConfigError, ServiceError
from fastload.pipeline.shards import ShardTable
from fastload.pipeline.windows import Ints, LiveWindows, Window, window_chunks
from fastload.plan import BatchEntry

Objects = npt.NDArray[np.integer]


class WindowReader:
    """Windows are named by any hashable key. `done` may be called by any thread, the rest by one at a time."""

    def __init__(self, consumer: Consumer, shards: ShardTable, first_chunk: Ints) -> None:
        self._consumer = consumer
        self._shards = shards
        self._first_chunk = first_chunk
        self.live = LiveWindows(len(first_chunk) - 1)
        self._opening: Ints | None = None  # the chunks of a window that is wanted and not open yet
        self._planning = threading.Lock()  # guards what follows, and the order of the messages about it
        self._planned: list[Hashable] = []
        self._plan_ends: list[int] = []  # the position in the plan, in chunks, after each planned window
        self._behind = 0  # how many of the planned windows are behind
        self._epoch = 0
        self._closed: set[Hashable] = set()
        self._is_exhausted = False

    def plan(self, windows: Sequence[tuple[Hashable, Objects]], epoch: int) -> None:
        """From now on these windows, with their object numbers, are what will be needed, in this order."""
        objects = np.concatenate([np.empty(0, np.int32), *(object_nos for _, object_nos in windows)])
        chunks = np.concatenate([[0], np.cumsum(self._chunk_counts(objects))])
        ends = np.cumsum([len(object_nos) for _, object_nos in windows], dtype=np.int64)
        with self._planning:
            self._consumer.set_plan(objects, epoch)
            self._planned, self._plan_ends = [key for key, _ in windows], chunks[ends].tolist()
            self._behind, self._epoch = 0, epoch
            self._closed.clear()

    def open(self, key: Hashable, object_nos: Objects) -> npt.NDArray[np.int64]:
        """Open a window; the sample counts of its shards, int64[objects]. Waits for what must be parsed."""
        numbers = object_nos.astype(np.int64)
        self._opening = chunk_nos = self._chunks_to_lease(numbers)
        self._consumer.want(chunk_nos)
        indexes = self._shards.get(self._consumer, numbers.tolist())
        self._indexed(numbers)
        if len(chunk_nos) and len(beyond := self._shards.chunks_beyond(numbers, indexes)):
            self._opening = chunk_nos = np.union1d(chunk_nos, beyond)
            self._consumer.want(beyond)
        window = Window(key, numbers, indexes, self._first_chunk[numbers], chunk_nos)
        self.live.open(window)
        self._opening = None
        return window.counts

    def hold(self, entry: BatchEntry, windows: Collection[Hashable]) -> None:
        """The batch of this entry, whose samples lie in these windows, is being built."""
        self.live.hold(windows)

    def due(self, entry: BatchEntry) -> None:
        """The entry is next: its batch may be made from now on."""

    @property
    def lookahead(self) -> int:
        """How many samples are held before they are due, so that their uses are announced ahead."""
        return 0

    def done(self, entry: BatchEntry, windows: Collection[Hashable]) -> None:
        """Its batch is built, or given up."""
        self._give_back(self.live.done(windows))

    def retire_all_but(self, needed: Collection[Hashable]) -> None:
        """No batch to come needs any other window that is open."""
        self._give_back(self.live.retire_all_but(needed))

    def exhausted(self, next_objects: Objects, next_epoch: int) -> None:
        """The pass has been read to its end; `next_objects` are what the next one is expected to begin with."""
        with self._planning:
            self._is_exhausted = True
            self._planned = []
            self._consumer.set_plan(next_objects, next_epoch)

    def close(self) -> None:
        """Release all that is still held, and end the plan if it was not read to its end."""
        try:
            self._let_go()
        except ServiceError:
            if not self._consumer.is_ended:
                raise
            # It was closed meanwhile, and with it all that it held.

    def _chunks_to_lease(self, numbers: Ints) -> Ints:
        """The chunks of a window's objects that are leased while it is open."""
        return self._chunks_of_objects(numbers)

    def _indexed(self, numbers: Ints) -> None:
        """The objects of a window that is being opened are indexed."""

    def _chunks_of_objects(self, numbers: Ints) -> Ints:
        return window_chunks(self._first_chunk, numbers)

    def _let_go(self) -> None:
        with self._planning:
            self._planned = []
        self._give_back(self.live.close_all())
        if self._opening is not None:
            self._consumer.release(self._opening)
            self._opening = None
        if not self._is_exhausted:
            self._consumer.set_plan([], self._epoch)

    def _give_back(self, closed: list[Window]) -> None:
        if not closed:
            return
        for window in closed:
            if len(window.chunk_nos):
                self._consumer.release(window.chunk_nos)
        with self._planning:
            self._closed.update(window.key for window in closed)
            before = self._behind
            while self._behind < len(self._planned) and self._planned[self._behind] in self._closed:
                self._behind += 1
            if self._behind > before:
                self._consumer.advance(self._plan_ends[self._behind - 1])

    def _chunk_counts(self, object_nos: Objects) -> Ints:
        counts: Ints = self._first_chunk[object_nos + 1] - self._first_chunk[object_nos]
        return counts


# Of the disk tier's quota, what chunks can be sure of: each has a trailer, and blocks are rounded up.
_DISK_SHARE = shares.DISK_CHUNKS
# Remote bytes of an epoch, in times of the data, up to which a cache that does not hold the data will do.
_AMPLIFICATION_MAX = 1.25


@dataclass(slots=True, eq=False)
class _Held:
    """An entry, the chunks that it reads, and the number of its first use."""

    entry: BatchEntry
    chunks: Ints
    is_leased: bool = False
    first_use: int = 0


class ScatteredReader(WindowReader):
    """A reader that leases by entry. `chunks_of` gives the chunk numbers that an entry's samples lie in."""

    def __init__(self, consumer: Consumer, shards: ShardTable, first_chunk: Ints) -> None:
        super().__init__(consumer, shards, first_chunk)
        self.chunks_of: Callable[[BatchEntry], Ints] = lambda entry: np.empty(0, np.int64)
        self.foresees = False
        self._leasing = threading.Lock()
        self._held: dict[int, _Held] = {}  # by identity, in the order in which they are read
        self._position_of = np.full(int(first_chunk[-1]), -1, np.int32)  # of each chunk in the plan
        self._announced = self._passed = 0  # uses
        self._holders: Counter[int] = Counter()  # chunk -> how many entries hold it

    def plan(self, windows: Sequence[tuple[Hashable, Objects]], epoch: int) -> None:
        """All of these windows' objects are to be kept."""
        objects = np.concatenate([np.empty(0, np.int32), *(object_nos for _, object_nos in windows)])
        self._consumer.set_plan(objects, epoch, warm=True)
        self._epoch = epoch
        _, first = np.unique(objects, return_index=True)
        chunks = self._chunks_of_objects(objects[np.sort(first)].astype(np.int64))
        with self._leasing:
            self._position_of.fill(-1)
            self._position_of[chunks] = np.arange(len(chunks), dtype=np.int32)
            for held in self._held.values():  # announced with positions in the plan before
                self._foresee(held)

    @property
    def lookahead(self) -> int:
        """See `cache.policy.known_order`; uses, taken for samples."""
        return lookahead(len(self._position_of)) if self.foresees else 0

    def hold(self, entry: BatchEntry, windows: Collection[Hashable]) -> None:
        """Announce which chunks the entry will read."""
        super().hold(entry, windows)
        held = _Held(entry, self.chunks_of(entry))
        with self._leasing:
            self._held[id(entry)] = held
            self._foresee(held)

    def due(self, entry: BatchEntry) -> None:
        """Ask for the entry's chunks, before they are needed."""
        with self._leasing:
            held = self._held[id(entry)]
            held.is_leased = True
            self._holders.update(held.chunks.tolist())
        self._consumer.want(held.chunks)

    def done(self, entry: BatchEntry, windows: Collection[Hashable]) -> None:
        """Release the chunks that no other entry holds."""
        self._release(self._drop([id(entry)]))
        super().done(entry, windows)

    def exhausted(self, next_objects: Objects, next_epoch: int) -> None:
        """The pass has been read to its end. What the next one begins with is as likely to be here as the rest."""
        super().exhausted(next_objects[:0], next_epoch)

    def _chunks_to_lease(self, numbers: Ints) -> Ints:
        return np.empty(0, np.int64)

    def _indexed(self, numbers: Ints) -> None:
        """The shards are indexed: what that was leased for is over."""
        self._release(self._chunks_of_objects(numbers))

    def _let_go(self) -> None:
        self._release(self._drop(list(self._held)))
        super()._let_go()

    def _drop(self, entry_ids: list[int]) -> Ints:
        """Forget what these entries hold; returns the chunks that no entry holds then."""
        with self._leasing:
            held = [self._held.pop(number) for number in entry_ids if number in self._held]
            leased = [each.chunks for each in held if each.is_leased]
            self._pass()
            chunks: list[int] = np.concatenate(leased).tolist() if leased else []
            self._holders.subtract(chunks)
            free = [chunk for chunk in set(chunks) if self._holders[chunk] <= 0]
            for chunk in free:
                del self._holders[chunk]
        return np.array(free, np.int64)

    def _foresee(self, held: _Held) -> None:
        """Announce the uses of an entry, which follow those of the entries before."""
        if not self.foresees:
            return
        positions = self._position_of[held.chunks]
        positions = positions[positions >= 0]
        held.first_use = self._announced
        self._announced += len(positions)
        self._consumer.foresee(held.first_use, positions)

    def _pass(self) -> None:
        """Report progress: the uses before those of the first entry that is held are made."""
        first = next((held.first_use for held in self._held.values()), self._announced)
        if self.foresees and first > self._passed:
            self._passed = first
            self._consumer.advance(first)

    def _release(self, chunks: Ints) -> None:
        if len(chunks):
            self._consumer.release(chunks)


def holds(data_bytes: int, ram_bytes: int, disk_bytes: int) -> bool:
    """Whether a cache of these limits holds the data."""
    return data_bytes <= _cache_bytes(ram_bytes, disk_bytes)


def _cache_bytes(ram_bytes: int, disk_bytes: int) -> int:
    return max(ram_bytes, int(disk_bytes * _DISK_SHARE))


def check_allowed(
    data_bytes: int, ram_bytes: int, disk_bytes: int, chunk_bytes: int, counts: npt.NDArray[np.int64] | None
) -> None:
    """Raise `ConfigError` where the cache does not hold the data and an epoch would fetch it many times over.

    `data_bytes` is what this node reads in an epoch; `counts` are the samples of its shards, None if not all are known.
    """
    cache_bytes = _cache_bytes(ram_bytes, disk_bytes)
    cache = (
        f'shuffle="global" reads {format_bytes(data_bytes)} in no order, and the cache holds '
        f"{format_bytes(cache_bytes)}"
    )
    cure = f"raise disk_bytes to {format_bytes(int(data_bytes / _DISK_SHARE) + 1)}, or use shuffle=True"
    if counts is None:
        raise ConfigError(f"{cache}; that may do where samples are large, but the shards are not indexed yet: {cure}")
    amplification = fetched_share(data_bytes, cache_bytes, chunk_bytes, int(counts.sum()))
    if amplification > _AMPLIFICATION_MAX:
        raise ConfigError(f"{cache}: an epoch would fetch {amplification:.1f} times the data; {cure}")


def fetched_share(data_bytes: int, cache_bytes: int, chunk_bytes: int, sample_count: int) -> float:
    """Bytes that an epoch fetches, in times of the data, where each sample that is not cached costs whole chunks."""
    if not sample_count:
        return 0.0
    chunks_of_sample = data_bytes / sample_count / chunk_bytes + 1
    missed = 1 - cache_bytes / data_bytes
    return missed * sample_count * chunks_of_sample * chunk_bytes / data_bytes
