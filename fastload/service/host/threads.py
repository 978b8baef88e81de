"""Threads that do what blocks, for a loop thread that must not.

A pool runs functions and hands what came of them back to the loop, where all state lives. Its threads are made when
there is work for them; where the machine allows no more, those that it has do all of it. They are daemons: a read that
hangs in a dead disk must not keep the process alive. (`concurrent.futures` joins its threads at exit, and makes a
future for each call, which nothing here would look at.) `Pools` is all of them, which end together: first none starts
anything more, then all are waited for at once.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
