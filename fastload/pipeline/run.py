"""One pass over the data: entries become batches in threads, and come out in order.

A feeder thread walks the plan, and the decode pool makes a batch of each entry. At most `depth` batches are ahead of
the consumer: queued, in the making, or made and waiting. Batches come out in plan order, whichever thread was faster. A
failure comes out where its batch would have been, with the traceback of the thread in which it happened. Without
threads the same is done in the consumer's own.

A run ends by being exhausted (StopIteration), by a failure, or by `close()`, which any thread may call: whoever waits
for a batch then gets `RunClosedError`, so that an epoch that was cut off never looks finished. In each case its feeder
has ended, and no job of it is in the pool.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from fastload.cpu_priority import let_breathe, take_long_turns
from fastload.errors import ServiceError
from fastload.pipeline.pool import DecodePool
from fastload.waiting import Waits, wait


class Entry(Protocol):
    """What a run needs to know of a planned batch."""

    @property
    def number(self) -> int:
        """Which of the rank's batches it is."""
        ...

    @property
    def repeats(self) -> int:
        """How many of its samples are repeats."""
        ...

    def __len__(self) -> int: ...


class RunFeed(Protocol):
    """Where a run has its entries from."""

    def entries(self) -> Iterator[Any]:
        """Every entry in order; each is held until `done` is called with it."""
        ...

    def done(self, entry: Any) -> None:
        """The entry's batch is made, or given up."""
        ...


Made = tuple[Any, Any]  # entry, batch

# A batch may take as long as its bytes do. What it waits for has deadlines of its own, and ends with an error.
_NO_DEADLINE_S = math.inf


class RunClosedError(ServiceError):
    """A batch was asked for after `close()`."""

    def __init__(self, message: str = "the loader was closed in mid-epoch; iterate it again to begin another") -> None:
        super().__init__(message)


@dataclass(slots=True)
class _Place:
    """The place of one batch in the line of those that are ahead of the consumer."""

    entry: Entry
    batch: Any = None
    error: BaseException | None = None
    is_done: bool = False


class ThreadedRun:
    """An iterator over (entry, batch), made by a feeder thread and a decode pool."""

    def __init__(self, feed: RunFeed, make: Callable[[Any], Any], pool: DecodePool, depth: int, waits: Waits) -> None:
        self._feed, self._make, self._pool, self._depth, self._waits = feed, make, pool, depth, waits
        lock = threading.RLock()
        self._changed = threading.Condition(lock)  # something that whoever takes batches may wait for
        self._has_room = threading.Condition(lock)  # what the feeder waits for
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
            wait(
                self._changed,
                self._can_answer,
                "batch",
                what="the next batch",
                waits=self._waits,
                deadline_s=_NO_DEADLINE_S,
            )
            if self._is_closed:
                raise RunClosedError
            place = self._line.popleft() if self._line else None
            self._has_room.notify()
        if place is None:
            raise self._feed_error or StopIteration
        if place.error is not None:
            raise place.error
        return place.entry, place.batch

    def close(self) -> None:
        """Give up what is ahead, and wait for what is in the making. May be called twice."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            self._has_room.notify()
            wait(self._changed, lambda: self._jobs == 0, "shutdown", what="batches in the making")
            self._line.clear()
        if self._feeder is not threading.current_thread():
            self._feeder.join()
            self._feed_error = None  # its traceback holds this run, and so all that the run uses

    def _can_answer(self) -> bool:
        return self._is_closed or (self._line[0].is_done if self._line else self._is_fed)

    def _feed_line(self) -> None:
        try:
            take_long_turns()
            let_breathe(True)
            with contextlib.closing(self._feed.entries()) as entries:  # type: ignore[type-var]
                for entry in entries:
                    if not self._enqueue(entry):
                        break
        except BaseException as error:  # handed to the consumer, whatever it is
            self._feed_error = _not_an_end(error)
        finally:
            with self._changed:
                self._is_fed = True
                self._changed.notify_all()

    def _enqueue(self, entry: Entry) -> bool:
        """Wait for room in the line, then give the entry to the pool; False when the run was closed."""
        place = _Place(entry)
        with self._changed:
            # No deadline but the consumer's: a trainer may take as long as it likes for a step.
            self._has_room.wait_for(lambda: self._is_closed or len(self._line) < self._depth)
            if self._is_closed:
                return False
            let_breathe(bool(self._line))  # else the pool may have nothing to do
            self._line.append(place)
            self._jobs += 1
        try:
            self._pool.submit(lambda: self._run_job(place))
        except ServiceError as error:  # the pool was closed under us: no job will run
            self._end_job(place, error)
        return True

    def _run_job(self, place: _Place) -> None:
        try:
            if not self._is_closed:
                place.batch = self._make(place.entry)
        except BaseException as error:  # handed to the consumer, whatever it is
            place.error = _not_an_end(error)
        try:
            self._feed.done(place.entry)
        except BaseException as error:
            place.error = place.error or error
        self._end_job(place, place.error)

    def _end_job(self, place: _Place, error: BaseException | None) -> None:
        with self._changed:
            place.error, place.is_done = error, True
            self._jobs -= 1
            self._changed.notify_all()


class InlineRun:
    """The same iterator without threads: each batch is made when it is asked for."""

    def __init__(self, feed: RunFeed, make: Callable[[Any], Any], waits: Waits) -> None:
        self._feed, self._make, self._waits = feed, make, waits
        self._entries = feed.entries()
        self._is_closed = False

    def __iter__(self) -> Iterator[Made]:
        return self

    def __next__(self) -> Made:
        # The consumer waits for all of it, as it does for a batch that threads make.
        with self._waits.measure("batch"):
            try:
                return self._next()
            except StopIteration:
                raise
            except BaseException as error:
                if self._is_closed:  # under the batch in the making: whatever went wrong then is no news
                    raise RunClosedError from error
                raise

    def _next(self) -> Made:
        if self._is_closed:
            raise RunClosedError
        entry = next(self._entries)
        try:
            batch = self._make(entry)
        except StopIteration as error:
            raise _not_an_end(error) from error
        finally:
            self._feed.done(entry)
        return entry, batch

    def close(self) -> None:
        """Give up what is ahead; a batch in the making is left to whoever makes it. May be called twice."""
        self._is_closed = True


def _not_an_end(error: BaseException) -> BaseException:
    """`error`; or, for a StopIteration out of a user's function, what does not look like the end of the epoch."""
    if isinstance(error, StopIteration):
        wrapped = RuntimeError("a function that makes batches raised StopIteration")
        wrapped.__cause__ = error
        return wrapped
    return error
