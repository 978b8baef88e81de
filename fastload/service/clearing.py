"""Emptying the cache while it serves: what is in use stays, everything else goes, also what live plans name.

In RAM that is at once. On disk it takes a system call for each chunk, so it is done in a thread; what is written
meanwhile stays.
"""

from __future__ import annotations

from collections.abc import Callable

from fastload.cache import ChunkKey
from fastload.errors import to_wire
from fastload.service import protocol
from fastload.service.consumers import ConsumerState
from fastload.service.diskorder import DiskOrder
from fastload.service.indexes import Indexes
from fastload.service.pools import Pools
from fastload.service.remembering import Remembering
from fastload.service.tiers import Disk
from fastload.service.versions import Versions


class Clearing:
    """Used by the loop's thread only, except for `_remove`."""

    def __init__(
        self,
        disk: Disk,
        order: DiskOrder,
        indexes: Indexes,
        versions: Versions,
        history: Remembering,
        pools: Pools,
        drop_idle: Callable[[], int],
    ) -> None:
        """`drop_idle()` empties the buffers that nobody uses, and says how many bytes were in them."""
        self._disk, self._order, self._indexes, self._versions = disk, order, indexes, versions
        self._history, self._drop_idle = history, drop_idle
        self._pool = pools.make("clear", 1)

    def clear(self, consumer: ConsumerState, message: protocol.Clear) -> None:
        """Do so, and answer."""
        freed = self._drop_idle()
        self._indexes.clear()
        self._versions.clear()
        keys = self._disk.keys()

        def done(removed: int | None, error: BaseException | None) -> None:
            held = set(self._disk.keys())
            for key in keys:
                if key not in held:
                    self._order.discard(key)
            if message.history and error is None:
                self._history.clear(lambda byte_count, failed: answer(freed + (removed or 0) + byte_count, failed))
            else:
                answer(freed + (removed or 0), error)

        def answer(byte_count: int, error: BaseException | None) -> None:
            if error is not None:
                consumer.send(protocol.RequestFailed(message.request, *to_wire(error)))
            else:
                consumer.send(protocol.Cleared(message.request, byte_count))

        self._pool.submit(self._remove, keys, done=done)

    def _remove(self, keys: list[ChunkKey]) -> int:
        """In a thread."""
        before = self._disk.used_bytes
        for key in keys:
            self._disk.remove(key)
        for name in self._disk.blob_names():
            self._disk.remove_blob(name)
        return max(0, before - self._disk.used_bytes)
