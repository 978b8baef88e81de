"""Which chunks each tier should hold of the data that live plans and claims name: the arcs of `cache.policy.pin`.

The disk's arc is as long as the part of the covered bytes that its quota holds, and the arena's follows it. Where they
lie is a matter of the epoch in which an object is read, so all ranks of a node mean the same chunks.
"""

from __future__ import annotations

from fastload.cache.policy.pin import Arc, place
from fastload.service.model import ObjectEntry
from fastload.service.tiers import Disk

# Of the disk's quota, what chunks can be sure of: indexes lie there too. The rest is filled with what comes.
_DISK_SHARE = 0.97
# Of the arena, what pins can be sure of: the rest is for what is being read and what comes next.
_RAM_SHARE = 0.5


class Pins:
    """Changed by the loop's thread only."""

    def __init__(self, disk: Disk, ram_bytes: int) -> None:
        self._disk, self._ram_bytes = disk, ram_bytes
        self._whole_file_bytes = disk.file_bytes(disk.chunk_bytes)
        self._covered_bytes = self._covered_file_bytes = self._covered_chunks = 0

    def cover(self, entry: ObjectEntry) -> None:
        """An object is covered."""
        self._count(entry, 1)

    def uncover(self, entry: ObjectEntry) -> None:
        """It is covered no more."""
        self._count(entry, -1)

    def _count(self, entry: ObjectEntry, times: int) -> None:
        self._covered_bytes += times * entry.info.size
        self._covered_chunks += times * entry.chunk_count
        self._covered_file_bytes += times * entry.chunk_count * self._whole_file_bytes
        if entry.chunk_count:
            last = self._disk.file_bytes(entry.length(entry.chunk_count - 1))
            self._covered_file_bytes += times * (last - self._whole_file_bytes)

    @property
    def buffers_needed(self) -> int:
        """How many buffers the covered data takes; 0 where it leaves most of each of them empty, so that having their
        memory ready would take several times the room of the data.
        """
        is_dense = 2 * self._covered_bytes >= self._covered_chunks * self._disk.chunk_bytes
        return self._covered_chunks if is_dense else 0

    @property
    def disk_share(self) -> float:
        """The part of the covered data that the disk holds, at most 1."""
        return min(1.0, _DISK_SHARE * self._disk.quota_bytes / max(1, self._covered_file_bytes))

    def belongs_on_disk(self, entry: ObjectEntry, index: int) -> bool:
        """Whether the disk should hold a chunk."""
        share = self.disk_share
        return share >= 1.0 or Arc.of_epoch(entry.epoch, share).holds(place(entry.id, index))

    def belongs_in_ram(self, entry: ObjectEntry, index: int) -> bool:
        """Whether the arena should, rather than others that the disk does not hold."""
        before = self.disk_share
        share = _RAM_SHARE * self._ram_bytes / max(1, self._covered_bytes)
        return before < 1.0 and Arc.of_epoch(entry.epoch, share, before).holds(place(entry.id, index))
