"""Messages that are answered one by one (`Queries`), and clearing the cache while it serves (`Clearing`).

When the cache is cleared, what is in use stays, and everything else goes, also what live plans name. In RAM that is at
once. On disk it takes a system call for each chunk, so it is done in a thread, some at a time; what is written
meanwhile stays. A disk that does not answer is an error for the consumer that asked (see `disk_io`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastload import protocol
from fastload.cache import ChunkKey
from fastload.errors import CacheError, ServiceError, to_wire
from fastload.service import buffers
from fastload.service.buffers import BufferTable
from fastload.service.disk_io import DiskEvictor, DiskWatch
from fastload.service.indexes import IndexCache
from fastload.service.ports import Disk, Ports
from fastload.service.recording import Recording
from fastload.service.residency import Residency
from fastload.service.state import ConsumerState
from fastload.service.threads import Done
from fastload.store.table import ObjectTable

# A listing of a million objects takes minutes; another consumer's small one need not wait for it.
_LISTING_THREADS = 2


class Queries:
    """Used by the loop's thread only."""

    def __init__(self, ports: Ports, indexes: IndexCache) -> None:
        self._stores, self._indexes = ports.stores, indexes
        self._listings = ports.pools.make("listing", _LISTING_THREADS)

    def take(self, consumer: ConsumerState, message: protocol.FromConsumer) -> None:
        """Answer, now or later; ServiceError for a message that is no request."""
        match message:
            case protocol.Resolve():
                self._resolve(consumer, message)
            case protocol.GetIndexes():
                self._get_indexes(consumer, message)
            case protocol.PutIndex():
                self._indexes.put(consumer.entry(message.object_no).id, message.data)
            case protocol.PutCounts():
                self._indexes.learn([consumer.entry(number).id for number in message.objects], message.counts)
            case protocol.GetCounts():
                self._get_counts(consumer, message)
            case _:
                raise ServiceError(f"an unexpected {type(message).__name__} message from a consumer")

    def _resolve(self, consumer: ConsumerState, message: protocol.Resolve) -> None:
        def resolve() -> ObjectTable:
            if message.present:
                return ObjectTable.of(self._stores.present(consumer.options_key, message.urls))
            found = self._stores.resolve(consumer.options_key, message.urls, message.endings, message.beside)
            return ObjectTable.of(found)

        def done(objects: ObjectTable, error: BaseException | None) -> None:
            if error is not None:
                consumer.send(protocol.RequestFailed(message.request, *to_wire(error)))
                return
            step = protocol.OBJECTS_PER_PIECE
            for start in range(0, max(1, len(objects)), step):
                rows = protocol.ObjectRows.of(objects[start : start + step])
                consumer.send(protocol.Resolved(message.request, rows, start + step >= len(objects)))

        self._listings.submit(resolve, done=done)

    def _get_indexes(self, consumer: ConsumerState, message: protocol.GetIndexes) -> None:
        ids = {number: consumer.entry(number).id for number in message.objects}

        def found(indexes: dict[bytes, bytes]) -> None:
            here = [(number, indexes[key]) for number, key in ids.items() if key in indexes]
            for piece in _pieces(message.request, here):
                consumer.send(piece)

        self._indexes.get(ids.values(), found)

    def _get_counts(self, consumer: ConsumerState, message: protocol.GetCounts) -> None:
        def found(counts: list[int]) -> None:
            consumer.send(protocol.Counts(message.request, np.array(counts, "<i8").tobytes()))

        self._indexes.counts([consumer.entry(number).id for number in message.objects], found)


def _pieces(request: int, indexes: list[tuple[int, bytes]]) -> list[protocol.Indexes]:
    """Messages of some megabytes each, or of one index that is larger."""
    pieces = [protocol.Indexes(request, [], [], last=False)]
    byte_count = 0
    for number, data in indexes:
        if byte_count and byte_count + len(data) > protocol.INDEX_BYTES_PER_PIECE:
            pieces.append(protocol.Indexes(request, [], [], last=False))
            byte_count = 0
        pieces[-1].objects.append(number)
        pieces[-1].data.append(data)
        byte_count += len(data)
    pieces[-1].last = True
    return pieces


# Files that are removed in one go: little beside the time after which a disk counts as hanging, also where each takes
# ten milliseconds.
_AT_ONCE = 256


@dataclass(slots=True, eq=False)
class _ClearRequest:
    consumer: ConsumerState
    message: protocol.Clear
    freed: int  # in RAM
    before: int  # on disk
    keys: list[ChunkKey]
    blobs: list[str] = field(default_factory=list)
    is_answered: bool = False


class Clearing:
    """Used by the loop's thread only, except for what it gives to its pool."""

    def __init__(
        self, ports: Ports, residency: Residency, recording: Recording, watch: DiskWatch, evictor: DiskEvictor
    ) -> None:
        self._disk, self._events, self._residency = ports.disk, ports.events, residency
        self._recording, self._watch, self._evictor = recording, watch, evictor
        self._pool = watch.pool("clear", 1)

    def clear(self, consumer: ConsumerState, message: protocol.Clear) -> None:
        """Do so, and answer."""
        if message.history:
            self._events.history_cleared()  # now, so that nothing more is fetched for it
        freed = self._residency.drop_idle()
        self._events.cache_cleared()
        clearing = _ClearRequest(consumer, message, freed, self._disk.used_bytes, self._disk.keys())
        if self._watch.stalled:
            self._answer(clearing, 0, self._hangs())
            return

        def found(names: list[str] | None) -> None:
            clearing.blobs = names or []
            self._go_on(clearing)

        self._submit(clearing, self._disk.blob_names, found)

    def _submit(self, clearing: _ClearRequest, function: Callable[[], Any], then: Callable[[Any], None]) -> None:
        """Call `function` in a thread, and then `then`."""

        def done(result: Any, error: BaseException | None) -> None:
            if error is not None:
                self._answer(clearing, 0, error)
            else:
                then(result)

        def hung() -> Done:
            self._answer(clearing, 0, self._hangs())
            return lambda result, error: None

        self._pool.submit(function, done=done, hung=hung)

    def _go_on(self, clearing: _ClearRequest) -> None:
        """Remove the next files; when there are none left, forget the history."""
        keys, blobs = clearing.keys[-_AT_ONCE:], clearing.blobs[-_AT_ONCE:]
        del clearing.keys[-_AT_ONCE:], clearing.blobs[-_AT_ONCE:]

        def remove() -> None:
            self._evictor.remove(keys)
            for name in blobs:
                self._disk.remove_blob(name)

        def removed(result: None) -> None:
            self._evictor.settle(keys)
            self._go_on(clearing)

        if keys or blobs:
            self._submit(clearing, remove, removed)
            return
        freed = clearing.freed + max(0, clearing.before - self._disk.used_bytes)
        if clearing.message.history:
            self._events.history_cleared()  # it may have been read again since
            self._recording.clear(lambda byte_count, failed: self._answer(clearing, freed + byte_count, failed))
        else:
            self._answer(clearing, freed, None)

    def _answer(self, clearing: _ClearRequest, byte_count: int, error: BaseException | None) -> None:
        if clearing.is_answered:
            return
        clearing.is_answered = True
        request = clearing.message.request
        if error is not None:
            clearing.consumer.send(protocol.RequestFailed(request, *to_wire(error)))
        else:
            clearing.consumer.send(protocol.Cleared(request, byte_count))

    def _hangs(self) -> CacheError:
        return CacheError(f"the disk cache {self._disk.directory} does not answer; clear it again when it does")


def buffer_stats(table: BufferTable) -> dict[str, int]:
    """How many buffers are in which state."""
    count = np.bincount(table.status, minlength=buffers.QUARANTINED + 1).tolist()
    return {
        "buffers": table.count,
        "buffers_free": count[buffers.FREE],
        "buffers_leased": count[buffers.LEASED] + count[buffers.STUCK],
        "buffers_stranded": count[buffers.QUARANTINED],
    }


def disk_stats(disk: Disk) -> dict[str, int]:
    """What the disk tier holds, and what went wrong with it."""
    counters = disk.counters
    return {
        "disk_used_bytes": disk.used_bytes,
        "disk_quota_bytes": disk.quota_bytes,
        "disk_damaged": counters["damaged"],
        "disk_errors": counters["errors"],
        "disk_stalls": counters["stalls"],
    }
