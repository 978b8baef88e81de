"""Tiers that hold no bytes: an arena that is a number of buffers, and a disk that knows its keys and how fast it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fastload.cache import ChunkKey, DiskTier
from fastload.simulate.clock import VirtualLoop
from fastload.simulate.pools import VirtualPools

_NOTHING = memoryview(b"")


class VirtualArena:
    """See `service.resources.Ram`."""

    fd = -1

    def __init__(self, ram_bytes: int, chunk_bytes: int) -> None:
        self.chunk_bytes = chunk_bytes
        self.buffer_count = ram_bytes // chunk_bytes
        self.byte_count = self.buffer_count * chunk_bytes
        self.touched_bytes = 0

    def buffer(self, number: int) -> memoryview:
        """Nothing."""
        return _NOTHING

    def renew(self) -> Callable[[], None]:
        """Nothing to go over to."""
        return lambda: None

    def close(self) -> None:
        """Nothing to let go of."""


class _Device:
    """One thing after the other, each as long as its bytes take."""

    def __init__(self, bytes_per_s: float, loop: VirtualLoop) -> None:
        self._bytes_per_s, self._loop = bytes_per_s, loop
        self._free_at_s = 0.0

    def take(self, byte_count: int, then: Callable[[], None]) -> None:
        """Call `then` when so many bytes have been moved, behind those that are on their way."""
        self._free_at_s = max(self._free_at_s, self._loop.time()) + byte_count / self._bytes_per_s
        self._loop.call_at(self._free_at_s, then)


class VirtualDisk:
    """See `service.resources.Disk`. Reads share one rate and writes another. It never fails."""

    directory = Path("simulated")

    def __init__(
        self,
        quota_bytes: int,
        chunk_bytes: int,
        jobs: VirtualPools,
        loop: VirtualLoop,
        rates: tuple[float, float],
        was_read: Callable[[ChunkKey, int], None],
    ) -> None:
        """`rates` are those of reads and writes. `was_read(key, length)` is called after each read."""
        self.chunk_bytes, self.quota_bytes = chunk_bytes, quota_bytes
        self._jobs, self._was_read = jobs, was_read
        self._reads, self._writes = (_Device(rate, loop) for rate in rates)
        self._held: dict[ChunkKey, int] = {}  # key -> length
        self._blobs: dict[str, bytes] = {}
        self.used_bytes = 0
        self._reserved_bytes = 0
        self.counters = {"damaged": 0, "errors": 0, "stalls": 0}

    @property
    def readable(self) -> bool:
        """Unless it is off."""
        return self.quota_bytes > 0

    @property
    def writable(self) -> bool:
        """Unless it is off."""
        return self.quota_bytes > 0

    @property
    def free_bytes(self) -> int:
        """See `DiskTier.free_bytes`."""
        return self.quota_bytes - self.used_bytes - self._reserved_bytes

    @staticmethod
    def file_bytes(length: int) -> int:
        """As in a real one."""
        return DiskTier.file_bytes(length)

    def contains(self, key: ChunkKey) -> bool:
        return key in self._held

    def keys(self) -> list[ChunkKey]:
        return list(self._held)

    def read_into(self, key: ChunkKey, out: memoryview) -> int | None:
        """See `DiskTier.read_into`."""
        length = self._held.get(key)
        if length is None:
            return None
        resume = self._jobs.suspend()
        self._was_read(key, length)
        self._reads.take(length, lambda: resume(None))
        return length

    def verify(self, key: ChunkKey, scratch: memoryview, *, repair: bool) -> bool | None:
        """See `DiskTier.verify`."""
        return True if key in self._held else None

    def write(self, key: ChunkKey, buffer: memoryview, length: int) -> bool:
        """See `DiskTier.write`."""
        need = self.file_bytes(length)
        if key in self._held:
            return True
        if need > self.free_bytes:
            return False
        self._reserved_bytes += need
        resume = self._jobs.suspend()

        def written() -> None:
            self._reserved_bytes -= need
            if key not in self._held:
                self._held[key] = length
                self.used_bytes += need
            resume(None)

        self._writes.take(length, written)
        return True

    def remove(self, key: ChunkKey) -> bool:
        """See `DiskTier.remove`."""
        length = self._held.pop(key, None)
        if length is None:
            return False
        self.used_bytes -= self.file_bytes(length)
        return True

    def get_blob(self, name: str) -> bytes | None:
        """See `DiskTier.get_blob`; in no time, like all that concerns blobs."""
        return self._blobs.get(name)

    def has_blob(self, name: str) -> bool:
        return name in self._blobs

    def get_blob_head(self, name: str, head_bytes: int) -> tuple[bytes, int] | None:
        """See `DiskTier.get_blob_head`."""
        data = self._blobs.get(name)
        return None if data is None else (data[:head_bytes], len(data))

    def blob_names(self) -> list[str]:
        return list(self._blobs)

    def remove_blob(self, name: str) -> bool:
        """See `DiskTier.remove_blob`."""
        return self._blobs.pop(name, None) is not None

    def put_blob(self, name: str, data: bytes) -> bool:
        """See `DiskTier.put_blob`; blobs take no room here."""
        self._blobs[name] = data
        return True

    def set_quota(self, quota_bytes: int) -> None:
        """See `DiskTier.set_quota`."""
        self.quota_bytes = quota_bytes

    def stalled(self, seconds: float) -> None:
        """It never does."""

    def answered(self) -> None:
        """It always does."""
