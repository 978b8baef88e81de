"""One data set's windows in one pass: planned, opened, held by batches, and given back.

The reader is what ties a pass to its consumer. It sends the plan, asks for the chunks of a window that is opened, gives
them back when the last batch from that window is made, and says how much of the plan is behind. Windows of one
partition are opened and closed in the plan's order; those of several overlap, and what is behind is then what lies
before the first window that is not closed.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Hashable, Sequence

import numpy as np
import numpy.typing as npt

from fastload.client.consumer import Consumer
from fastload.errors import ServiceError
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
        self._planning = threading.Lock()  # what follows, and that the consumer hears of it in this order
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
        window = Window(key, numbers, indexes, self._first_chunk[numbers], chunk_nos)
        self.live.open(window)
        self._opening = None
        return window.counts

    def hold(self, entry: BatchEntry, windows: Collection[Hashable]) -> None:
        """The batch of this entry, whose samples lie in these windows, is in the making."""
        self.live.hold(windows)

    def due(self, entry: BatchEntry) -> None:
        """The entry is next: its batch may be made from now on."""

    @property
    def lookahead(self) -> int:
        """How many samples are held before they are due, so that the service knows what comes."""
        return 0

    def done(self, entry: BatchEntry, windows: Collection[Hashable]) -> None:
        """It is made, or given up."""
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
        """Give back whatever is still held, and end the plan if it was not read to its end."""
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
