"""One pass over a rank's share of an epoch, put together: cursor, feed and assembler over one session."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from fastload.engine.assemble import Assembler, Skips
from fastload.engine.columns import ColumnSet
from fastload.engine.feed import Feed
from fastload.engine.gather import Gatherer
from fastload.engine.job import Job
from fastload.engine.reader import WindowReader
from fastload.engine.scattered import ScatteredReader, check_allowed, holds
from fastload.engine.session import Session, Source
from fastload.plan import EpochCursor, Tail, epoch_orders, first_objects, objects_in_use_order
from fastload.service.handle import Cache

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


@dataclass(frozen=True, slots=True)
class Pass:
    """A pass that is ready to be run. `skips` counts the samples that cannot be read, if they are left out."""

    session: Session
    cursor: EpochCursor
    feed: Feed
    assembler: Assembler
    skips: Skips | None


def begin_pass(
    session: Session, source: Source, job: Job, options: PassOptions, epoch: int, batch_size: int, **cursor_options: Any
) -> Pass:
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
    feed = Feed(cursor, reader, job.counts(source, session.waits), expected_next)
    gatherer = Gatherer(session.consumer, int(source.first_chunk[-1]), session.consumer.chunk_bytes)
    skips = Skips() if options.skips_errors else None
    assembler = Assembler(manifest, options.columns, reader.live, gatherer, source.slots, skips)
    if isinstance(reader, ScatteredReader):
        reader.chunks_of = assembler.chunks_of
    return Pass(session, cursor, feed, assembler, skips)


def _check_scattered(source: Source, job: Job, cache: Cache) -> None:
    manifest = source.manifest
    assert manifest is not None
    own = objects_in_use_order(manifest, job.order, 0, ranks=job.ranks)
    data_bytes = int(manifest.sizes[own].sum())
    limits = cache.ram_bytes, cache.disk_bytes, cache.chunk_bytes
    if not holds(data_bytes, *limits[:2]):
        counts = source.sample_counts()
        check_allowed(data_bytes, *limits, None if counts is None else counts[own])
