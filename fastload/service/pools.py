"""Threads that do what blocks, for a loop thread that must not.

A pool runs functions and hands what came of them back to the loop, where all state lives. Its threads are made when
there is work for them, and are daemons: a read that hangs in a dead disk must not keep the process alive.
(`concurrent.futures` joins its threads at exit, and makes a future for each call, which nobody here would look at.)
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

Done = Callable[[Any, BaseException | None], None]
_Job = tuple[Callable[..., Any], tuple[Any, ...], Done]


class Pool:
    """At most `count` threads. All methods are called by the loop's thread."""

    def __init__(self, name: str, count: int, loop: asyncio.AbstractEventLoop) -> None:
        self.name, self.count = name, count
        self.pending = 0  # jobs handed in whose `done` has not been called
        self._loop = loop
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._closed = False

    @property
    def idle(self) -> int:
        """How many more jobs would start at once."""
        return max(0, self.count - self.pending)

    def submit(self, function: Callable[..., Any], *arguments: Any, done: Done) -> None:
        """Run `function(*arguments)` in a thread, then `done(result, error)` in the loop."""
        if self._closed:
            return
        self.pending += 1
        if self.pending > len(self._threads) and len(self._threads) < self.count:
            name = f"fastload-{self.name}-{len(self._threads)}"
            thread = threading.Thread(target=self._run, name=name, daemon=True)
            self._threads.append(thread)
            thread.start()
        self._jobs.put((function, arguments, done))

    def close(self, deadline_s: float) -> bool:
        """Start nothing more; wait for what runs, at most so long. Whether all threads have ended.

        What had not begun is dropped, and no `done` is called any more.
        """
        self._closed = True
        while not self._jobs.empty():
            try:
                self._jobs.get_nowait()
            except queue.Empty:  # a thread was quicker
                break
        for _ in self._threads:
            self._jobs.put(None)
        deadline = time.monotonic() + deadline_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            function, arguments, done = job
            result, error = None, None
            try:
                result = function(*arguments)
            except Exception as caught:  # handed on whole; the loop's side decides what it means
                error = caught
            try:
                self._loop.call_soon_threadsafe(self._finish, done, result, error)
            except RuntimeError:  # the loop was closed while the job ran: nobody is left to be told
                return
            del job, function, arguments, done, result, error

    def _finish(self, done: Done, result: Any, error: BaseException | None) -> None:
        self.pending -= 1
        if not self._closed:
            done(result, error)
