"""One pass over a rank's share of an epoch, put together: cursor, feed and assembler over one session.

`Pass` is what loaders see of it. A mixture of data sets has passes of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from fastload.arguments import CachePolicy
from fastload.cache.policy import PolicyName
from fastload.client.handle import Handle
from fastload.pipeline.columns import ColumnSet
from fastload.pipeline.counts import CountSource
from fastload.pipeline.feed import Feed
from fastload.pipeline.finish import SAMPLE_ERRORS, Function, Gathered, Maker, OneMaker
from fastload.pipeline.gather import Gatherer, LocalMemory, Memory, SampleGatherer, Skips, part_of_entry
from fastload.pipeline.job import Job
from fastload.pipeline.reader import ScatteredReader, WindowReader, check_allowed, holds
from fastload.pipeline.run import RunFeed
from fastload.pipeline.source import Session, Source
from fastload.plan import (
    BatchEntry,
    Cursor,
    Position,
    Tail,
    epoch_cursor,
    epoch_orders,
    first_objects,
    objects_in_use_order,
)
from fastload.stats import Account
from fastload.transport.slots import SlotPool
from fastload.waiting import Waits

# Of the next epoch, what is fetched ahead when one has been read to its end: some windows, since the user may be about
# to do something else.
_NEXT_EPOCH_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class PassOptions:
    """What a data set says about its passes, beside the order."""

    cache: Handle
    columns: ColumnSet
    tail: Tail
    skips_errors: bool
    functions: tuple[Function, ...] = ()  # applied to samples
    cache_policy: CachePolicy = "auto"

    def policy(self, *, is_global: bool) -> PolicyName:
        """The cache policy, for one of two ways to read: each chunk once an epoch, or many times."""
        if self.cache_policy != "auto":
            return self.cache_policy
        return "future" if is_global else "pin"


class Pass(Protocol):
    """A pass that is ready to be run, once. `skips` counts the samples that cannot be read, if they are left out."""

    @property
    def waits(self) -> Waits:
        """Where its waiting is booked."""
        ...

    @property
    def account(self) -> Account:
        """Whom to ask for the service's figures."""
        ...

    @property
    def skips(self) -> Skips | None:
        """What counts the samples that are left out."""
        ...

    @property
    def feed(self) -> RunFeed:
        """Its entries."""
        ...

    @property
    def cursor(self) -> Cursor[Any]:
        """The plan."""
        ...

    @property
    def maker(self) -> Maker:
        """What is made of gathered samples."""
        ...

    @property
    def memory(self) -> Memory:
        """Where gathered bytes go that this process makes something of."""
        ...

    @property
    def slots(self) -> SlotPool:
        """Where batches go that this process makes."""
        ...

    def gather(self, entry: Any, memory: Memory, *, is_keyed: bool = False) -> Any:
        """The bytes of an entry's samples, and keys for them if `is_keyed`."""
        ...

    def readable(self, entry: Any, memory: Memory) -> Any:
        """The entry without those of its samples that cannot be read and may be left out."""
        ...

    def position(self, entry: Any) -> Position:
        """Where a run stands once an entry is delivered."""
        ...

    def interrupted(self) -> AbstractContextManager[None]:
        """While it is entered, waits for bytes or counts end: those of its consumers."""
        ...

    def end(self) -> None:
        """It is over, finished or not: what it holds is given back, and its session may serve another."""
        ...


@dataclass(frozen=True, slots=True)
class SourcePass:
    """What a pass has of one data set."""

    source: Source
    session: Session
    reader: WindowReader
    counts: CountSource
    assembler: SampleGatherer

    def end(self) -> None:
        """The pass is over, finished or not: windows are given back, and the session may serve another."""
        try:
            self.reader.close()
        finally:
            self.source.give_back(self.session)


@dataclass(frozen=True, slots=True)
class OnePass:
    """A pass over one data set."""

    cursor: Cursor[BatchEntry]
    feed: Feed
    memory: Memory
    source: SourcePass
    skips: Skips | None

    @property
    def waits(self) -> Waits:
        """Those of its session."""
        return self.source.session.waits

    @property
    def account(self) -> Account:
        """Its consumer."""
        return self.source.session.consumer

    @property
    def maker(self) -> OneMaker:
        """Decodes, and applies the user's functions to samples."""
        return self.source.assembler.maker

    @property
    def slots(self) -> SlotPool:
        """Those of its source, which outlive it."""
        return self.source.source.slots

    def gather(self, entry: BatchEntry, memory: Memory, *, is_keyed: bool = False) -> Gathered:
        """The bytes of an entry's samples."""
        memory.begin()
        return self.source.assembler.gather(entry, self.cursor.epoch, memory, is_keyed=is_keyed)

    def readable(self, entry: BatchEntry, memory: Memory) -> BatchEntry:
        """The entry without those of its samples that cannot be read and may be left out."""
        return part_of_entry(entry, self.source.assembler.readable(entry, self.cursor.epoch, memory))

    def position(self, entry: BatchEntry) -> Position:
        """Where a run stands once an entry is delivered."""
        return self.feed.position(entry)

    def interrupted(self) -> AbstractContextManager[None]:
        """While it is entered, waits for bytes or counts end."""
        return self.source.session.consumer.interrupted()

    def end(self) -> None:
        """It is over, finished or not."""
        self.source.end()


def made(current: Pass, entry: Any, finish: Callable[[Any], Any], memory: Memory, *, is_keyed: bool = False) -> Any:
    """What `finish` makes of an entry's samples, or of those that can be read, where others may be left out."""
    try:
        return finish(current.gather(entry, memory, is_keyed=is_keyed))
    except SAMPLE_ERRORS:
        if current.skips is None:
            raise
        return finish(current.gather(current.readable(entry, current.memory), memory, is_keyed=is_keyed))


def open_source(source: Source, job: Job, options: PassOptions, skips: Skips | None) -> SourcePass:
    """Open a session for a pass over one data set. Its `end` must follow. Raises `ConfigError`."""
    session = source.open()
    try:
        return _opened(session, source, job, options, skips)
    except BaseException:
        source.give_back(session)
        raise


def _opened(session: Session, source: Source, job: Job, options: PassOptions, skips: Skips | None) -> SourcePass:
    manifest = source.manifest
    assert manifest is not None, "a session is open"
    is_scattered = job.order.shuffle == "global"
    if is_scattered:
        _check_scattered(source, job, options.cache)
    consumer = session.consumer
    policy = options.policy(is_global=is_scattered)
    consumer.keep(job.own_objects(source), policy)
    reader = (ScatteredReader if is_scattered else WindowReader)(consumer, source.shards, source.first_chunk)
    gatherer = Gatherer(consumer, int(source.first_chunk[-1]), consumer.chunk_bytes)
    maker = OneMaker(options.columns, options.functions)
    assembler = SampleGatherer(manifest, maker, reader.live, gatherer, job.order.seed, skips)
    if isinstance(reader, ScatteredReader):
        reader.chunks_of = assembler.chunks_of
        reader.foresees = policy == "future"
    return SourcePass(source, session, reader, job.counts(source, session), assembler)


def begin_pass(
    source: Source, job: Job, options: PassOptions, epoch: int, batch_size: int, **cursor_options: Any
) -> OnePass:
    """A pass over `epoch`; its `end` must follow. `cursor_options` are those of `epoch_cursor`.

    Raises `ConfigError`, and `StateError` where it cannot begin where it should.
    """
    skips = Skips() if options.skips_errors else None
    opened = open_source(source, job, options, skips)
    try:
        manifest, order, ranks = source.manifest, job.order, job.ranks
        assert manifest is not None, "a session is open"
        orders = epoch_orders(manifest, order, epoch)
        cursor = epoch_cursor(orders, ranks, batch_size, tail=options.tail, **cursor_options)
        ahead_bytes = 0 if source.grows else _NEXT_EPOCH_BYTES  # the next epoch may have another list
        expected_next = partial(first_objects, manifest, order, epoch + 1, ranks, ahead_bytes)
        feed = Feed(cursor, opened.reader, opened.counts, expected_next)
        return OnePass(cursor, feed, LocalMemory(source.slots), opened, skips)
    except BaseException:
        opened.end()
        raise


def _check_scattered(source: Source, job: Job, cache: Handle) -> None:
    manifest = source.manifest
    assert manifest is not None
    own = objects_in_use_order(manifest, job.order, 0, ranks=job.ranks)
    data_bytes = int(manifest.sizes[own].sum())
    limits = cache.ram_bytes, cache.disk_bytes, cache.chunk_bytes
    if not holds(data_bytes, *limits[:2]):
        counts = source.sample_counts()
        check_allowed(data_bytes, *limits, None if counts is None else counts[own])
