"""Shard indexes that consumers gave us to keep: bytes by object id, in RAM within a budget and on disk.

What is in an index is the consumers' business, who check it when they get it. An index is small and saves reading its
whole shard, so it is worth more than any chunk: where the quota is full, chunks go for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain, islice

from cachetools import LRUCache

from fastload.cache import ChunkKey, DiskTier
from fastload.config import MIB
from fastload.service.diskorder import DiskOrder
from fastload.service.pools import Done
from fastload.service.stalls import DiskWatch

_RAM_BYTES = 256 * MIB
_VICTIMS_MAX = 4
# Indexes read in one go: each is a small file, a few milliseconds on a slow disk.
_READ_AT_ONCE = 64

Found = Callable[[dict[bytes, bytes]], None]


class Indexes:
    """Used by the loop's thread only, except for `_read` and `_write`."""

    def __init__(self, disk: DiskTier, order: DiskOrder, watch: DiskWatch) -> None:
        self._disk, self._order = disk, order
        self._ram: LRUCache[bytes, bytes] = LRUCache(_RAM_BYTES, getsizeof=len)
        self._pool = watch.pool("index", 1)
        # The last index of a run comes just before its consumer leaves, and the service may end right then.
        self._pool.finishes = True

    def get(self, object_ids: Iterable[bytes], found: Found) -> None:
        """Call `found` with those indexes that there are: now, or when the disk has been read."""
        here: dict[bytes, bytes] = {}
        elsewhere: list[bytes] = []
        for object_id in object_ids:
            data = self._ram.get(object_id)
            if data is not None:
                here[object_id] = data
            else:
                elsewhere.append(object_id)
        self._look_up(elsewhere, here, found)

    def _look_up(self, object_ids: list[bytes], here: dict[bytes, bytes], found: Found) -> None:
        """Add to `here` what the disk has, some at a time, and call `found` with it."""
        if not object_ids or not self._disk.readable:
            found(here)
            return

        def take(more: dict[bytes, bytes] | None, error: BaseException | None) -> None:
            for object_id, data in (more or {}).items():
                self._remember(object_id, data)
                here[object_id] = data

        def done(more: dict[bytes, bytes] | None, error: BaseException | None) -> None:
            take(more, error)
            self._look_up(object_ids[_READ_AT_ONCE:], here, found)

        def hung() -> Done:
            found(dict(here))
            return take

        self._pool.submit(self._read, object_ids[:_READ_AT_ONCE], done=done, hung=hung)

    def put(self, object_id: bytes, data: bytes) -> None:
        """Keep an index."""
        self._remember(object_id, data)
        if not self._disk.writable:
            return
        victims = list(islice(chain(self._order.idle(), self._order.covered()), _VICTIMS_MAX))

        def done(removed: list[ChunkKey] | None, error: BaseException | None) -> None:
            for key in removed or ():
                self._order.discard(key)

        self._pool.submit(self._write, object_id, data, victims, done=done, hung=lambda: done)

    def _remember(self, object_id: bytes, data: bytes) -> None:
        if len(data) <= self._ram.maxsize:
            self._ram[object_id] = data

    def _read(self, object_ids: list[bytes]) -> dict[bytes, bytes]:
        blobs = ((object_id, self._disk.get_blob(object_id.hex())) for object_id in object_ids)
        return {object_id: data for object_id, data in blobs if data is not None}

    def _write(self, object_id: bytes, data: bytes, victims: list[ChunkKey]) -> list[ChunkKey]:
        """Write, and where the quota is full (not the disk), drop chunks for it; returns the dropped ones."""
        removed: list[ChunkKey] = []
        while self._disk.writable and self._disk.free_bytes < len(data) + 8192 and victims:
            removed.append(victims.pop(0))
            self._disk.remove(removed[-1])
        self._disk.put_blob(object_id.hex(), data)
        return removed
