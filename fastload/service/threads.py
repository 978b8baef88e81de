"""Threads that do what blocks, for a loop thread that must not.

A pool runs functions and hands what came of them back to the loop, where all state lives. Its threads are made when
there is work for them; where the machine allows no more, those that it has do all of it. They are daemons: a read that
hangs in a dead disk must not keep the process alive. (`concurrent.futures` joins its threads at exit, and makes a
future for each call, which nothing here would look at.) `Pools` is all of them, which end together: first none starts
anything more, then all are waited for at once.

`Populator` pre-faults the arena's memory in a thread of the lowest priority. A page costs the thread that touches it
first, and once touched it is taken from the machine. So pages are touched where they will be needed: not beyond what
the data takes that live plans and keep lists name, and beyond the highest buffer ever used only as much as was
used so far, between a quarter of a GiB and two. So fetching that goes on finds its memory ready, also where it is fast,
and a reader that stops after some samples costs little. The buffers are used from the lowest up (see `buffers`), so one
number says how far use has come.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastload.cache import Arena
from fastload.config import GIB, MIB
from fastload.errors import ServiceError

Done = Callable[[Any, BaseException | None], None]
Hung = Callable[[], Done]


@dataclass(slots=True, eq=False)
class Task:
    """One call. `hung`, for who watches the time (see `disk_io`): give up on it; returns what `done` shall be then."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    done: Done
    hung: Hung | None
    began: float = 0.0  # when a thread took it; 0 before


class Pool:
    """At most `count` threads. All methods are called by the loop's thread. Made by `Pools`."""

    def __init__(self, name: str, count: int, loop: asyncio.AbstractEventLoop, submitted: Callable[[], None]) -> None:
        self.name, self.count = name, count
        self.finishes = False  # whether `stop` lets what was submitted be done
        self.under_way: set[Task] = set()  # those whose `done` has not been called
        self._loop = loop
        self._submitted = submitted
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._closed = False

    @property
    def idle(self) -> int:
        """How many more tasks would start at once."""
        return max(0, self.count - len(self.under_way))

    def submit(self, function: Callable[..., Any], *arguments: Any, done: Done, hung: Hung | None = None) -> None:
        """Run `function(*arguments)` in a thread, then `done(result, error)` in the loop."""
        if self._closed:
            return
        task = Task(function, arguments, done, hung)
        self.under_way.add(task)
        if len(self.under_way) > len(self._threads) and len(self._threads) < self.count:
            try:
                self._start_thread()
            except RuntimeError as error:  # the machine or a container allows no more
                if not self._threads:
                    self._loop.call_soon(self._finish, task, None, _no_thread(self.name, error))
                    return
        self._tasks.put(task)
        self._submitted()

    def _start_thread(self) -> None:
        name = f"fastload-{self.name}-{len(self._threads)}"
        thread = threading.Thread(target=self._run, name=name, daemon=True)
        thread.start()
        self._threads.append(thread)

    def stop(self) -> None:
        """Accept no more tasks. What had not begun is dropped, unless the pool `finishes`; `done` is called no more."""
        self._closed = True
        while not self.finishes and not self._tasks.empty():
            try:
                self._tasks.get_nowait()
            except queue.Empty:  # a thread was quicker
                break
        for _ in self._threads:
            self._tasks.put(None)

    def join(self, deadline: float) -> bool:
        """After `stop`: wait until `deadline` (of the monotonic clock) at most. Whether all threads have ended."""
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            task.began = time.monotonic()
            result, error = None, None
            try:
                result = task.function(*task.arguments)
            except Exception as caught:  # handed on whole; the loop's side decides what it means
                error = caught
            try:
                self._loop.call_soon_threadsafe(self._finish, task, result, error)
            except RuntimeError:  # the loop was closed while the task ran
                return
            del task, result, error

    def _finish(self, task: Task, result: Any, error: BaseException | None) -> None:
        self.under_way.discard(task)
        if not self._closed:
            task.done(result, error)


def _no_thread(name: str, error: RuntimeError) -> ServiceError:
    return ServiceError(
        f"the cache service cannot start a thread ({name}): {error}; allow it more of them (ulimit -u, or the "
        "container's pids limit)"
    )


class Pools:
    """All pools of a service."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._pools: list[Pool] = []

    def make(self, name: str, count: int, submitted: Callable[[], None] = lambda: None) -> Pool:
        """A pool of at most `count` threads; `submitted` is called whenever it was given a task."""
        pool = Pool(name, count, self.loop, submitted)
        self._pools.append(pool)
        return pool

    def close(self, deadline_s: float) -> bool:
        """Start nothing more anywhere, and wait so long for what runs; whether all of it has ended."""
        for pool in self._pools:
            pool.stop()
        deadline = time.monotonic() + deadline_s
        ended = [pool.join(deadline) for pool in self._pools]
        return all(ended)


# Of use: what is touched in two seconds, and fetched in about as many where a link is fast.
AHEAD_BYTES_MIN, AHEAD_BYTES_MAX = 256 * MIB, 2 * GIB
# Touched at a time, between two looks at what is needed.
_STEP_BYTES = 4 * MIB


class Populator:
    """Pre-faults the arena's memory; see the module. Owns a thread; all methods are called by the loop's thread."""

    def __init__(self, arena: Arena, ahead_bytes: tuple[int, int] = (AHEAD_BYTES_MIN, AHEAD_BYTES_MAX)) -> None:
        """`ahead_bytes`: the least and the most to be ahead of use."""
        self._arena, self._ahead_bytes = arena, ahead_bytes
        self._used_bytes = self._needed_bytes = self._done = self._renewed_count = 0
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fastload-populate", daemon=True)
        self._thread.start()

    def need(self, used_count: int, needed_count: int) -> None:
        """The first `used_count` buffers have been used, and `needed_count` will be."""
        used, needed = (count * self._arena.chunk_bytes for count in (used_count, needed_count))
        if used > self._used_bytes or needed != self._needed_bytes:
            with self._changed:
                self._used_bytes, self._needed_bytes = max(used, self._used_bytes), needed
                self._changed.notify()

    def renewed(self) -> None:
        """The arena has fresh memory, and nothing is needed of it yet."""
        with self._changed:
            self._used_bytes = self._needed_bytes = self._done = 0
            self._renewed_count += 1

    def close(self) -> None:
        """End the thread, at its next piece."""
        with self._changed:
            self._stop.set()
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        with contextlib.suppress(OSError):  # where threads have no niceness of their own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        while True:
            start, end, renewed_count = self._next()
            done = self._arena.populate(start, end, self._stop)
            if done < end or self._stop.is_set():  # the former: the kernel cannot
                return
            with self._changed:
                if self._renewed_count == renewed_count:  # else it was other memory
                    self._done = done

    def _next(self) -> tuple[int, int, int]:
        """Wait until more should be touched than was; returns from where to where, and how often memory was fresh."""
        with self._changed:
            self._changed.wait_for(lambda: self._stop.is_set() or self._end() > self._start())
            start = self._start()
            return start, min(self._end(), start + _STEP_BYTES), self._renewed_count

    def _start(self) -> int:
        return max(self._done, self._used_bytes)

    def _end(self) -> int:
        least, most = self._ahead_bytes
        ahead = min(most, max(least, self._used_bytes))
        return min(self._used_bytes + ahead, self._needed_bytes, self._arena.byte_count)
