"""From entries to the user: batches are made in threads, and delivered in plan order.

A feeder thread walks the plan, and the threads of a decode pool make a batch of each entry. At most `depth` tasks are
ahead of the consumer: queued, being built, or ready. A task makes one batch, or some of them together where each takes
a fraction of a millisecond, since what a task costs does not depend on what it makes. A failure comes out where its
batch would have been, with the traceback of the thread in which it happened. `InlineRun` does the same without threads.

A run ends when it is exhausted (StopIteration), by a failure, or by `close()`, which any thread may call: a consumer
that waits for a batch then gets `RunClosedError`, so that an epoch that was cut off never looks finished. In each case
its feeder has ended, and none of its tasks is in the pool.

The pool lives as long as its loader, since its threads keep thread-local workspaces (decoders, staging memory). Its
tasks are plain callables that handle their own errors. It is closed by its owner, at the latest when the interpreter
exits. A pool that was dropped without that is signalled when it is collected, which may happen in any thread and under
any lock, so nothing is waited for then. Its threads hold no reference to it.

An `Iteration` is what the user holds. It ends its run when it is exhausted, when it fails, when it is closed, when the
interpreter exits, and, most often, when it is dropped (`break` out of a for loop). The last is done soon in another
thread (see `lifecycle`); the other ends are complete when the call that causes them returns.
"""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from fastload import callers
from fastload.cpu_priority import let_breathe, take_long_slices
from fastload.errors import ServiceError
from fastload.kernels.yielding import start_yielding
from fastload.lifecycle import Ending, end_at_exit, join_at_exit
from fastload.timing import activity
from fastload.timing.stalls import Stalls
from fastload.waiting import Waits, wait


class PlanEntry(Protocol):
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

    @property
    def has_next(self) -> bool:
        """Whether the next entry comes without a wait."""
        ...

    def done(self, entry: Any) -> None:
        """The entry's batch is built, or given up."""
        ...


EntryAndBatch = tuple[Any, Any]
# Makes the batch of each of some entries, one after the other. What fails ends it, in place of the batch.
Make = Callable[[Sequence[Any]], Iterable[Any]]
# A batch may take as long as its bytes do. What it waits for has deadlines of its own, and ends with an error.
_NO_DEADLINE_S = math.inf
# Batches that one task makes: twice as many where it took less than half of `TASK_S`, half as many where it took more
# than twice as long. Each task costs some 100 us of Python, whatever it makes.
TASK_S = 2e-3
_BATCHES_A_TASK_MAX = 64


class RunClosedError(ServiceError):
    """A batch was asked for after `close()`."""

    def __init__(self, message: str = "the loader was closed in mid-epoch; iterate it again to begin another") -> None:
        super().__init__(message)


@dataclass(slots=True, eq=False)
class _Task:
    """Entries whose batches are made together, and in the end each one's batch or error."""

    entries: list[PlanEntry]
    results: deque[tuple[PlanEntry, Any, BaseException | None]] = field(default_factory=deque)
    is_done: bool = False


class ThreadedRun:
    """An iterator over (entry, batch), made by a feeder thread and a decode pool.

    `depth` tasks are ahead of the consumer. A task makes one batch, or several while these take less than
    about `task_s`, provided that their entries are there.
    """

    def __init__(
        self,
        feed: RunFeed,
        make: Make,
        pool: DecodePool,
        depth: int,
        waits: Waits,
        *,
        task_s: float = TASK_S,
        now: Callable[[], float] = time.perf_counter,
        stalls: Stalls | None = None,
    ) -> None:
        self._stalls = Stalls() if stalls is None else stalls
        self._feed, self._make, self._pool, self._depth, self._waits = feed, make, pool, depth, waits
        self._task_s, self._now = task_s, now
        self._size = 1  # batches of the next task
        lock = threading.RLock()
        self._changed = threading.Condition(lock)  # what a consumer waits for
        self._has_room = threading.Condition(lock)  # what the feeder waits for
        self._queue: deque[_Task] = deque()
        self._ready: deque[tuple[PlanEntry, Any, BaseException | None]] = deque()  # of the task that is being consumed
        self._tasks = 0
        self._is_fed = False
        self._is_closed = False
        self._feed_error: BaseException | None = None
        self._feeder = threading.Thread(target=self._fill_queue, name="fastload-feed", daemon=True)
        self._feeder.start()

    def __iter__(self) -> Iterator[EntryAndBatch]:
        return self

    def __next__(self) -> EntryAndBatch:
        while True:
            if self._is_closed:
                raise RunClosedError
            try:
                entry, batch, error = self._ready.popleft()
            except IndexError:
                self._await_task()
                continue
            if error is not None:
                raise error
            return entry, batch

    def close(self) -> None:
        """Give up what is ahead, and wait for batches that are being built. May be called twice."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            self._has_room.notify()
            wait(self._changed, lambda: self._tasks == 0, "shutdown", what="batches that are being built")
            self._queue.clear()
            self._ready.clear()
        if self._feeder is not threading.current_thread():
            self._feeder.join()
            self._feed_error = None  # its traceback holds this run, and so all that the run uses

    def _await_task(self) -> None:
        """Wait for the next task's batches. Raises what ended the feed."""
        with self._changed:
            if not self._can_answer():
                self._wait()
            if self._is_closed or self._ready:
                return
            if not self._queue:
                raise self._feed_error or StopIteration
            self._ready = self._queue.popleft().results
            self._has_room.notify()

    def _wait(self) -> None:
        is_counted = self._stalls.begin(has_task=bool(self._queue))
        try:
            wait(
                self._changed,
                self._can_answer,
                "batch",
                what="the next batch",
                waits=self._waits,
                deadline_s=_NO_DEADLINE_S,
            )
        finally:
            if is_counted:
                self._stalls.end()

    def _can_answer(self) -> bool:
        return self._is_closed or bool(self._ready) or (self._queue[0].is_done if self._queue else self._is_fed)

    def _fill_queue(self) -> None:
        entries: list[PlanEntry] = []
        try:
            take_long_slices()
            let_breathe(True)
            with (
                activity.entered(self._stalls.feeder, "index"),
                contextlib.closing(self._feed.entries()) as fed,  # type: ignore[type-var]
            ):
                for entry in fed:
                    entries.append(entry)
                    if len(entries) < self._size and self._feed.has_next:
                        continue
                    task, entries = _Task(entries), []
                    if not self._enqueue(task):
                        break
        except BaseException as error:  # handed to the consumer, whatever it is
            self._feed_error = error
        finally:
            if entries:
                self._enqueue(_Task(entries))
            with self._changed:
                self._is_fed = True
                self._changed.notify_all()

    def _enqueue(self, task: _Task) -> bool:
        """Wait for room in the queue, then give the task to the pool; False when the run was closed."""
        with self._changed:
            # No deadline but the consumer's: a trainer may take as long as it likes for a step.
            doing = self._stalls.feeder.switch(None)
            self._has_room.wait_for(lambda: self._is_closed or len(self._queue) < self._depth)
            self._stalls.feeder.switch(doing)
            if self._is_closed:
                return False
            let_breathe(bool(self._queue))  # else the pool may have nothing to do
            self._queue.append(task)
            self._stalls.tasked()
            self._tasks += 1
        self._submit(task)
        return True

    def _submit(self, task: _Task) -> None:
        try:
            self._pool.submit(lambda: self._run_task(task))
        except ServiceError as error:  # the pool was closed under us: no task will run
            task.results.extend((entry, None, error) for entry in task.entries)
            self._end_task(task)

    def _run_task(self, task: _Task) -> None:
        account = self._stalls.account()
        outer = activity.enter(account, "collate")
        try:
            self._make_task(task)
        finally:
            activity.leave(account, outer)
        self._end_task(task)

    def _make_task(self, task: _Task) -> None:
        began, entries, results = self._now(), task.entries, task.results
        try:
            if not self._is_closed:
                for entry, batch in zip(entries, self._make(entries), strict=True):
                    results.append((entry, batch, None))
                    if self._is_closed:  # what is left of them may take long
                        break
        except BaseException as failure:  # handed to the consumer, whatever it is
            if len(results) == len(entries):  # what failed came after the last batch
                results.pop()
            results.append((entries[len(results)], None, failure))
            self._adapt(len(results), self._now() - began)
            self._split(task)
        else:
            self._adapt(len(entries), self._now() - began)
        for number, entry in enumerate(task.entries):
            try:
                self._feed.done(entry)
            except BaseException as failure:
                if number < len(results) and results[number][2] is None:
                    results[number] = entry, None, failure

    def _split(self, task: _Task) -> None:
        """Make what is left of a task another one behind it, so that its failure does not wait for the rest, each of
        which may fail as slowly.
        """
        made = len(task.results)
        rest, task.entries = _Task(task.entries[made:]), task.entries[:made]
        if not rest.entries:
            return
        with self._changed:
            self._queue.insert(self._queue.index(task) + 1, rest)
            self._tasks += 1
        self._submit(rest)

    def _adapt(self, made: int, took_s: float) -> None:
        """Choose how many batches the next tasks make, after one that made so many."""
        if took_s > 2 * self._task_s:
            self._size = max(1, made // 2)
        elif took_s < self._task_s / 2 and made == self._size:
            self._size = min(_BATCHES_A_TASK_MAX, 2 * made)

    def _end_task(self, task: _Task) -> None:
        with self._changed:
            task.is_done = True
            self._tasks -= 1
            self._changed.notify_all()


class InlineRun:
    """The same iterator without threads: each batch is made when it is asked for."""

    def __init__(self, feed: RunFeed, make: Make, waits: Waits, stalls: Stalls | None = None) -> None:
        self._feed, self._make, self._waits = feed, make, waits
        self._stalls = Stalls() if stalls is None else stalls
        self._entries = feed.entries()
        self._is_closed = False

    def __iter__(self) -> Iterator[EntryAndBatch]:
        return self

    def __next__(self) -> EntryAndBatch:
        # The consumer waits for all of it, as it does for a batch that threads make.
        try:
            return self._stalls.next(self._next)
        except StopIteration:
            raise
        except BaseException as error:
            if self._is_closed:  # while the batch was built: its error is a consequence
                raise RunClosedError from error
            raise
        finally:
            self._waits.add("batch", self._stalls.made_s)

    def _next(self) -> EntryAndBatch:
        if self._is_closed:
            raise RunClosedError
        entry = next(self._entries)
        self._stalls.trainer.switch("collate")
        try:
            (batch,) = self._make([entry])
        finally:
            self._feed.done(entry)
        return entry, batch

    def close(self) -> None:
        """Give up what is ahead; a batch that is being built is finished by its own thread. May be called twice."""
        self._is_closed = True


Task = Callable[[], None]
# How long the exit of a script waits for the threads.
_END_S = 10.0


class DecodePool:
    """`thread_count` threads that run tasks in the order in which they were submitted."""

    def __init__(self, thread_count: int, name: str = "fastload-decode") -> None:
        start_yielding()
        self.thread_count = thread_count
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=_work, args=(self._tasks,), name=f"{name}-{number}", daemon=True)
            for number in range(thread_count)
        ]
        for thread in self._threads:
            thread.start()
            join_at_exit(thread, _END_S)
        self._ending = Ending(self, _stop, self._tasks, thread_count, waits=False, at_exit=True)

    def submit(self, task: Task) -> None:
        """Run `task` in one of the threads. It must not raise, and must not wait for another task.

        ServiceError after `close()`.
        """
        if not self._ending.is_due:
            raise ServiceError("the loader's threads have ended, since it was closed; iterate it again")
        self._tasks.put(task)

    @property
    def is_inherited(self) -> bool:
        """Whether its threads stayed behind in a process that this one was forked from."""
        return self._ending.is_inherited

    def close(self) -> None:
        """End the threads after the tasks that were submitted, and wait for them. May be called twice."""
        self._ending()
        if not self.is_inherited:
            for thread in self._threads:
                if thread is not threading.current_thread():
                    thread.join()


def _work(tasks: queue.SimpleQueue[Task | None]) -> None:
    take_long_slices()
    while (task := tasks.get()) is not None:
        task()
        del task  # else the last batch would live until the next one comes


def _stop(tasks: queue.SimpleQueue[Task | None], thread_count: int) -> None:
    for _ in range(thread_count):
        tasks.put(None)


Run = ThreadedRun | InlineRun
# What is made of an entry that has nothing for the user.
NOTHING: Any = object()


class Iteration(Iterator[Any]):
    """Yields what `run` makes, after `deliver`, if it is given, has had it. `delivered(entry)` is called for each,
    `exhausted()` at the end of the epoch.

    While `interrupted()` is entered, waits for bytes in the run end, so that it ends at once. `release()`
    is called once, when the run has ended in whatever way; it may be called in another thread.
    """

    def __init__(
        self,
        run: Run,
        interrupted: Callable[[], AbstractContextManager[None]],
        release: Callable[[], None],
        delivered: Callable[[Any], None] = lambda entry: None,
        exhausted: Callable[[], None] = lambda: None,
        deliver: Callable[[Any], Any] = lambda made: made,
    ) -> None:
        self._run, self._delivered, self._exhausted, self._deliver = run, delivered, exhausted, deliver
        self._is_over = False
        self._ending = Ending(self, _end, run, interrupted, release, waits=True, at_exit=True)

    def __next__(self) -> Any:
        if self._is_over:
            raise StopIteration
        if self._ending.is_inherited:  # the threads that make its batches are not here, and its socket is the parent's
            raise ServiceError(
                f"this iteration was begun by process {self._ending.pid}, from which this one was forked; iterate anew"
            )
        made = NOTHING
        try:
            while made is NOTHING:
                made = self._next()
        except Exception as error:
            if callers.is_for_the_user(error):
                raise callers.shortened(error)  # noqa: B904  # it is the same error
            raise
        return made

    def _next(self) -> Any:
        try:
            entry, made = next(self._run)
            if made is not NOTHING:
                made = self._deliver(made)
        except RunClosedError:
            raise
        except BaseException as error:
            self._is_over = True
            if isinstance(error, StopIteration):
                self._exhausted()
            self.close()
            raise
        self._delivered(entry)
        return made

    def close(self) -> None:
        """End it, and wait for that. May be called twice, and by any thread."""
        self._ending()


def _end(run: Run, interrupted: Callable[[], AbstractContextManager[None]], release: Callable[[], None]) -> None:
    """End a run and release what it used."""
    try:
        with interrupted():
            run.close()
    finally:
        release()


end_at_exit()
