"""Work for which a finalizer must not stay.

The garbage collector runs finalizers in any thread, in the middle of anything and under any lock. So they may not
take a lock or wait, not even for `threading` to start a thread, which takes one too. What they may do is start a bare
thread; that one starts a proper thread, whose traces `threading` removes when it ends.
"""

from __future__ import annotations

import _thread
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any


class _Call:
    """A call that somebody asked for. It lets go of what it needs when it is over, whoever still holds the call."""

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self._work: list[Any] = [function, arguments]

    def start(self) -> None:
        threading.Thread(target=self._run, name="fastload-finish", daemon=True).start()

    def _run(self) -> None:
        try:
            self._work[0](*self._work[1])
        finally:
            self._work.clear()
            _pending.remove(self)


_pending: deque[_Call] = deque()
os.register_at_fork(after_in_child=_pending.clear)  # their threads are the parent's


def call_later(function: Callable[..., Any], *arguments: Any) -> None:
    """Call `function(*arguments)` soon, in another thread. Never waits."""
    call = _Call(function, arguments)
    _pending.append(call)
    _thread.start_new_thread(call.start, ())


def finish(deadline_s: float) -> None:
    """Wait for all calls that were asked for, or until the deadline."""
    end = time.monotonic() + deadline_s
    while _pending and time.monotonic() < end:
        time.sleep(0.001)
