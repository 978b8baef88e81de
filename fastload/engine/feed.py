"""From the plan to plan entries: walks the windows of an epoch, indexes them, and keeps the service informed.

The feed is what ties a pass over the data to its consumer: it sends the plan, asks for the chunks of the window that it
opens, and gives them back when the last batch from that window is made. It runs ahead of the batches by as many
entries as its user lets it, in his thread or in one of its own; nothing here starts a thread.
"""

from __future__ import annotations

from collections.abc import Iterator

from fastload.engine.shards import ShardTable
from fastload.engine.windows import Ints, LiveWindows, Window, window_chunks
from fastload.errors import ServiceError
from fastload.plan import BatchEntry, RankCursor
from fastload.service.client import Consumer


class Feed:
    """The entries of one rank (or worker) for one epoch, from where its cursor starts."""

    def __init__(
        self,
        consumer: Consumer,
        cursor: RankCursor,
        shards: ShardTable,
        first_chunk: Ints,
    ) -> None:
        self._consumer = consumer
        self._cursor = cursor
        self._shards = shards
        self._first_chunk = first_chunk
        self.live = LiveWindows(len(first_chunk) - 1)
        self._opening: Ints | None = None  # the chunks of a window that is wanted and not open yet
        self._is_exhausted = False
        self._plan_end: dict[int, int] = {}  # per open window: the position in the plan after its last chunk

    def entries(self) -> Iterator[BatchEntry]:
        """Every entry in order; each is held until `done` is called with it."""
        order = self._cursor.order
        first_window = self._cursor.windows.start
        plan = order.object_order[order.window_start[min(first_window, order.window_count)] :]
        self._consumer.set_plan(plan, order.epoch)
        position = 0
        for number in self._cursor.windows:
            window = self._window(number)
            position += len(window.chunk_nos)
            self._plan_end[number] = position
            yield from self._held(self._cursor.add_window(number, window.counts))
            self._give_back(self.live.retire_before(self._cursor.oldest_window))
        yield from self._held(self._cursor.finish())
        self._give_back(self.live.retire_before(order.window_count))
        self._is_exhausted = True

    def done(self, entry: BatchEntry) -> None:
        """The entry's batch is made, or given up."""
        self._give_back(self.live.done(entry.window_first))

    def close(self) -> None:
        """Give back whatever is still held, and end the plan if it was not read to its end."""
        try:
            self._let_go()
        except ServiceError:
            if not self._consumer.is_ended:
                raise
            # It was closed meanwhile, and with it all that it held.

    def _let_go(self) -> None:
        self._give_back(self.live.close_all())
        if self._opening is not None:
            self._consumer.release(self._opening)
            self._opening = None
        if not self._is_exhausted:
            self._consumer.set_plan([], self._cursor.order.epoch)

    def _window(self, number: int) -> Window:
        object_nos = self._cursor.window_objects(number).astype("int64")
        self._opening = chunk_nos = window_chunks(self._first_chunk, object_nos)
        self._consumer.want(chunk_nos)
        indexes = self._shards.get(self._consumer, object_nos.tolist())
        window = Window(number, object_nos, indexes, self._first_chunk[object_nos], chunk_nos)
        self.live.open(window)
        self._opening = None
        return window

    def _held(self, entries: list[BatchEntry]) -> Iterator[BatchEntry]:
        # All are held before the first is out, so that none of their windows closes while later ones wait here.
        for entry in entries:
            self.live.hold(entry.window_first)
        yield from entries

    def _give_back(self, closed: list[Window]) -> None:
        for window in closed:
            self._consumer.release(window.chunk_nos)
            self._consumer.advance(self._plan_end.pop(window.number))
