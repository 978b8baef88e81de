"""Filling buffers: from the store (`fetches`), or from the disk tier, in threads of its own.

One load per chunk at a time, whoever wants it. A chunk that the disk turns out not to have, or to have damaged (which
it puts out of use by itself), is fetched from the store into the same buffer. One whose read hangs is given up together
with the buffer, which the read may yet fill.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from fastload import protocol
from fastload.service.fetches import Fetches
from fastload.service.model import Chunk, State
from fastload.service.pools import Done
from fastload.service.stalls import DiskWatch
from fastload.service.tiers import Disk, Ram
from fastload.service.writing import write_threads

# A direct read of 8 MiB runs at 1.6 GB/s in one thread.
DISK_READ_THREADS = 4

Loaded = Callable[[Chunk, BaseException | None], None]
GivenUp = Callable[[Chunk], Done]


class Loader:
    """Used by the loop's thread only."""

    def __init__(
        self,
        arena: Ram,
        disk: Disk,
        watch: DiskWatch,
        fetches: Fetches,
        loaded: Loaded,
        given_up: GivenUp,
    ) -> None:
        """`loaded(chunk, error)` is called at the end; or `given_up(chunk)`, which returns what to do when its read
        returns after all.
        """
        self._arena, self._disk, self._fetches = arena, disk, fetches
        self._loaded, self._given_up = loaded, given_up
        self.reads = watch.pool("disk-read", read_threads(arena.buffer_count))
        self.order = 0  # loads begun
        self.in_flight: set[Chunk] = set()
        self.counters: Counter[str] = Counter(
            fetched_chunks=0,
            fetched_bytes=0,
            disk_read_chunks=0,
            disk_read_bytes=0,
            disk_reads_hung=0,
            failed_fetches=0,
        )

    def start(self, chunk: Chunk, on_disk: bool, options_key: str) -> None:
        """Fill the chunk's buffer; `loaded(chunk, error)` follows."""
        self.order += 1
        chunk.load_order = self.order
        chunk.granted_to.clear()
        chunk.state = State.LOADING
        chunk.fetched_as = options_key
        self.in_flight.add(chunk)
        if on_disk:
            self._read(chunk)
        else:
            self._fetch(chunk)

    def _read(self, chunk: Chunk) -> None:
        def done(length: int | None, error: BaseException | None) -> None:
            if error is None and length == chunk.length:
                self.counters["disk_read_chunks"] += 1
                self.counters["disk_read_bytes"] += chunk.length
                self._finish(chunk, None)
            else:
                self._fetch(chunk)

        def hung() -> Done:
            self.counters["disk_reads_hung"] += 1
            self.in_flight.discard(chunk)
            return self._given_up(chunk)

        chunk.source = protocol.SOURCE_DISK
        key = chunk.entry.key(chunk.index)
        self.reads.submit(self._disk.read_into, key, self._arena.buffer(chunk.buffer), done=done, hung=hung)

    def _fetch(self, chunk: Chunk) -> None:
        chunk.source = protocol.SOURCE_REMOTE
        self._fetches.start(chunk, self._fetched)

    def _fetched(self, chunk: Chunk, error: BaseException | None) -> None:
        if error is None:
            self.counters["fetched_chunks"] += 1
            self.counters["fetched_bytes"] += chunk.length
        else:
            self.counters["failed_fetches"] += 1
        self._finish(chunk, error)

    def _finish(self, chunk: Chunk, error: BaseException | None) -> None:
        self.in_flight.discard(chunk)
        self._loaded(chunk, error)


def read_threads(buffer_count: int) -> int:
    """How many may read from disk: so few that a disk that hangs leaves a small arena two buffers, if it has four."""
    return max(1, min(DISK_READ_THREADS, buffer_count - 2 - write_threads(buffer_count)))
