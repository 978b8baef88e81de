"""Touching the arena ahead of its use, in a thread that takes time from nobody.

Fresh memory costs whoever touches it first, and memory that is touched is taken from the machine. So it is touched
where it will be needed: not beyond what the data takes that live plans and claims name, and beyond the highest buffer
ever used only as much as was used so far, between a quarter of a GiB and two. So fetching that goes on finds its memory
ready, also where it is fast, and a reader that stops after some samples costs little. The buffers are used from the
lowest up (see `buffers`), so one number says how far use has come.
"""

from __future__ import annotations

import contextlib
import os
import threading

from fastload.cache import Arena
from fastload.config import GIB, MIB

# Of use: what is touched in two seconds, and fetched in about as many where a link is fast.
AHEAD_BYTES_MIN, AHEAD_BYTES_MAX = 256 * MIB, 2 * GIB
# Touched at a time, between two looks at what is needed.
_STEP_BYTES = 4 * MIB


class Populator:
    """Owns a thread; all methods are called by the loop's thread."""

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
