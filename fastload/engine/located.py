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
        self._parts = live.find(entry.object_no, entry.sample_no)

    def present(self) -> list[str]:
        """The columns that their windows have."""
        return list(dict.fromkeys(name for window, _, _, _ in self._parts for name in window.columns()))

    def values_of(self, columns: tuple[str, ...]) -> tuple[Values, int]:
        """Where the values of these columns lie, offset -1 where a sample has none, and how many of these there are."""
        values = Values.room(len(columns), len(self.entry))
        missing = [window.look_up(columns, rows, samples, values) for window, samples, _, rows in self._parts]
        return values, sum(missing)

    def keys(self) -> list[str]:
        """The samples' keys."""
        return self._in_order([window.keys(rows) for window, _, _, rows in self._parts])

    def urls(self) -> list[str]:
        """The URLs of their shards. Those of one shard are one object."""
        return self._in_order([window.urls(places, self._urls_of) for window, _, places, _ in self._parts])

    def _in_order(self, texts: list[list[str]]) -> list[str]:
        """What is known of the samples by window, in the order of the entry."""
        if len(texts) == 1:
            return texts[0]
        joined = np.empty(len(self.entry), object)
        for (_, samples, _, _), part in zip(self._parts, texts, strict=True):
            joined[samples] = part
        listed: list[str] = joined.tolist()
        return listed
