"""Virtual time: an event loop in which nothing waits, and a second takes as long as its events do.

What is due at the same time is done in the order in which it was asked for, so a run depends on its seed alone. It has
what the service's core asks of a loop, and no more: no sockets, no tasks, no threads. An error in a callback ends the
run, where asyncio's own loops would only log it.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable
from itertools import count
from typing import Any, cast


class Timer:
    """A call that is due."""

    __slots__ = ("_call", "_when_s")

    def __init__(self, call: Callable[[], Any], when_s: float) -> None:
        self._call: Callable[[], Any] | None = call
        self._when_s = when_s

    def when(self) -> float:
        return self._when_s

    def cancelled(self) -> bool:
        """Whether it will not be made; also true once it was made."""
        return self._call is None

    def cancel(self) -> None:
        self._call = None

    def run(self) -> None:
        """Make the call, unless it was cancelled."""
        call, self._call = self._call, None
        if call is not None:
            call()


class VirtualLoop:
    """See the module's text. Used by one thread. What threads call is called `core_wait_s` later."""

    def __init__(self, core_wait_s: float = 0.0) -> None:
        self._core_wait_s = core_wait_s
        self._now_s = 0.0
        self._due: list[tuple[float, int, Timer]] = []
        self._numbers = count()

    @property
    def for_service(self) -> asyncio.AbstractEventLoop:
        """Itself, as what the service takes it for."""
        return cast(asyncio.AbstractEventLoop, self)

    def time(self) -> float:
        """Seconds since the beginning."""
        return self._now_s

    def call_soon(self, callback: Callable[..., Any], *args: Any) -> Timer:
        """Call it at this time, behind what was asked for before."""
        return self._at(self._now_s, callback, args)

    def call_soon_threadsafe(self, callback: Callable[..., Any], *args: Any) -> Timer:
        """The same, once there is a core."""
        return self._at(self._now_s + self._core_wait_s, callback, args)

    def call_later(self, delay_s: float, callback: Callable[..., Any], *args: Any) -> Timer:
        """Call it so many seconds later."""
        return self._at(self._now_s + max(0.0, delay_s), callback, args)

    def call_at(self, when_s: float, callback: Callable[..., Any], *args: Any) -> Timer:
        """Call it at that time, or now where that is past."""
        return self._at(max(self._now_s, when_s), callback, args)

    def _at(self, when_s: float, callback: Callable[..., Any], args: tuple[Any, ...]) -> Timer:
        timer = Timer((lambda: callback(*args)) if args else callback, when_s)
        heapq.heappush(self._due, (when_s, next(self._numbers), timer))
        return timer

    def run_until(self, finished: Callable[[], bool]) -> bool:
        """Let time pass until `finished()`; False where nothing is due any more before that."""
        while not finished():
            if not self._due:
                return False
            self._now_s, _, timer = heapq.heappop(self._due)
            timer.run()
        return True
