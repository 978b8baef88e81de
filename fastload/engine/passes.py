"""One pass over a rank's share of an epoch, put together: cursor, feed and assembler over one session.

`Pass` is what loaders see of it. A mixture of data sets has passes of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from fastload.engine.assemble import Assembler, Skips
from fastload.engine.columns import ColumnSet
from fastload.engine.feed import Feed
from fastload.engine.gather import Gatherer
from fastload.engine.job import Job
from fastload.engine.reader import WindowReader
from fastload.engine.run import RunFeed
from fastload.engine.scattered import ScatteredReader, check_allowed, holds
from fastload.engine.session import Session, Source
from fastload.metrics import Account
from fastload.plan import BatchEntry, EpochCursor, Position, Tail, epoch_orders, first_objects, objects_in_use_order
from fastload.service.handle import Cache
from fastload.waiting import Waits

# Of the next epoch, what is fetched ahead when one has been read to its end: some windows, since the user may be about
# to do something else.
_NEXT_EPOCH_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class PassOptions:
    """What a data set says about its passes, beside the order."""

    cache: Cache
    columns: ColumnSet
    tail: Tail
    skips_errors: bool


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

    def batch(self, entry: Any) -> Any:
        """The batch of an entry."""
        ...

    def samples(self, entry: Any) -> Iterator[Any]:
        """The samples of an entry, one by one."""
        ...

    def position(self, entry: Any) -> Position:
        """Where a run stands once an entry is delivered."""
        ...

    def interrupted(self) -> AbstractContextManager[None]:
        """While it is entered, whoever waits for bytes gives up."""
        ...

    def end(self) -> None:
        """It is over, finished or not: what it holds is given back, and its session may serve another."""
        ...


@dataclass(frozen=True, slots=True)
class OnePass:
    """A pass over one data set."""

    source: Source
    session: Session
    cursor: EpochCursor
    feed: Feed
    assembler: Assembler
    skips: Skips | None

    @property
    def waits(self) -> Waits:
        """Those of its session."""
        return self.session.waits

    @property
    def account(self) -> Account:
        """Its consumer."""
        return self.session.consumer

    def batch(self, entry: BatchEntry) -> Any:
        """The batch of an entry."""
        return self.assembler.batch(entry)

    def samples(self, entry: BatchEntry) -> Iterator[Any]:
        """The samples of an entry, one by one."""
        return self.assembler.samples(entry)

    def position(self, entry: BatchEntry) -> Position:
        """Where a run stands once an entry is delivered."""
        return self.cursor.position(entry)

    def interrupted(self) -> AbstractContextManager[None]:
        """While it is entered, whoever waits for bytes gives up."""
        return self.feed.interrupted()

    def end(self) -> None:
        """It is over, finished or not: its windows are given back, and its session may serve another."""
        try:
            self.feed.close()
        finally:
            self.source.give_back(self.session)


def begin_pass(
    session: Session, source: Source, job: Job, options: PassOptions, epoch: int, batch_size: int, **cursor_options: Any
) -> OnePass:
    """A pass over `epoch`. `cursor_options` are those of `EpochCursor`. Raises `ConfigError` and `StateError`."""
    manifest, order, ranks = source.manifest, job.order, job.ranks
    assert manifest is not None, "a session is open"
    orders = epoch_orders(manifest, order, epoch)
    cursor = EpochCursor(orders, ranks, batch_size, tail=options.tail, **cursor_options)
    if order.shuffle == "global":
        _check_scattered(source, job, options.cache)
    kind = ScatteredReader if order.shuffle == "global" else WindowReader
    reader = kind(session.consumer, source.shards, source.first_chunk)
    expected_next = partial(first_objects, manifest, order, epoch + 1, ranks, _NEXT_EPOCH_BYTES)
    feed = Feed(cursor, reader, job.counts(source, session), expected_next)
    gatherer = Gatherer(session.consumer, int(source.first_chunk[-1]), session.consumer.chunk_bytes)
    skips = Skips() if options.skips_errors else None
    assembler = Assembler(manifest, options.columns, reader.live, gatherer, source.slots, skips)
    if isinstance(reader, ScatteredReader):
        reader.chunks_of = assembler.chunks_of
    return OnePass(source, session, cursor, feed, assembler, skips)


def _check_scattered(source: Source, job: Job, cache: Cache) -> None:
    manifest = source.manifest
    assert manifest is not None
    own = objects_in_use_order(manifest, job.order, 0, ranks=job.ranks)
    data_bytes = int(manifest.sizes[own].sum())
    limits = cache.ram_bytes, cache.disk_bytes, cache.chunk_bytes
    if not holds(data_bytes, *limits[:2]):
        counts = source.sample_counts()
        check_allowed(data_bytes, *limits, None if counts is None else counts[own])
