"""The samples of one plan entry, found in the windows that are open: where their values lie, and what they are called.

The samples of a batch may lie in several windows. Each window writes what it knows to the places of its samples, so
that arrays are in the entry's order from the start.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fastload.errors import MissingColumnError
from fastload.pipeline.columns import shown
from fastload.pipeline.gather import Values
from fastload.pipeline.windows import Ints, LiveWindows
from fastload.plan import BatchEntry

__all__ = ["Located"]


class Located:
    """See the module. `urls_of` gives the URLs of objects. Used by one thread."""

    def __init__(self, entry: BatchEntry, live: LiveWindows, urls_of: Callable[[Ints], list[str]]) -> None:
        self.entry = entry
        self._urls_of = urls_of
        self._parts = live.find(entry.object_no, entry.sample_no)

    def have(self, column: str) -> bool:
        """Whether a shard of their windows has the column."""
        return any(column in window.columns() for window, _, _, _ in self._parts)

    def present(self) -> tuple[str, ...]:
        """The columns that their windows have."""
        if len(self._parts) == 1:
            return self._parts[0][0].columns()
        return tuple(dict.fromkeys(name for window, _, _, _ in self._parts for name in window.columns()))

    def all_columns(self) -> tuple[str, ...]:
        """Those that are present, to read all of them. MissingColumnError where most samples lack most of them."""
        for window, _, places, _ in self._parts:
            if window.is_sparse:
                (url,) = window.urls(places[:1], self._urls_of)
                raise MissingColumnError(
                    f"{url}: its window of shards has {len(window.columns())} columns, and most samples lack most of "
                    f"them: {shown(window.columns())}. A column is what follows the first dot of a member's name, so "
                    "dots within keys make columns of their own. Name the columns with columns=[...] or "
                    "decode={...}, and write 'txt?' for one that samples may lack"
                )
        return self.present()

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
