"""Changing the disk quota while the service runs.

Whoever opens the directory with another `disk_bytes` has it written there and is warned; the service hears of it with
the hello. A larger quota holds at once. For a smaller one what is too much is removed, first what no live plan names.
A tier that was off first takes stock of what lies there. Both may take long, so they are done in a thread; and since
they consist of many small calls, a deadline for the whole would say nothing about the disk.
"""

from __future__ import annotations

from itertools import chain

from fastload.cache import ChunkKey
from fastload.service.diskorder import DiskOrder
from fastload.service.pools import Pools
from fastload.service.tiers import Disk


class Quota:
    """Used by the loop's thread only, except for `_apply`."""

    def __init__(self, disk: Disk, order: DiskOrder, pools: Pools) -> None:
        self._disk, self._order = disk, order
        self._pool = pools.make("quota", 1)  # one thread: of two changes the later one holds
        self._wanted = disk.quota_bytes

    def change(self, quota_bytes: int) -> None:
        """Have at most so many bytes on disk from now on."""
        if quota_bytes == self._wanted:
            return
        self._wanted = quota_bytes
        was_off = not self._disk.quota_bytes
        victims = list(chain(self._order.idle(), self._order.covered()))

        def done(_: None, error: BaseException | None) -> None:
            self._agree(victims, was_off)

        self._pool.submit(self._apply, quota_bytes, victims, done=done)

    def _apply(self, quota_bytes: int, victims: list[ChunkKey]) -> None:
        """In a thread."""
        self._disk.set_quota(quota_bytes)
        for key in victims:
            if not quota_bytes or self._disk.free_bytes >= 0:  # without a quota the tier is off, and left as it is
                return
            self._disk.remove(key)

    def _agree(self, victims: list[ChunkKey], was_off: bool) -> None:
        """Have the order name what the disk now holds."""
        held = set(self._disk.keys())
        for key in victims:
            if key not in held:
                self._order.discard(key)
        for key in held if was_off else ():
            self._order.add(key)
