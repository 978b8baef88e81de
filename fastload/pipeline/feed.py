"""From the plan to entries: walks the windows of an epoch, opens them, and finds the sample counts that it needs.

A data set that is read alone is one source, a mixture has several. Each source has windows, counts and a plan of its
own, as if it were read alone; one cursor walks over all of them.

A feed runs ahead of the batches as far as its consumer iterates it; it starts no thread.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from fastload.cpu_priority import breathe
from fastload.pipeline.counts import CountSource
from fastload.pipeline.reader import WindowReader
from fastload.plan import Batch, Cursor, Position, WindowKey

Entry = TypeVar("Entry", bound=Batch)

# Of several sources, so many windows are planned at a time, since an epoch of a mixture may have no end; and again
# once half of them have been opened.
_PLANNED_WINDOWS = 1024


def _nothing_expected() -> npt.NDArray[np.int32]:
    return np.empty(0, np.int32)


@dataclass(frozen=True, slots=True)
class FeedSource:
    """What a feed uses of one source. `expected_next`: the objects with which the next epoch begins, if it is the one
    after this.
    """

    reader: WindowReader
    counts: CountSource
    expected_next: Callable[[], npt.NDArray[np.int32]] = _nothing_expected


class Feed(Generic[Entry]):
    """The entries of one rank (or worker) for one epoch, from where its cursor starts."""

    def __init__(self, cursor: Cursor[Entry], sources: Sequence[FeedSource]) -> None:
        self._cursor, self._sources = cursor, sources
        self._is_alone = len(sources) == 1
        self._using_cursor = threading.Lock()  # the feeder walks, and others ask for positions
        self._opened = 0  # windows since the last plan
        self._waiting: deque[Entry] = deque()  # held, and not due yet
        self._waiting_samples = self._given_samples = 0
        self._is_last = False  # what waits are the last entries, which nothing follows

    def entries(self) -> Iterator[Entry]:
        """Every entry in order; each is held until `done` is called with it."""
        cursor = self._cursor
        entries: list[Entry] | None = []
        for number, source in enumerate(self._sources):
            known = source.counts.known()
            with self._using_cursor:
                entries = [*(entries or ()), *cursor.add_counts(number, *known)]
            breathe()
        is_exact = cursor.is_counted
        self._plan()
        breathe()
        while entries is not None:
            yield from self._held(entries)
            self._retire_all_but(cursor.needed)
            breathe()
            if self._is_plan_outdated(is_exact):
                self._plan()
            is_exact = cursor.is_counted
            entries = self._more()
        with self._using_cursor:
            entries = cursor.finish()
        self._is_last = True
        yield from self._held(entries)
        self._retire_all_but(frozenset())
        for source in self._sources:
            source.reader.exhausted(source.expected_next(), cursor.epoch + 1)

    def position(self, entry: Entry) -> Position:
        """Where a run stands once an entry is delivered. Thread-safe."""
        with self._using_cursor:
            return self._cursor.position(entry)

    @property
    def has_next(self) -> bool:
        """Whether an entry is due: the next one comes without a wait. For the thread that iterates over `entries`."""
        # What waits grows with what was given, so that the first batch does not wait for all of it.
        return bool(self._waiting) and self._waiting_samples > min(self._lookahead, 2 * self._given_samples)

    def done(self, entry: Entry) -> None:
        """The entry's batch is built, or given up."""
        for part in entry.parts:
            self._sources[part.source].reader.done(part, part.windows)

    def _is_plan_outdated(self, was_exact: bool) -> bool:
        if not was_exact and self._cursor.is_counted:
            return not self._is_alone or self._cursor.partitions > 1  # windows have changed their nodes, or their order
        return not self._is_alone and self._opened > _PLANNED_WINDOWS // 2

    def _plan(self) -> None:
        windows: list[list[tuple[WindowKey, Any]]] = [[] for _ in self._sources]
        with self._using_cursor:
            for key in islice(self._cursor.windows_ahead(), None if self._is_alone else _PLANNED_WINDOWS):
                windows[key.source].append((key, self._cursor.objects_of(key)))
        for source, planned in zip(self._sources, windows, strict=True):
            source.reader.plan(planned, self._cursor.epoch)
        self._opened = 0

    def _more(self) -> list[Entry] | None:
        """The entries that are settled next, after a window was opened or counts were learnt; perhaps none yet. None
        at the end.
        """
        with self._using_cursor:
            entries: list[Entry] = self._cursor.settled()
            key = None if entries else self._cursor.next_window
            wanted = {} if entries or key is not None else self._cursor.counts_wanted
        if entries:
            return entries
        if key is not None:
            return self._open(key)
        if not wanted:
            return None
        number, object_nos = next(iter(wanted.items()))  # the counts of one source may be all that is needed
        counts = self._sources[number].counts.ask(object_nos)
        with self._using_cursor:
            return self._cursor.add_counts(number, *counts)

    def _open(self, key: WindowKey) -> list[Entry]:
        with self._using_cursor:
            object_nos = self._cursor.objects_of(key)
        source = self._sources[key.source]
        counts = source.reader.open(key, object_nos)
        breathe()
        source.counts.counted(object_nos, counts)
        breathe()
        self._opened += 1
        with self._using_cursor:
            return self._cursor.add(key, counts)

    def _held(self, entries: Sequence[Entry]) -> Iterator[Entry]:
        breathe()
        # All are held before the first is out, so that none of their windows closes while later ones wait here.
        for entry in entries:
            for part in entry.parts:
                self._sources[part.source].reader.hold(part, part.windows)
            self._waiting.append(entry)
            self._waiting_samples += len(entry)
        while self.has_next:
            entry = self._waiting.popleft()
            self._waiting_samples -= len(entry)
            self._given_samples += len(entry)
            for part in entry.parts:
                self._sources[part.source].reader.due(part)
            yield entry

    @property
    def _lookahead(self) -> int:
        return self._sources[0].reader.lookahead if self._is_alone and not self._is_last else 0

    def _retire_all_but(self, needed: frozenset[WindowKey]) -> None:
        for number, source in enumerate(self._sources):
            source.reader.retire_all_but({key for key in needed if key.source == number})
