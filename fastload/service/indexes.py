"""Shard indexes that consumers gave us to keep: bytes by object id, in RAM within a budget and on disk.

What is in an index is the consumers' business, who check it when they get it. An index is small and saves reading its
whole shard, so it is worth more than any chunk: where the quota is full, chunks are evicted for it.

The one thing that is read here is how many samples an index has, which `SampleCounts` keeps: a consumer that wants to
know how long an epoch is would otherwise get all indexes, 80 bytes a sample, for 8 bytes a shard. A count is a fact of
one version of one object, so it is never wrong later, and stays true where the index has gone. All of them lie in one
blob beside the indexes, since a hundred thousand files take seconds to open, and minutes on a disk that has just been
mounted. What a crash kept out of the blob is found again in the heads of the indexes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice

import numpy as np
from cachetools import LRUCache

from fastload.cache import ChunkKey
from fastload.config import MIB
from fastload.errors import ServiceError
from fastload.formats.placed_index import stored_placed_count
from fastload.formats.shard_index import HEADER_BYTES, stored_sample_count
from fastload.service import bounded
from fastload.service.disk_io import DiskEvictor, DiskWatch
from fastload.service.host.threads import Done
from fastload.service.resources import Resources

_RAM_BYTES = 256 * MIB
_VICTIMS_MAX = 4
# Indexes read in one go: each is a small file, a few milliseconds on a slow disk.
_READ_AT_ONCE = 64
# The same where only their heads are read.
_HEADS_AT_ONCE = 512
Found = Callable[[dict[bytes, bytes]], None]


class IndexCache:
    """Used by the loop's thread only, except for what the pool runs."""

    def __init__(self, resources: Resources, watch: DiskWatch, evictor: DiskEvictor) -> None:
        self._disk, self._is_lost, self._evictor = resources.disk, resources.is_lost, evictor
        self._ram: LRUCache[bytes, bytes] = LRUCache(_RAM_BYTES, getsizeof=len)
        self._pool = watch.pool("index", 1)
        # The last index of a run comes just before its consumer leaves, and the service may end right then.
        self._pool.finishes = True
        self._counts = SampleCounts()
        resources.events.cache_cleared.connect(self.clear)

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

    def has(self, object_id: bytes) -> bool:
        """Whether it is in RAM."""
        return object_id in self._ram

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
        self._write(object_id.hex(), data)

    def _remember(self, object_id: bytes, data: bytes) -> None:
        self._counts.add(object_id, _count_in(data[:HEADER_BYTES], len(data)))
        if len(data) <= self._ram.maxsize:
            self._ram[object_id] = data

    # Sample counts

    def learn(self, object_ids: Sequence[bytes], counts: bytes) -> None:
        """Keep these counts, int64; ServiceError where they are not as many, or no counts."""
        if len(counts) != 8 * len(object_ids):
            raise ServiceError(f"a message tells counts of {len(object_ids)} objects in {len(counts)} bytes")
        numbers = np.frombuffer(counts, "<i8").tolist()
        if numbers and min(numbers) < 0:
            raise ServiceError(f"a message tells a count of {min(numbers)} samples")
        for object_id, count in zip(object_ids, numbers, strict=True):
            self._counts.add(object_id, count)

    def counts(self, object_ids: Sequence[bytes], found: Callable[[list[int]], None]) -> None:
        """Call `found` with the sample counts of these objects, -1 for those without an index: now, or when the disk
        has been read.
        """
        if self._counts.is_loaded or not self._disk.has_blob(SampleCounts.NAME):
            self._look_up_counts(object_ids, found)
            return

        def done(stored: bytes | None, error: BaseException | None) -> None:
            take(stored, error)
            self._look_up_counts(object_ids, found)

        def take(stored: bytes | None, error: BaseException | None) -> None:
            self._counts.load(stored or b"")

        def hung() -> Done:
            found(self._counts.of(object_ids))
            return take

        self._pool.submit(self._disk.get_blob, SampleCounts.NAME, done=done, hung=hung)

    def _look_up_counts(self, object_ids: Sequence[bytes], found: Callable[[list[int]], None]) -> None:
        counts = self._counts.of(object_ids)
        places = [place for place, count in enumerate(counts) if count < 0]
        places = [place for place in places if self._disk.has_blob(object_ids[place].hex())]
        self._look_into_heads(object_ids, counts, places, found)

    def _look_into_heads(
        self, object_ids: Sequence[bytes], counts: list[int], places: list[int], found: Callable[[list[int]], None]
    ) -> None:
        """Put the counts for `places` into `counts`, some at a time, and call `found` with them."""
        if not places or not self._disk.readable:
            found(counts)
            return
        some, rest = places[:_HEADS_AT_ONCE], places[_HEADS_AT_ONCE:]

        def take(more: list[int] | None, error: BaseException | None) -> None:
            for place, count in zip(some, more or (), strict=False):
                self._counts.add(object_ids[place], count)
                counts[place] = count

        def done(more: list[int] | None, error: BaseException | None) -> None:
            take(more, error)
            self._look_into_heads(object_ids, counts, rest, found)

        def hung() -> Done:
            found(list(counts))
            return take

        self._pool.submit(self._read_heads, [object_ids[place] for place in some], done=done, hung=hung)

    def flush(self) -> None:
        """Write down the counts that came since the last time."""
        if not self._counts.is_changed or not self._disk.writable:
            return
        if self._counts.is_loaded:
            self._write(SampleCounts.NAME, self._counts.to_bytes())
        else:
            self._write(SampleCounts.NAME, self._counts.take_unstored(), adds=True)

    def clear(self) -> None:
        """Forget all of them. Those on disk are removed by the caller."""
        self._ram.clear()
        self._counts = SampleCounts()

    # In the pool's thread

    def _read(self, object_ids: list[bytes]) -> dict[bytes, bytes]:
        blobs = ((object_id, self._disk.get_blob(object_id.hex())) for object_id in object_ids)
        return {object_id: data for object_id, data in blobs if data is not None}

    def _read_heads(self, object_ids: list[bytes]) -> list[int]:
        heads = (self._disk.get_blob_head(object_id.hex(), HEADER_BYTES) for object_id in object_ids)
        return [-1 if head is None else _count_in(*head) for head in heads]

    def _write(self, name: str, data: bytes, *, adds: bool = False) -> None:
        victims = list(islice(self._evictor.order.in_order(), _VICTIMS_MAX))

        def done(_: None, error: BaseException | None) -> None:
            self._evictor.settle(victims)

        self._pool.submit(self._put_blob, name, data, victims, adds, done=done, hung=lambda: done)

    def _put_blob(self, name: str, data: bytes, victims: list[ChunkKey], adds: bool) -> None:
        """Write, behind what is there where it `adds`; where the quota is full (not the disk), evict chunks for it."""
        if self._is_lost():
            return
        if adds:
            data = SampleCounts.added(self._disk.get_blob(name) or b"", data)
        self._evictor.remove(victims, lambda: not self._disk.writable or self._disk.free_bytes >= len(data) + 8192)
        self._disk.put_blob(name, data)


_RECORD = np.dtype([("object_id", "V16"), ("count", "<i8")])
# Some 200 MB of memory, 24 MB on disk.
_COUNTS_MAX = 1 << 20


class SampleCounts:
    """Those that were added last, at most about a million. Used by the loop's thread only."""

    NAME = "counts"

    def __init__(self) -> None:
        self._by_id: dict[bytes, int] = {}
        self._unstored: dict[bytes, int] = {}  # of these, what has yet to be written down
        self.is_loaded = False

    @property
    def is_changed(self) -> bool:
        """Whether something has yet to be written down."""
        return bool(self._unstored)

    def of(self, object_ids: Sequence[bytes]) -> list[int]:
        return [self._by_id.get(object_id, -1) for object_id in object_ids]

    def add(self, object_id: bytes, count: int) -> None:
        """Learn a count; -1 is none."""
        if count < 0 or self._by_id.get(object_id) == count:
            return
        for counts in (self._by_id, self._unstored):
            bounded.put(counts, object_id, count, _COUNTS_MAX)

    def load(self, data: bytes) -> None:
        """Add what `to_bytes` gave; what was learnt since counts more."""
        records = np.frombuffer(data, _RECORD, len(data) // _RECORD.itemsize)
        stored = zip(records["object_id"].tolist(), records["count"].tolist(), strict=True)
        self._by_id = {object_id: count for object_id, count in stored if count >= 0} | self._by_id
        self.is_loaded = True

    def to_bytes(self) -> bytes:
        """All of them, 24 bytes each: the id, and the count in little-endian. They count as written down."""
        self._unstored = {}
        return _to_bytes(self._by_id)

    def take_unstored(self) -> bytes:
        """The same of those that have yet to be written down."""
        unstored, self._unstored = self._unstored, {}
        return _to_bytes(unstored)

    @staticmethod
    def added(stored: bytes, more: bytes) -> bytes:
        """What `to_bytes` gives where `stored` was loaded and `more` came since; of two counts the later holds."""
        return (stored[: len(stored) // _RECORD.itemsize * _RECORD.itemsize] + more)[-_COUNTS_MAX * _RECORD.itemsize :]


def _to_bytes(counts: dict[bytes, int]) -> bytes:
    records = np.empty(len(counts), _RECORD)
    records["object_id"] = np.frombuffer(b"".join(counts), "V16")
    records["count"] = np.fromiter(counts.values(), np.int64, len(counts))
    return records.tobytes()


def _count_in(header: bytes, length: int) -> int:
    """How many samples a stored index of either kind has; -1 where it is none."""
    return max(stored_sample_count(header, length), stored_placed_count(header, length))
