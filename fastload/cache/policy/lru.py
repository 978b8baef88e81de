"""LRU: what was read longest ago goes first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic

from fastload.cache.policy.keyed import Key

__all__ = ["Lru"]


class Lru(Generic[Key]):
    """See `Keyed`."""

    def __init__(self) -> None:
        self._keys: dict[Key, None] = {}  # the one used last is the last

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def add(self, key: Key) -> None:
        self._keys.setdefault(key)

    def use(self, key: Key) -> None:
        if key in self._keys:
            del self._keys[key]
            self._keys[key] = None

    def discard(self, key: Key) -> None:
        self._keys.pop(key, None)

    def evict(self) -> Key:
        key = next(iter(self._keys), None)
        if key is None:
            raise KeyError("nothing is held")
        del self._keys[key]
        return key

    def in_order(self) -> Iterator[Key]:
        return iter(list(self._keys))
