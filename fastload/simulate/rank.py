"""One rank: it makes batches as a `DataLoader` does, and trains on them.

What is asked of the service, when, and what is given back is settled by the loader's own code: the epoch's cursor, the
feed, the windows' reader, the table of leases. What stands in for its threads is below: a line of batches ahead of the
trainer, some of which are being made at a time, each waiting for its chunks; and a trainer that takes one batch
after the other and works on it for a while. Decoding takes no time: a loader that cannot decode fast enough waits for
itself, whatever the cache.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np

from fastload.pipeline.feed import Feed, FeedSource
from fastload.pipeline.reader import ScatteredReader, WindowReader
from fastload.pipeline.windows import Window
from fastload.plan import BatchEntry, Ranks, epoch_cursor
from fastload.simulate.clock import VirtualLoop
from fastload.simulate.consumer import SimulatedConsumer
from fastload.simulate.data import Data, KnownCounts, SimulatedShards

OnClosed = Callable[[Window], None]


class _Reader(WindowReader):
    """Reports windows that are closed, and learns late of shards that were parsed."""

    on_closed: OnClosed

    def parsed(self, object_nos: list[int]) -> None:
        """What these were leased for is over."""
        self._indexed(np.array(object_nos, np.int64))

    def _give_back(self, closed: list[Window]) -> None:
        super()._give_back(closed)
        for window in closed:
            self.on_closed(window)


class _ScatteredReader(_Reader, ScatteredReader):
    """The same of one that leases by entry."""


class Pace:
    """How the ranks' steps hang together: each works by itself, or all wait for each other before each step."""

    def __init__(self, loop: VirtualLoop, rank_count: int) -> None:
        """`rank_count` ranks wait for each other; 1: none does."""
        self._loop, self._rank_count = loop, rank_count
        self._waiting: list[tuple[float, Callable[[], None], Callable[[], None]]] = []

    def step(self, seconds: float, begins: Callable[[], None], ends: Callable[[], None]) -> None:
        """A rank has its batch, for which it works so long: `begins` is called when it does, and `ends` after that."""
        self._waiting.append((seconds, begins, ends))
        if len(self._waiting) < self._rank_count:
            return
        waiting, self._waiting = self._waiting, []
        longest_s = max(each_s for each_s, _, _ in waiting)
        for _, each_begins, each_ends in waiting:
            each_begins()
            self._loop.call_later(longest_s, each_ends)


@dataclass(slots=True, eq=False)
class _QueuedBatch:
    """A batch ahead of the trainer."""

    entry: BatchEntry
    missing: set[int]
    is_done: bool = False


@dataclass(frozen=True, slots=True)
class RankEpoch:
    """What a rank did in an epoch: when, for how long it waited for its own batches and then for other ranks, and how
    much it got. `leased_bytes` are those of its leases, by where the chunks had come from (`protocol.SOURCES`).
    """

    epoch: int
    began_s: float
    ended_s: float
    stall_s: float
    peers_s: float
    samples: int
    batches: int
    leased_bytes: tuple[int, ...]


class Observer(Protocol):
    """Callbacks about what a rank does."""

    def has_read(self, rank: Rank, entry: BatchEntry) -> None:
        """It has made a batch."""
        ...

    def has_closed(self, rank: Rank, window: Window) -> None:
        """It needs nothing of a window any more."""
        ...

    def has_ended(self, rank: Rank) -> None:
        """It has come to the end of an epoch."""
        ...


class Rank:
    """See the module's text."""

    def __init__(
        self,
        data: Data,
        ranks: Ranks,
        consumer: SimulatedConsumer,
        shards: SimulatedShards,
        own: list[int],
        pace: Pace,
        loop: VirtualLoop,
        observer: Observer,
    ) -> None:
        """`own` are the objects that its node reads."""
        self.ranks = ranks
        self._data, self._job = data, data.job
        self._consumer, self._shards, self._own = consumer, shards, own
        self._pace, self._loop, self._observer = pace, loop, observer
        self._line: deque[_QueuedBatch] = deque()
        self._to_make: deque[_QueuedBatch] = deque()
        self._being_made = 0
        self.epoch = -1
        self.epochs: list[RankEpoch] = []

    @property
    def is_finished(self) -> bool:
        return len(self.epochs) == self._job.epochs

    def begin(self) -> None:
        """Begin the next epoch."""
        self.epoch += 1
        self._began_s = self._loop.time()
        self._stall_s = self._peers_s = 0.0
        self._samples = self._batches = 0
        self._leased_before = self._leased()
        self._consumer.consumer.keep(self._own, self._job.cache_policy)
        self._reader = self._make_reader()
        cursor = epoch_cursor(self._data.orders(self.epoch), self.ranks, self._job.batch_size, tail="pad")
        next_objects = partial(self._data.expected_next, self.epoch, self.ranks)
        self._feed = Feed(cursor, [FeedSource(self._reader, KnownCounts(self._data), next_objects)])
        self._entries: Iterator[BatchEntry] = self._feed.entries()
        self._is_fed = self._is_parsing = False
        self._ask()
        self._fill()

    def _leased(self) -> list[int]:
        return list(self._consumer.state.granted.byte_counts)

    def _make_reader(self) -> _Reader:
        arguments = self._consumer.consumer, self._shards, self._data.first_chunk
        reader: _Reader
        if self._job.shuffle == "global":
            reader = _ScatteredReader(*arguments)
            reader.chunks_of = self._data.chunks_of
            reader.foresees = self._job.cache_policy == "future"
        else:
            reader = _Reader(*arguments)
        reader.on_closed = partial(self._observer.has_closed, self)
        return reader

    # The line of batches

    def _fill(self) -> None:
        """Go on with the feed while the line has room."""
        while not self._is_fed and not self._is_parsing and len(self._line) < self._job.depth:
            entry = next(self._entries, None)
            if entry is None:
                self._is_fed = True
                self._loop.call_soon(self._take)
            elif self._shards.to_parse:
                self._is_parsing = True
                self._parse(deque((no, self._data.chunks_of_object(no)) for no in self._shards.to_parse), entry)
            else:
                self._append(entry)

    def _parse(self, shards: deque[tuple[int, range]], entry: BatchEntry) -> None:
        """Walk over the chunks of shards that have no index, one after the other; then go on with the entry."""
        while shards:
            number, chunks = shards.popleft()
            if chunks:
                shards.appendleft((number, chunks[1:]))
                self._consumer.acquire_later([chunks[0]], partial(self._parse_on, shards, entry))
                return
            self._shards.parsed(number)
        self._reader.parsed(self._shards.to_parse)
        self._shards.to_parse = []
        self._is_parsing = False
        self._append(entry)
        self._fill()

    def _parse_on(self, shards: deque[tuple[int, range]], entry: BatchEntry, _: set[int]) -> None:
        self._loop.call_soon(self._parse, shards, entry)

    def _append(self, entry: BatchEntry) -> None:
        place = _QueuedBatch(entry, set(self._data.chunks_of(entry).tolist()))
        self._line.append(place)
        self._to_make.append(place)
        self._make()

    def _make(self) -> None:
        """Begin batches while there are threads for them."""
        while self._to_make and self._being_made < self._job.threads:
            self._being_made += 1
            self._gather(self._to_make.popleft())

    def _gather(self, place: _QueuedBatch) -> None:
        """Wait for the batch's chunks, as they come: see `pipeline.gather`."""

        def got(chunks: set[int]) -> None:
            place.missing -= chunks
            if place.missing:
                self._gather(place)
            else:
                self._loop.call_soon(self._made, place)

        self._consumer.acquire_later(place.missing, got)

    def _made(self, place: _QueuedBatch) -> None:
        self._being_made -= 1
        place.is_done = True
        self._observer.has_read(self, place.entry)
        self._feed.done(place.entry)
        self._make()
        self._take()

    # The trainer

    def _ask(self) -> None:
        """Wait for the next batch."""
        self._asked_s, self._is_asking = self._loop.time(), True
        self._take()

    def _take(self) -> None:
        """Train on the next batch, if it is wanted and there; end the epoch where there is none."""
        if not self._is_asking:
            return
        if self._line and self._line[0].is_done:
            self._is_asking = False
            self._stall_s += self._loop.time() - self._asked_s
            self._train(self._line.popleft().entry)
            self._loop.call_soon(self._fill)
        elif self._is_fed and not self._line:
            self._is_asking = False
            self._end()

    def _train(self, entry: BatchEntry) -> None:
        had_s = self._loop.time()

        def begins() -> None:
            self._peers_s += self._loop.time() - had_s

        self._samples += len(entry) - entry.repeats
        self._batches += 1
        self._pace.step(self._job.step_s(self.ranks.local_rank, len(entry)), begins, self._ask)

    def _end(self) -> None:
        """The epoch is over."""
        self._reader.close()
        self.epochs.append(
            RankEpoch(
                self.epoch,
                self._began_s,
                self._loop.time(),
                self._stall_s,
                self._peers_s,
                self._samples,
                self._batches,
                tuple(after - before for after, before in zip(self._leased(), self._leased_before, strict=True)),
            )
        )
        self._observer.has_ended(self)
        if not self.is_finished:
            self._loop.call_soon(self.begin)
