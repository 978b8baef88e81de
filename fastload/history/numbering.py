"""Numbers for keys, in the order in which they come: a dictionary for millions of them.

A dict of a million ints takes 100 MB. Here most keys lie in sorted arrays, 12 bytes each, and only the last ones in a
dict; when that is full, it is merged into the arrays. Keys, which are hashes, are spread over many such pairs by their
low bits, so that no merge takes longer than a fraction of a millisecond: with one pair it was 400 at two million keys,
in the loop that serves all.
"""

from __future__ import annotations

import numpy as np

_RECENT_MAX = 256
_PARTS = 256


class Numbering:
    """Keys are 64-bit, numbers begin at 0."""

    def __init__(self) -> None:
        self._parts = [_Part() for _ in range(_PARTS)]
        self.count = 0

    def number(self, key: int) -> tuple[int, bool]:
        """The key's number, and whether it was given just now."""
        part = self._parts[key % _PARTS]
        found = part.get(key)
        if found is not None:
            return found, False
        part.put(key, self.count)
        self.count += 1
        return self.count - 1, True

    def get(self, key: int) -> int | None:
        """The key's number, None where it has none."""
        return self._parts[key % _PARTS].get(key)


class _Part:
    __slots__ = ("_keys", "_numbers", "_recent")

    def __init__(self) -> None:
        self._recent: dict[int, int] = {}
        self._keys = np.empty(0, np.uint64)  # sorted
        self._numbers = np.empty(0, np.uint32)  # of each

    def get(self, key: int) -> int | None:
        found = self._recent.get(key)
        if found is None and len(self._keys):
            at = int(self._keys.searchsorted(np.uint64(key)))
            if at < len(self._keys) and int(self._keys[at]) == key:
                found = int(self._numbers[at])
        return found

    def put(self, key: int, number: int) -> None:
        if len(self._recent) == _RECENT_MAX:
            self._merge()
        self._recent[key] = number

    def _merge(self) -> None:
        recent = sorted(self._recent.items())
        keys = np.array([key for key, _ in recent], np.uint64)
        places = self._keys.searchsorted(keys)
        self._keys = np.insert(self._keys, places, keys)
        self._numbers = np.insert(self._numbers, places, np.array([number for _, number in recent], np.uint32))
        self._recent.clear()
