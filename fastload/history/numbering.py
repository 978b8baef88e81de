"""Numbers for keys, in the order in which they come: a dictionary for millions of them.

A dict of a million ints takes 100 MB. Here most keys lie in sorted arrays, 12 bytes each, and only the last ones in a
dict; when that is full, it is merged into the arrays.
"""

from __future__ import annotations

import numpy as np

_RECENT_MAX = 1 << 15


class Numbering:
    """Keys are 64-bit, numbers begin at 0."""

    def __init__(self) -> None:
        self._recent: dict[int, int] = {}
        self._keys = np.empty(0, np.uint64)  # sorted
        self._numbers = np.empty(0, np.uint32)  # of each
        self.count = 0

    def number(self, key: int) -> tuple[int, bool]:
        """The key's number, and whether it was given just now."""
        found = self.get(key)
        if found is not None:
            return found, False
        if len(self._recent) == _RECENT_MAX:
            self._merge()
        found = self._recent[key] = self.count
        self.count += 1
        return found, True

    def get(self, key: int) -> int | None:
        """The key's number, None where it has none."""
        found = self._recent.get(key)
        if found is None and len(self._keys):
            at = int(np.searchsorted(self._keys, np.uint64(key)))
            if at < len(self._keys) and int(self._keys[at]) == key:
                found = int(self._numbers[at])
        return found

    def _merge(self) -> None:
        count = len(self._recent)
        keys = np.concatenate([self._keys, np.fromiter(self._recent, np.uint64, count)])
        numbers = np.concatenate([self._numbers, np.fromiter(self._recent.values(), np.uint32, count)])
        order = np.argsort(keys, kind="stable")
        self._keys, self._numbers = keys[order], numbers[order]
        self._recent.clear()
