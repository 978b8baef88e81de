"""From the plan to plan entries: walks the windows of an epoch, indexes them, and finds the counts that it needs.

It runs ahead of the batches by as many entries as its user lets it, in his thread or in one of its own; nothing here
starts a thread.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from fastload.cpu_priority import breathe
from fastload.pipeline.counts import CountSource
from fastload.pipeline.reader import WindowReader
from fastload.plan import BatchEntry, Cursor, Position, WindowKey


class Feed:
    """The entries of one rank (or worker) for one epoch, from where its cursor starts."""

    def __init__(
        self,
        cursor: Cursor[BatchEntry],
        reader: WindowReader,
        counts: CountSource,
        expected_next: Callable[[], npt.NDArray[np.int32]],
    ) -> None:
        """`expected_next`: the objects with which the next epoch begins, if it is the one after this."""
        self._cursor, self._reader, self._counts, self._expected_next = cursor, reader, counts, expected_next
        self._using_cursor = threading.Lock()  # the feeder walks, and others ask for positions
        self._waiting: deque[BatchEntry] = deque()  # held, and not due yet
        self._waiting_samples = self._given_samples = 0

    def entries(self) -> Iterator[BatchEntry]:
        """Every entry in order; each is held until `done` is called with it."""
        cursor = self._cursor
        known = self._counts.known()
        with self._using_cursor:
            entries: list[BatchEntry] | None = cursor.tell(0, *known)
            is_exact = cursor.is_counted
        breathe()
        self._plan()
        breathe()
        while entries is not None:
            yield from self._held(entries)
            self._reader.retire_all_but(cursor.needed)
            breathe()
            if cursor.is_counted and not is_exact:
                is_exact = True
                if cursor.partitions > 1:  # windows have changed their nodes
                    self._plan()
            entries = self._more()
        with self._using_cursor:
            entries = cursor.finish()
        yield from self._held(entries)
        yield from self._due(0)
        self._reader.retire_all_but(())
        self._reader.exhausted(self._expected_next(), cursor.epoch + 1)

    def position(self, entry: BatchEntry) -> Position:
        """Where a run stands once an entry is delivered. Any thread may ask."""
        with self._using_cursor:
            return self._cursor.position(entry)

    def done(self, entry: BatchEntry) -> None:
        """The entry's batch is made, or given up."""
        self._reader.done(entry, entry.windows)

    def _plan(self) -> None:
        windows = [(key, self._cursor.objects_of(key)) for key in self._cursor.windows_ahead()]
        self._reader.plan(windows, self._cursor.epoch)

    def _more(self) -> list[BatchEntry] | None:
        """What is settled next, by opening a window or hearing of counts; perhaps nothing yet. None at the end."""
        with self._using_cursor:
            entries = self._cursor.settled()
            key = None if entries else self._cursor.next_window
            wanted = None if entries or key is not None else self._cursor.counts_wanted
        if key is not None:
            return self._open(key)
        if wanted is None:
            return entries
        if not wanted:
            return None
        told = self._counts.ask(wanted[0])
        with self._using_cursor:
            return self._cursor.tell(0, *told)

    def _open(self, key: WindowKey) -> list[BatchEntry]:
        object_nos = self._cursor.objects_of(key)
        counts = self._reader.open(key, object_nos)
        breathe()
        self._counts.counted(object_nos, counts)
        breathe()
        with self._using_cursor:
            return self._cursor.add(key, counts)

    def _held(self, entries: list[BatchEntry]) -> Iterator[BatchEntry]:
        breathe()
        # All are held before the first is out, so that none of their windows closes while later ones wait here.
        for entry in entries:
            self._reader.hold(entry, entry.windows)
            self._waiting.append(entry)
            self._waiting_samples += len(entry)
        # What waits grows with what was given, so that the first batch does not wait for all of it.
        yield from self._due(self._reader.lookahead)

    def _due(self, lookahead: int) -> Iterator[BatchEntry]:
        """Entries, as long as more than `lookahead` samples wait, or than were given before."""
        while self._waiting and self._waiting_samples > min(lookahead, 2 * self._given_samples):
            entry = self._waiting.popleft()
            self._waiting_samples -= len(entry)
            self._given_samples += len(entry)
            self._reader.due(entry)
            yield entry
