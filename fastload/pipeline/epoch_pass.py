"""One pass over a rank's share of an epoch, put together: a cursor, a feed, and what each source is gathered by.

A data set that is read alone is a pass over one source, a mixture one over several. Each source has a consumer, a plan
and live windows of its own, as if it were read alone. A batch is gathered part by part: one for each source, and for
each epoch of it, from which samples come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from fastload.arguments import CachePolicy
from fastload.cache.policy import PolicyName
from fastload.client.cache import Handle
from fastload.pipeline.columns import ColumnSet
from fastload.pipeline.feed import Feed, FeedSource
from fastload.pipeline.finish import (
    SAMPLE_ERRORS,
    BatchBuilder,
    Function,
    GatheredBatch,
    Mixing,
    PartOf,
    SourceBuilder,
    rows_of_parts,
)
from fastload.pipeline.gather import Gatherer, LocalMemory, Memory, SampleGatherer, Skips, joined_entry, part_of_entry
from fastload.pipeline.job import Job
from fastload.pipeline.reader import ScatteredReader, WindowReader, check_allowed, holds
from fastload.pipeline.source import AttachedConsumer, Source
from fastload.plan import Batch, BatchEntry, Cursor, Tail, first_objects, objects_in_use_order
from fastload.stats import JointAccount
from fastload.timing import activity
from fastload.transport.slots import SlotPool
from fastload.waiting import JointWaits, Waits

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


@dataclass(frozen=True, slots=True)
class SourcePass:
    """The part of a pass that belongs to one source."""

    source: Source
    attached: AttachedConsumer
    feed: FeedSource
    gatherer: SampleGatherer

    def end(self) -> None:
        """The pass is over, finished or not: windows are released, and the consumer may serve another."""
        try:
            self.feed.reader.close()
        finally:
            self.source.give_back(self.attached)


@dataclass(frozen=True, slots=True)
class EpochPass:
    """A pass that is ready to be run, once. `skips` counts the samples that cannot be read; None: they are errors."""

    cursor: Cursor[Any]
    sources: Sequence[SourcePass]
    feed: Feed[Any]
    builder: BatchBuilder
    memory: Memory  # for gathered bytes that this process decodes
    waits: Waits
    skips: Skips | None

    @classmethod
    def over(
        cls, cursor: Cursor[Any], sources: Sequence[SourcePass], skips: Skips | None, mixing: Mixing | None = None
    ) -> EpochPass:
        """A pass over `sources`, which are open, in the order of `cursor`; `mixing` where they are a mixture's."""
        return cls(
            cursor,
            sources,
            Feed(cursor, [each.feed for each in sources]),
            BatchBuilder(tuple(each.gatherer.builder for each in sources), mixing),
            LocalMemory(sources[0].source.slots),
            JointWaits([each.attached.waits for each in sources]),
            skips,
        )

    @property
    def account(self) -> JointAccount:
        """Whom to ask for the service's figures."""
        return JointAccount([(each.source.cache_name, each.attached.consumer) for each in self.sources])

    @property
    def slots(self) -> SlotPool:
        """The memory of batches that this process makes. It outlives the pass."""
        return self.sources[0].source.slots

    def make(
        self,
        entries: Sequence[Batch],
        finish: Callable[[list[GatheredBatch]], Iterable[Any]],
        memory: Memory,
        *,
        is_keyed: bool = False,
    ) -> Iterator[Any]:
        """What `finish` makes of the samples of each of some entries, one after the other; without those that cannot be
        read where these are skipped. They are gathered into `memory`, with a key for each if `is_keyed`.

        All are gathered at once, which costs little more than to gather one of them. Where that fails, they are
        gathered one by one, so that an error is raised for its own entry, after what is made of those before.
        """
        made_count = 0
        together = self._gather_together(entries, memory, is_keyed) if len(entries) > 1 else []
        if together:
            try:
                for made in finish(together):
                    made_count += 1
                    yield made
            except SAMPLE_ERRORS:
                if self.skips is None:
                    raise
        for entry in entries[made_count:]:
            parts, part_of = entry.parts, self._part_of(entry)
            try:
                (made,) = finish([self._gather(parts, part_of, memory, is_keyed)])
            except SAMPLE_ERRORS:
                if self.skips is None:
                    raise
                (made,) = finish([self._gather(*self._readable(parts, part_of), memory, is_keyed)])
            yield made

    @contextmanager
    def interrupted(self) -> Iterator[None]:
        """While it is entered, waits for bytes or counts end."""
        with ExitStack() as entered:
            for each in self.sources:
                entered.enter_context(each.attached.consumer.interrupted())
            yield

    def end(self) -> None:
        """It is over, finished or not: what it holds is released, and its consumers may serve others."""
        with ExitStack() as ending:
            for each in self.sources:
                ending.callback(each.end)

    def _part_of(self, entry: Batch) -> PartOf | None:
        return None if self.builder.mixing is None else entry.part_of

    def _gather_together(self, entries: Sequence[Batch], memory: Memory, is_keyed: bool) -> list[GatheredBatch]:
        """The samples of each entry; none where any cannot be gathered."""
        of_origins: dict[tuple[int, int], list[BatchEntry]] = {}
        for entry in entries:
            for part in entry.parts:
                of_origins.setdefault((part.source, part.epoch), []).append(part)
        try:
            memory.begin()
            gathered = {
                origin: self.sources[origin[0]]
                .gatherer.gather(joined_entry(parts), memory, is_keyed=is_keyed)
                .split([len(part) for part in parts])
                for origin, parts in of_origins.items()
            }
        except Exception:  # it is found, and raised again, where the entries are gathered one by one
            return []
        return [
            GatheredBatch(
                [next(gathered[part.source, part.epoch]) for part in entry.parts],
                [part.source for part in entry.parts],
                self._part_of(entry),
            )
            for entry in entries
        ]

    def _gather(
        self, parts: Sequence[BatchEntry], part_of: PartOf | None, memory: Memory, is_keyed: bool
    ) -> GatheredBatch:
        account = activity.current()
        if account.cause != "collate":  # what was done with the batch before
            account.switch("collate")
        memory.begin()
        gathered = [self.sources[part.source].gatherer.gather(part, memory, is_keyed=is_keyed) for part in parts]
        return GatheredBatch(gathered, [part.source for part in parts], part_of)

    def _readable(
        self, parts: Sequence[BatchEntry], part_of: PartOf | None
    ) -> tuple[Sequence[BatchEntry], PartOf | None]:
        """The same without the samples that cannot be read and may be skipped."""
        readable = [self.sources[part.source].gatherer.readable(part, self.memory) for part in parts]
        kept = [part_of_entry(part, numbers) for part, numbers in zip(parts, readable, strict=True)]
        if part_of is None:
            return kept, None
        is_kept = np.zeros(len(part_of), np.bool_)
        for rows, numbers in zip(rows_of_parts(part_of, len(parts)), readable, strict=True):
            is_kept[rows[numbers]] = True
        return kept, part_of[is_kept]


def open_source(
    source: Source, job: Job, options: PassOptions, skips: Skips | None, next_epoch: int | None = None
) -> SourcePass:
    """Open a consumer for a pass over one source. Its `end` must follow. Raises `ConfigError`.

    `next_epoch`: whose first windows may be fetched once the pass has been read to its end.
    """
    attached = source.open()
    try:
        return _opened(attached, source, job, options, skips, next_epoch)
    except BaseException:
        source.give_back(attached)
        raise


def _opened(
    attached: AttachedConsumer,
    source: Source,
    job: Job,
    options: PassOptions,
    skips: Skips | None,
    next_epoch: int | None,
) -> SourcePass:
    manifest = source.manifest
    assert manifest is not None, "a consumer is open"
    is_scattered = job.order.shuffle == "global"
    if is_scattered:
        _check_scattered(source, job, options.cache)
    consumer = attached.consumer
    policy = options.policy(is_global=is_scattered)
    consumer.keep(job.own_objects(source), policy)
    reader = (ScatteredReader if is_scattered else WindowReader)(consumer, source.shards, source.first_chunk)
    builder = SourceBuilder(options.columns, options.functions)
    gatherer = SampleGatherer(
        manifest,
        builder,
        reader.live,
        Gatherer(consumer, int(source.first_chunk[-1]), consumer.chunk_bytes),
        job.order.seed,
        skips,
        source.shards.pieces,
    )
    if isinstance(reader, ScatteredReader):
        reader.chunks_of = gatherer.chunks_of
        reader.foresees = policy == "future"
    feed = FeedSource(reader, job.counts(source, attached))
    if next_epoch is not None and not source.grows:  # else the next epoch may have another list of shards
        expected_next = partial(first_objects, manifest, job.order, next_epoch, job.ranks, _NEXT_EPOCH_BYTES)
        feed = replace(feed, expected_next=expected_next)
    return SourcePass(source, attached, feed, gatherer)


def _check_scattered(source: Source, job: Job, cache: Handle) -> None:
    manifest = source.manifest
    assert manifest is not None
    own = objects_in_use_order(manifest, job.order, 0, ranks=job.ranks)
    data_bytes = int(manifest.sizes[own].sum())
    limits = cache.limits.ram_bytes, cache.limits.disk_bytes, cache.limits.chunk_bytes
    if not holds(data_bytes, *limits[:2]):
        counts = source.sample_counts()
        check_allowed(data_bytes, *limits, None if counts is None else counts[own])
