"""Samples by number, in any order: random access to a data set whose sample counts are known.

Sample i is the i-th in the order of the manifest: shards as they are listed, and the samples of a shard as they lie in
it. The shards that a call needs are windows of their own, which stay open for later calls; all chunks of a call are
asked for at once and given back when it is over. What is read is then made into samples or a batch by the same code as
in a pass over the data.

Thread-safe: each call has a consumer of its own, which a later call uses again.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from fastload.pipeline.finish import Finish, GatheredBatch, SourceBuilder
from fastload.pipeline.gather import Gatherer, LocalMemory, SampleGatherer
from fastload.pipeline.source import AttachedConsumer, Source
from fastload.pipeline.windows import Ints, LiveWindows, Window
from fastload.plan import BatchEntry, Manifest

# Rows of shards that stay open for one consumer, about 70 bytes each. Where a data set has more, its shards are opened
# again from their indexes, which takes some microseconds a shard and some nanoseconds a row.
_ROWS_MAX = 1 << 21


@dataclass(slots=True)
class _View:
    """What a consumer needs to find and gather samples. Used by one call at a time."""

    gatherer: SampleGatherer
    live: LiveWindows
    open_rows: int = field(default=0)


class Lookup:
    """Finds samples by number."""

    def __init__(self, source: Source, builder: SourceBuilder, seed: int) -> None:
        self.source = source
        self._builder, self._seed = builder, seed
        self._memory = LocalMemory(source.slots)
        self._lock = threading.Lock()
        self._views: WeakKeyDictionary[AttachedConsumer, _View] = WeakKeyDictionary()
        self._starts_of: tuple[Manifest, Ints] | None = None

    def starts(self) -> Ints | None:
        """int64[shards + 1]: the number of each shard's first sample, and last how many there are; None while the count
        of a shard is not known.
        """
        known = self._starts_of
        manifest = self.source.list_shards()
        if known is not None and known[0] is manifest:
            return known[1]
        counts = self.source.sample_counts(is_needed=True)
        if counts is None:
            return None
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])
        self._starts_of = manifest, starts
        return starts

    def make(self, numbers: npt.NDArray[np.int64], starts: Ints, epoch: int, finish: Finish) -> object:
        """What `finish` makes of these samples, which are numbered from 0; `starts` says where they are."""
        object_no = np.searchsorted(starts, numbers, side="right") - 1
        entry = BatchEntry(0, object_no.astype(np.int32), numbers - starts[object_no], 0, (), 0, epoch=epoch)
        attached = self.source.open()
        try:
            return finish(self._gather(attached, entry), self.source.slots)
        finally:
            self.source.give_back(attached)

    def _gather(self, attached: AttachedConsumer, entry: BatchEntry) -> GatheredBatch:
        view, consumer = self._view(attached), attached.consumer
        self._open(view, attached, np.unique(entry.object_no).astype(np.int64))
        chunks = view.gatherer.chunks_of(entry)
        consumer.want(chunks)
        try:
            self._memory.begin()
            return GatheredBatch([view.gatherer.gather(entry, self._memory)], [0])
        finally:
            if not consumer.is_ended:
                consumer.release(chunks)

    def _view(self, attached: AttachedConsumer) -> _View:
        with self._lock:
            if attached not in self._views:
                self._views[attached] = self._new_view(attached)
            return self._views[attached]

    def _new_view(self, attached: AttachedConsumer) -> _View:
        manifest, first_chunk = attached.manifest, self.source.first_chunk
        assert manifest is not None, "a consumer is attached"
        live = LiveWindows(len(manifest))
        gatherer = Gatherer(attached.consumer, int(first_chunk[-1]), attached.consumer.chunk_bytes)
        pieces = self.source.shards.pieces
        return _View(SampleGatherer(manifest, self._builder, live, gatherer, self._seed, pieces=pieces), live)

    def _open(self, view: _View, attached: AttachedConsumer, numbers: Ints) -> None:
        """Have the windows of these shards open."""
        if view.open_rows > _ROWS_MAX:
            view.live.retire_all_but(())
            view.open_rows = 0
        closed = numbers[[number not in view.live for number in numbers.tolist()]]
        if not len(closed):
            return
        first_chunk = self.source.first_chunk
        indexes = self.source.shards.index(attached.consumer, closed.tolist())
        for index, at in zip(indexes, range(len(closed)), strict=True):
            number = closed[at : at + 1]
            view.live.open(Window(int(number[0]), number, [index], first_chunk[number], np.empty(0, np.int64)))
            view.open_rows += index.sample_count
