"""What the policies for an unknown order have in common: keys that are held, used, and given up one by one."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Protocol, TypeVar

Key = TypeVar("Key", bound=Hashable)


class Keyed(Protocol[Key]):
    """Used by one thread at a time. All but `in_order` take the same time however much is held."""

    def __len__(self) -> int: ...

    def __contains__(self, key: object) -> bool: ...

    def add(self, key: Key) -> None:
        """It is held from now on. One that is held already stays as it is."""
        ...

    def use(self, key: Key) -> None:
        """It was read once more after it came; one that is not held is nobody's business."""
        ...

    def discard(self, key: Key) -> None:
        """It is held no more, for reasons of others."""
        ...

    def evict(self) -> Key:
        """Give up the one that should go first. Raises `KeyError` where nothing is held."""
        ...

    def in_order(self) -> Iterator[Key]:
        """All, as `evict` would give them up one after the other; changes nothing."""
        ...
