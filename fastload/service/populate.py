"""Touching the arena ahead of its use, in a thread that takes time from nobody.

Fresh memory costs whoever touches it first, and memory that is touched is taken from the machine. So only a look-ahead
beyond the highest buffer ever used is touched: enough that fetching at full speed does not catch up, little enough that
a small data set in a large arena takes up about what it needs. The buffers are used from the lowest up (see `buffers`),
so one number says how far use has come.
"""

from __future__ import annotations

import contextlib
import os
import threading

from fastload.cache import Arena
from fastload.config import GIB

# Two seconds of touching, or of the fastest fetching; an arena that is no larger is touched at once.
LOOK_AHEAD_BYTES = 2 * GIB


class Populator:
    """Owns a thread; `used` and `close` are called by the loop's thread."""

    def __init__(self, arena: Arena, look_ahead_bytes: int = LOOK_AHEAD_BYTES) -> None:
        """Begin with the start of the arena."""
        self._arena, self._look_ahead_bytes = arena, look_ahead_bytes
        self._used_bytes = 0
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fastload-populate", daemon=True)
        self._thread.start()

    def used(self, buffer_count: int) -> None:
        """The first `buffer_count` buffers have been used."""
        byte_count = buffer_count * self._arena.chunk_bytes
        if byte_count > self._used_bytes:
            with self._changed:
                self._used_bytes = byte_count
                self._changed.notify()

    def close(self) -> None:
        """End the thread, at its next piece."""
        with self._changed:
            self._stop.set()
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        with contextlib.suppress(OSError):  # where threads have no niceness of their own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        done = 0
        while done < self._arena.byte_count:
            start, end = self._next(done)
            done = self._arena.populate(start, end, self._stop)
            if done < end or self._stop.is_set():  # the former: the kernel cannot
                return

    def _next(self, done: int) -> tuple[int, int]:
        """Wait until more should be touched than was `done`; returns from where to where."""
        with self._changed:
            self._changed.wait_for(lambda: self._stop.is_set() or self._end() > done)
            return max(done, self._used_bytes), self._end()

    def _end(self) -> int:
        return min(self._used_bytes + self._look_ahead_bytes, self._arena.byte_count)
