"""The service's pools in virtual time: a task begins as soon as one of the pool's threads is free, and lasts as long as
what it does takes.

A task's function is called when it begins. The task ends at once, unless something that the function calls has said, by
`VirtualPools.suspend`, that it goes on: a disk that takes a while, a request in flight. What the function returned is
handed on when the task ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from fastload.service.host.threads import Done, Hung, Pool, Pools, Task
from fastload.simulate.clock import VirtualLoop

Resume = Callable[[BaseException | None], None]


class _Running:
    """A task that has begun, and ends by being resumed or, where nothing suspends it, by itself."""

    __slots__ = ("_end", "is_suspended", "result", "task")

    def __init__(self, task: Task, end: Callable[[Task, Any, BaseException | None], None]) -> None:
        self.task, self._end = task, end
        self.result: Any = None
        self.is_suspended = False

    def resume(self, error: BaseException | None) -> None:
        self._end(self.task, None if error is not None else self.result, error)


class VirtualPools(Pools):
    """All pools of one simulated service."""

    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__(loop.for_service)
        self._running: _Running | None = None

    def make(self, name: str, count: int, submitted: Callable[[], None] = lambda: None) -> Pool:
        """See `Pools.make`."""
        pool = _VirtualPool(name, count, self, submitted)
        self._pools.append(pool)
        return pool

    def suspend(self) -> Resume:
        """The task that begins now goes on until what this returns is called, once, later, with an error or None."""
        assert self._running is not None, "no task begins"
        self._running.is_suspended = True
        return self._running.resume

    def begin(self, task: Task, end: Callable[[Task, Any, BaseException | None], None]) -> None:
        """Call the task's function; `end` follows, now or later."""
        running = self._running = _Running(task, end)
        try:
            running.result = task.function(*task.arguments)
        finally:
            self._running = None
        if not running.is_suspended:
            running.resume(None)


class _VirtualPool(Pool):
    """A pool of `VirtualPools`. What its functions raise ends the run: they are the simulation's own."""

    def __init__(self, name: str, count: int, jobs: VirtualPools, submitted: Callable[[], None]) -> None:
        super().__init__(name, count, jobs.loop, submitted)
        self._all = jobs
        self._queue: deque[Task] = deque()
        self._busy = 0

    def submit(self, function: Callable[..., Any], *arguments: Any, done: Done, hung: Hung | None = None) -> None:
        """See `Pool.submit`."""
        if self._closed:
            return
        task = Task(function, arguments, done, hung)
        self.under_way.add(task)
        self._queue.append(task)
        self._submitted()
        self._pump()

    def stop(self) -> None:
        """See `Pool.stop`."""
        self._closed = True
        self._queue.clear()

    def _pump(self) -> None:
        while self._queue and self._busy < self.count:
            self._busy += 1
            task = self._queue.popleft()
            task.began = self._loop.time()
            self._all.begin(task, self._end)

    def _end(self, task: Task, result: Any, error: BaseException | None) -> None:
        self._busy -= 1
        self._loop.call_soon_threadsafe(self._finish, task, result, error)
        self._pump()
