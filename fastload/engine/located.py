"""The samples of one plan entry, found in the windows that are open: where their values lie, and what they are called.

The samples of a batch may lie in several windows. Each window writes what it knows to the places of its samples, so
that arrays are in the entry's order from the start.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fastload.engine.gather import Values
from fastload.engine.windows import Ints, LiveWindows
from fastload.plan import BatchEntry

__all__ = ["Located"]


class Located:
    """See the module. `urls_of` gives the URLs of objects. Used by one thread."""

    def __init__(self, entry: BatchEntry, live: LiveWindows, urls_of: Callable[[Ints], list[str]]) -> None:
        self.entry = entry
        self._urls_of = urls_of
        self._parts = [
            (window, samples, places, window.rows(places, entry.sample_no.take(samples)))
            for window, samples, places in live.find(entry.object_no)
        ]

    def present(self) -> list[str]:
        """The columns that their windows have."""
        return list(dict.fromkeys(name for window, _, _, _ in self._parts for name in window.columns()))

    def values_of(self, column: str) -> Values:
        """Where the column's values lie; offset -1 where a sample has none."""
        values = Values(*np.empty((3, len(self.entry)), np.int64))
        for window, samples, _, rows in self._parts:
            window.look_up(column, rows, samples, values.first_chunk, values.offset, values.size)
        return values

    def keys(self) -> list[str]:
        """The samples' keys. Written as one text and cut at NUL, which no key holds: no Python a sample."""
        if not len(self.entry):
            return []
        lengths = np.empty(len(self.entry), np.int64)
        for window, samples, _, rows in self._parts:
            window.key_lengths(rows, samples, lengths)
        ends = np.cumsum(lengths + 1)
        text = np.zeros(int(ends[-1]), np.uint8)
        for window, samples, _, rows in self._parts:
            window.write_keys(rows, samples, ends - lengths - 1, text)
        return str(text.data[:-1], "utf-8", "backslashreplace").split("\0")

    def urls(self) -> list[str]:
        """The URLs of their shards. Those of one shard are one object."""
        urls = np.empty(len(self.entry), object)
        for window, samples, places, _ in self._parts:
            urls[samples] = window.urls(places, self._urls_of)
        listed: list[str] = urls.tolist()
        return listed
