"""One pass over the data: entries become batches in threads, and come out in order.

A feeder thread walks the plan, and the decode pool makes a batch of each entry. At most `depth` batches are ahead of
the consumer: queued, in the making, or made and waiting. Batches come out in plan order, whichever thread was faster. A
failure comes out where its batch would have been, with the traceback of the thread in which it happened. Without
threads the same is done in the consumer's own.

A run ends by being exhausted, by a failure, or by `close()`; in each case its feeder has ended, no job of it is in the
pool, and its windows are given back.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from fastload.engine.feed import Feed
from fastload.engine.pool import DecodePool
from fastload.plan import BatchEntry
from fastload.waiting import Waits, wait

Made = tuple[BatchEntry, Any]


@dataclass(slots=True)
class _Place:
    """The place of one batch in the line of those that are ahead of the consumer."""

    entry: BatchEntry
    batch: Any = None
    error: BaseException | None = None
    is_done: bool = False


class ThreadedRun:
    """An iterator over (entry, batch), made by a feeder thread and a decode pool."""

    def __init__(
        self, feed: Feed, make: Callable[[BatchEntry], Any], pool: DecodePool, depth: int, waits: Waits
    ) -> None:
        self._feed, self._make, self._pool, self._depth, self._waits = feed, make, pool, depth, waits
        self._changed = threading.Condition()
        self._line: deque[_Place] = deque()
        self._jobs = 0
        self._is_fed = False
        self._is_closed = False
        self._feed_error: BaseException | None = None
        self._feeder = threading.Thread(target=self._feed_line, name="fastload-feed", daemon=True)
        self._feeder.start()

    def __iter__(self) -> Iterator[Made]:
        return self

    def __next__(self) -> Made:
        with self._changed:
            wait(self._changed, self._can_answer, "batch", what="the next batch", waits=self._waits)
            if not self._line:
                self._end()
            place = self._line.popleft()
            self._changed.notify_all()
        if place.error is not None:
            self.close()
            raise place.error
        return place.entry, place.batch

    def close(self) -> None:
        """Give up what is ahead, and wait for what is in the making. May be called twice."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            wait(self._changed, lambda: self._jobs == 0, "shutdown", what="batches in the making")
            for place in self._line:
                self._feed.done(place.entry) if not place.is_done else None
            self._line.clear()
        if self._feeder is not threading.current_thread():
            self._feeder.join()

    def _can_answer(self) -> bool:
        return self._line[0].is_done if self._line else self._is_fed or self._is_closed

    def _end(self) -> None:
        """Nothing is ahead: either the epoch is over or the feeder failed."""
        self._feeder.join()
        if self._feed_error is not None and not self._is_closed:
            self._is_closed = True
            raise self._feed_error
        raise StopIteration

    def _feed_line(self) -> None:
        try:
            with contextlib.closing(self._feed.entries()) as entries:  # type: ignore[type-var]
                for entry in entries:
                    if not self._enqueue(entry):
                        break
        except BaseException as error:  # handed to the consumer, whatever it is
            self._feed_error = error
        finally:
            with self._changed:
                self._is_fed = True
                self._changed.notify_all()

    def _enqueue(self, entry: BatchEntry) -> bool:
        """Wait for room in the line, then give the entry to the pool; False when the run was closed."""
        place = _Place(entry)
        with self._changed:
            # No deadline but the consumer's: a trainer may take as long as it likes for a step.
            self._changed.wait_for(lambda: self._is_closed or len(self._line) < self._depth)
            if self._is_closed:
                return False
            self._line.append(place)
            self._jobs += 1
        self._pool.submit(lambda: self._run_job(place))
        return True

    def _run_job(self, place: _Place) -> None:
        try:
            if not self._is_closed:
                place.batch = self._make(place.entry)
        except BaseException as error:  # handed to the consumer, whatever it is
            place.error = error
        try:
            self._feed.done(place.entry)
        except BaseException as error:
            place.error = place.error or error
        with self._changed:
            place.is_done = True
            self._jobs -= 1
            self._changed.notify_all()


class InlineRun:
    """The same iterator without threads: each batch is made when it is asked for."""

    def __init__(self, feed: Feed, make: Callable[[BatchEntry], Any]) -> None:
        self._feed, self._make = feed, make
        self._entries = feed.entries()

    def __iter__(self) -> Iterator[Made]:
        return self

    def __next__(self) -> Made:
        entry = next(self._entries)
        try:
            batch = self._make(entry)
        finally:
            self._feed.done(entry)
        return entry, batch

    def close(self) -> None:
        """Give up what is ahead. May be called twice."""
        self._entries.close()  # type: ignore[attr-defined]
