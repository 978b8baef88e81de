"""Which chunks the disk tier holds, in the order in which they may have to go.

Chunks of objects that a live plan names never go (that is the pin: they are as likely to be needed as what would take
their place). The others go by object, the one that was longest without a plan first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fastload.cache import ChunkKey


class DiskOrder:
    """Changed by the loop's thread only."""

    def __init__(self, keys: Iterable[ChunkKey]) -> None:
        self._idle: dict[bytes, dict[int, None]] = {}  # in the order in which their last plan ended
        self._covered: dict[bytes, dict[int, None]] = {}
        for key in keys:
            self.add(key)

    def add(self, key: ChunkKey) -> None:
        """The chunk is on disk."""
        place = self._covered if key.object_id in self._covered else self._idle
        place.setdefault(key.object_id, {})[key.index] = None

    def discard(self, key: ChunkKey) -> None:
        """The chunk is on disk no more."""
        for place in (self._idle, self._covered):
            indexes = place.get(key.object_id)
            if indexes is not None:
                indexes.pop(key.index, None)
        if not self._idle.get(key.object_id, True):
            del self._idle[key.object_id]

    def cover(self, object_id: bytes) -> None:
        """A live plan names the object."""
        if object_id not in self._covered:
            self._covered[object_id] = self._idle.pop(object_id, {})

    def uncover(self, object_id: bytes) -> None:
        """No live plan names it any more."""
        indexes = self._covered.pop(object_id, None)
        if indexes:
            self._idle[object_id] = indexes

    def idle(self) -> Iterator[ChunkKey]:
        """The chunks that may go, in that order."""
        for object_id, indexes in self._idle.items():
            for index in indexes:
                yield ChunkKey(object_id, index)

    def covered(self) -> Iterator[ChunkKey]:
        """The chunks that should stay."""
        for object_id, indexes in self._covered.items():
            for index in indexes:
                yield ChunkKey(object_id, index)
