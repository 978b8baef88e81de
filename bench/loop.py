"""An event loop of one thread over epoll, for a proxy that must cost little: tasks are generators.

A task yields what it waits for, `(descriptor, events)` or a time on the monotonic clock, and goes on when that has
come. asyncio would do the same with a future, two callbacks and two system calls a wait; here it is one
`epoll_ctl` and a dictionary entry.
"""

from __future__ import annotations

import heapq
import select
import time
from collections.abc import Generator
from typing import TypeVar

READABLE, WRITABLE = select.EPOLLIN, select.EPOLLOUT

Result = TypeVar("Result")
Task = Generator[tuple[int, int] | float, None, Result]


class Loop:
    """Runs tasks until `stopped`. Not thread-safe."""

    def __init__(self) -> None:
        self.stopped = False
        self._epoll = select.epoll()
        self._tasks: set[Task[None]] = set()
        self._waiting: dict[int, Task[None]] = {}
        self._registered: set[int] = set()
        self._timers: list[tuple[float, int, Task[None]]] = []
        self._timer_count = 0

    def spawn(self, task: Task[None]) -> None:
        """Run `task` up to its first wait, and then whenever what it waits for has come."""
        self._tasks.add(task)
        self._step(task)

    def forget(self, fd: int) -> None:
        """`fd` is about to be closed: the number's next owner starts afresh."""
        self._waiting.pop(fd, None)
        if fd in self._registered:
            self._registered.remove(fd)
            self._epoll.unregister(fd)

    def run(self) -> None:
        """Serve until `stopped`, then end all tasks."""
        while not self.stopped:
            timeout = max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None
            for fd, _ in self._epoll.poll(timeout):
                task = self._waiting.pop(fd, None)
                if task is not None:
                    self._step(task)
            now = time.monotonic()
            while self._timers and self._timers[0][0] <= now:
                self._step(heapq.heappop(self._timers)[2])
        for task in list(self._tasks):
            task.close()
        self._epoll.close()

    def _step(self, task: Task[None]) -> None:
        try:
            wanted = next(task)
        except StopIteration:
            self._tasks.discard(task)
            return
        if isinstance(wanted, tuple):
            self._watch(task, *wanted)
        else:
            self._timer_count += 1  # keeps timers of the same time in order, and tasks from being compared
            heapq.heappush(self._timers, (wanted, self._timer_count, task))

    def _watch(self, task: Task[None], fd: int, events: int) -> None:
        assert fd not in self._waiting, f"two tasks wait for descriptor {fd}"
        self._waiting[fd] = task
        if fd in self._registered:
            self._epoll.modify(fd, events | select.EPOLLONESHOT)
        else:
            self._registered.add(fd)
            self._epoll.register(fd, events | select.EPOLLONESHOT)
