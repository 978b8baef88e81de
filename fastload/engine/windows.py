"""The windows that are live: whose samples batches are being made from.

A window's shards are indexed when it opens; from then on, a sample is a row in arrays that cover the whole window, so
that a batch finds its bytes with a few vector operations and no Python per sample. Its chunks are leased while it is
live and given back once no batch can need them.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fastload.formats import ShardIndex

Ints = npt.NDArray[np.int64]


@dataclass(slots=True)
class Window:
    """Some whole shards and where each of their samples lies."""

    key: Hashable
    object_nos: Ints
    indexes: list[ShardIndex]
    first_chunk: Ints
    chunk_nos: Ints
    number: int = field(init=False, default=-1)  # of its opening, given by `LiveWindows`
    counts: Ints = field(init=False)
    _base: Ints = field(init=False)
    _key_bytes: npt.NDArray[np.uint8] = field(init=False)
    _key_starts: Ints = field(init=False)
    _columns: dict[str, tuple[Ints, Ints, Ints]] = field(init=False, default_factory=dict)
    _lock: threading.Lock = field(init=False, default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.counts = np.array([index.sample_count for index in self.indexes], np.int64)
        self._base = np.concatenate([[0], np.cumsum(self.counts)])
        self._key_bytes = np.concatenate([np.empty(0, np.uint8), *(index.key_bytes for index in self.indexes)])
        # Ends fall together with the next start, so one array of S + 1 offsets serves the whole window.
        shifts = np.concatenate([[0], np.cumsum([len(index.key_bytes) for index in self.indexes])]).astype(np.int64)
        starts = [index.key_offsets[:-1] + shift for index, shift in zip(self.indexes, shifts, strict=False)]
        self._key_starts = np.concatenate([*starts, shifts[-1:]])

    def columns(self) -> tuple[str, ...]:
        """The names of all columns in these shards, in the order in which they first appear."""
        return tuple(dict.fromkeys(name for index in self.indexes for name in index.columns))

    def rows(self, places: Ints, sample_nos: Ints) -> Ints:
        """The rows of samples, given as places in `object_nos` and numbers within the shard."""
        return self._base[places] + sample_nos

    def keys(self, rows: Ints) -> list[str]:
        """The keys of these rows. One text cut at NUL, which no key holds: no Python call a sample."""
        if not len(rows):
            return []
        starts, sizes = self._key_starts[rows], self._key_starts[rows + 1] - self._key_starts[rows]
        ends = np.cumsum(sizes + 1)
        text = np.zeros(int(ends[-1]), np.uint8)
        shift = np.repeat(starts - (ends - sizes - 1), sizes)
        places = np.delete(np.arange(ends[-1]), ends - 1)
        text[places] = self._key_bytes[places + shift]
        return text[:-1].tobytes().decode("utf-8", "backslashreplace").split("\0")

    def values_of(self, column: str) -> tuple[Ints, Ints, Ints]:
        """For each row: the first chunk of its shard, and offset and size of its value there (-1 and 0: none)."""
        with self._lock:
            if column not in self._columns:
                self._columns[column] = self._values_of(column)
            return self._columns[column]

    def _values_of(self, column: str) -> tuple[Ints, Ints, Ints]:
        offsets, sizes = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for index in self.indexes:
            members = index.members_of(column)
            there = members >= 0
            safe = np.where(there, members, 0)
            if len(index.member_offset):
                offsets.append(np.where(there, index.member_offset[safe], -1))
                sizes.append(np.where(there, index.member_size[safe], 0))
        return np.repeat(self.first_chunk, self.counts), np.concatenate(offsets), np.concatenate(sizes)


class LiveWindows:
    """The open windows of one pass over the data, and how many batches in the making need each.

    `open`, `hold` and `retire_all_but` are called by the feeder, `find` and `done` by the threads that make batches. A
    window is handed back to be closed (the caller gives its leases back) once the feeder has retired it and no batch
    holds it. A shard may be in two open windows, those of two epochs; either serves its samples.
    """

    def __init__(self, object_count: int) -> None:
        self._lock = threading.Lock()
        self._open: dict[Hashable, Window] = {}
        self._by_number: dict[int, Window] = {}
        self._opened_count = 0
        self._window_of = np.full(object_count, -1, np.int64)  # by object: the number of a window that is open
        self._place_of = np.zeros(object_count, np.int64)
        self._holders: dict[Hashable, int] = {}  # window -> how many batches in the making need it
        self._retired: set[Hashable] = set()

    def __contains__(self, key: Hashable) -> bool:
        """Whether a window is open."""
        return key in self._open

    def open(self, window: Window) -> None:
        """Make a window's samples available."""
        with self._lock:
            window.number = self._opened_count
            self._opened_count += 1
            self._show(window)
            self._open[window.key] = self._by_number[window.number] = window
            self._retired.discard(window.key)

    def find(self, object_nos: Ints) -> list[tuple[Window, npt.NDArray[np.bool_] | None, Ints]]:
        """The windows of these samples' shards: (window, which of the samples or None for all, places in it)."""
        with self._lock:
            numbers = self._window_of[object_nos]
            places = self._place_of[object_nos]
            if len(numbers) and (numbers == numbers[0]).all():
                return [(self._by_number[int(numbers[0])], None, places)]
            parts = []
            for number in np.unique(numbers):
                chosen = numbers == number
                parts.append((self._by_number[int(number)], chosen, places[chosen]))
            return parts

    def hold(self, windows: Iterable[Hashable]) -> None:
        """A batch whose samples lie in these windows is in the making."""
        with self._lock:
            for key in windows:
                self._holders[key] = self._holders.get(key, 0) + 1

    def done(self, windows: Iterable[Hashable]) -> list[Window]:
        """That batch is made (or given up); returns the windows that may be closed now."""
        with self._lock:
            for key in windows:
                self._holders[key] -= 1
                if not self._holders[key]:
                    del self._holders[key]
            return self._close()

    def retire_all_but(self, needed: Collection[Hashable]) -> list[Window]:
        """No batch that is still to come needs a window that is not in `needed`; returns those to be closed now."""
        with self._lock:
            self._retired = {key for key in self._open if key not in needed}
            return self._close()

    def close_all(self) -> list[Window]:
        """The pass is given up: all open windows."""
        with self._lock:
            closed = list(self._open.values())
            self._open.clear()
            self._by_number.clear()
            self._retired.clear()
            return closed

    def _show(self, window: Window) -> None:
        self._window_of[window.object_nos] = window.number
        self._place_of[window.object_nos] = np.arange(len(window.object_nos))

    def _close(self) -> list[Window]:
        closed = [self._open.pop(key) for key in sorted(self._retired - self._holders.keys(), key=repr)]
        for window in closed:
            self._retired.discard(window.key)
            del self._by_number[window.number]
        for window in closed:
            self._hide(window)
        return closed

    def _hide(self, window: Window) -> None:
        """Where another window that is open has some of its shards, that one serves them from now on."""
        mine = window.object_nos[self._window_of[window.object_nos] == window.number]
        self._window_of[mine] = -1
        for other in self._by_number.values():
            places = np.flatnonzero(np.isin(other.object_nos, mine))
            self._window_of[other.object_nos[places]] = other.number
            self._place_of[other.object_nos[places]] = places


def window_chunks(first_chunk: Ints, object_nos: Sequence[int] | Ints) -> Ints:
    """All chunk numbers of these objects, in order."""
    runs = [np.arange(first_chunk[number], first_chunk[number + 1], dtype=np.int64) for number in object_nos]
    return np.concatenate(runs) if runs else np.empty(0, np.int64)
