"""From the plan to plan entries: walks the windows of an epoch, indexes them, and finds the counts that it needs.

It runs ahead of the batches by as many entries as its user lets it, in his thread or in one of its own; nothing here
starts a thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fastload.engine.reader import WindowReader
from fastload.plan import BatchEntry, EpochCursor, WindowKey

Counts = tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]


class CountSource(Protocol):
    """Where the feed asks how many samples shards hold that it has not opened."""

    def known(self) -> Counts:
        """What is known before anything is read: object numbers and their counts."""
        ...

    def counted(self, object_nos: npt.NDArray[np.int32], counts: npt.NDArray[np.int64]) -> None:
        """The feed has counted these."""
        ...

    def ask(self, object_nos: npt.NDArray[np.int32]) -> Counts:
        """The counts of some of these, at least of one. May wait."""
        ...

    def interrupted(self) -> AbstractContextManager[None]:
        """While it is entered, `ask` does not wait."""
        ...


class Feed:
    """The entries of one rank (or worker) for one epoch, from where its cursor starts."""

    def __init__(
        self,
        cursor: EpochCursor,
        reader: WindowReader,
        counts: CountSource,
        expected_next: Callable[[], npt.NDArray[np.int32]],
    ) -> None:
        """`expected_next`: the objects with which the next epoch begins, if it is the one after this."""
        self._cursor, self._reader, self._counts, self._expected_next = cursor, reader, counts, expected_next

    def entries(self) -> Iterator[BatchEntry]:
        """Every entry in order; each is held until `done` is called with it."""
        cursor = self._cursor
        entries = cursor.tell(*self._counts.known())
        self._plan()
        is_exact = cursor.is_counted
        while True:
            yield from self._held(entries)
            self._reader.retire_all_but(cursor.needed)
            if cursor.is_counted and not is_exact:
                is_exact = True
                if len(cursor.orders) > 1:  # windows have changed their nodes
                    self._plan()
            if entries := cursor.settled():
                continue
            if (key := cursor.next_window) is not None:
                entries = self._open(key)
            elif len(wanted := cursor.counts_wanted):
                entries = cursor.tell(*self._counts.ask(wanted))
            else:
                break
        yield from self._held(cursor.finish())
        self._reader.retire_all_but(())
        self._reader.exhausted(self._expected_next(), cursor.epoch + 1)

    def done(self, entry: BatchEntry) -> None:
        """The entry's batch is made, or given up."""
        self._reader.done(entry)

    def close(self) -> None:
        """Give back whatever is still held, and end the plan if it was not read to its end."""
        self._reader.close()

    @contextmanager
    def interrupted(self) -> Iterator[None]:
        """While it is entered, whoever waits for bytes or counts gives up."""
        with self._counts.interrupted(), self._reader.interrupted():
            yield

    def _plan(self) -> None:
        windows = [(key, self._cursor.objects_of(key)) for key in self._cursor.windows_ahead()]
        self._reader.plan(windows, self._cursor.epoch)

    def _open(self, key: WindowKey) -> list[BatchEntry]:
        object_nos = self._cursor.objects_of(key)
        counts = self._reader.open(key, object_nos)
        self._counts.counted(object_nos, counts)
        return self._cursor.add(key, counts)

    def _held(self, entries: list[BatchEntry]) -> Iterator[BatchEntry]:
        # All are held before the first is out, so that none of their windows closes while later ones wait here.
        for entry in entries:
            self._reader.hold(entry)
        yield from entries
