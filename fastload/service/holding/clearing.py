"""Removing from the cache while it serves: what is in use stays, what is pinned stays, and all else goes that is to go,
also what live plans name: everything (`Clear`), or what is called so (`Evict`).

In RAM that is at once. On disk it takes a system call for each chunk, so it is done in a thread, some at a time; what
is written meanwhile stays. A disk that does not answer is an error for who asked (see `disk_io`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from fastload import protocol
from fastload.cache import ChunkKey
from fastload.errors import CacheError, to_wire
from fastload.service.disk_io import DiskEvictor, DiskWatch
from fastload.service.holding.holdings import Holdings
from fastload.service.host.threads import Done
from fastload.service.recording import Recording
from fastload.service.residency import Residency
from fastload.service.resources import Resources
from fastload.service.shared_state import SharedState

# Files that are removed in one go: little beside the time after which a disk counts as hanging, also where each takes
# ten milliseconds.
_AT_ONCE = 256

Send = Callable[[protocol.Message], None]
Ended = Callable[[int, BaseException | None], None]


@dataclass(slots=True, eq=False)
class _Removal:
    """Files that are being removed. `ended` gets how many bytes that freed, or why not all could be removed."""

    ended: Ended
    freed: int  # in RAM
    before: int  # on disk
    keys: list[ChunkKey]
    blobs: list[str] = field(default_factory=list)
    is_ended: bool = False


class Clearing:
    """Used by the loop's thread only, except for what it gives to its pool."""

    def __init__(
        self,
        resources: Resources,
        shared: SharedState,
        residency: Residency,
        recording: Recording,
        holdings: Holdings,
        watch: DiskWatch,
        evictor: DiskEvictor,
    ) -> None:
        self._disk, self._events, self._residency = resources.disk, resources.events, residency
        self._shared, self._recording, self._holdings = shared, recording, holdings
        self._watch, self._evictor = watch, evictor
        self._pool = watch.pool("clear", 1)

    def clear(self, send: Send, message: protocol.Clear) -> None:
        """Remove everything that may go, and answer."""

        def ended(freed: int, error: BaseException | None) -> None:
            if error is None and message.history:
                self._events.history_cleared()  # it may have been read again since
                self._recording.clear(lambda byte_count, failed: answer(freed + byte_count, failed))
            else:
                answer(freed, error)

        def answer(freed: int, error: BaseException | None) -> None:
            cleared = protocol.Cleared(message.request, freed)
            send(cleared if error is None else protocol.RequestFailed(message.request, *to_wire(error)))

        if message.history:
            self._events.history_cleared()  # now, so that nothing more is fetched for it
        if message.pins:
            self._holdings.unpin([pin.name for pin in self._shared.pins])
        is_pinned = self._shared.disk_order.is_pinned
        freed = self._residency.drop_idle(lambda chunk: not is_pinned(chunk.entry.id))
        self._events.cache_cleared()
        keys = [key for key in self._disk.keys() if not is_pinned(key.object_id)]  # noqa: SIM118  # a method of the tier
        removal = _Removal(ended, freed, self._disk.used_bytes, keys)
        if self._watch.stalled:
            self._end(removal, self._hangs())
            return

        def found(names: list[str] | None) -> None:
            removal.blobs = [name for name in names or [] if not is_pinned(_object_of(name))]
            self._go_on(removal)

        self._submit(removal, self._disk.blob_names, found)

    def evict(self, send: Send, message: protocol.Evict) -> None:
        """Remove what is called so and may go, and answer."""
        if self._watch.stalled:
            send(protocol.RequestFailed(message.request, *to_wire(self._hangs())))
        else:
            self._holdings.search(message.what, lambda ids: self._evict(send, message.request, ids))

    def _evict(self, send: Send, request: int, object_ids: Iterable[bytes]) -> None:
        order, pins = self._shared.disk_order, self._shared.pins
        ids = {object_id for object_id in object_ids if not order.is_pinned(object_id)}
        pinned_bytes = sum(pins.size_of(object_id) for object_id in set(object_ids) - ids)
        freed = self._residency.drop_idle(lambda chunk: chunk.entry.id in ids)
        in_use = [chunk for chunk in self._shared.table.chunks if chunk is not None and chunk.entry.id in ids]
        stay = {chunk.entry.key(chunk.index) for chunk in in_use}
        keys = [key for each in ids for index in order.indexes_of(each) if (key := ChunkKey(each, index)) not in stay]
        blobs = [each.hex() for each in ids if self._disk.has_blob(each.hex())]
        values = {"in_use_bytes": sum(chunk.length for chunk in in_use), "pinned_bytes": pinned_bytes}

        def ended(byte_count: int, error: BaseException | None) -> None:
            done = protocol.Done(request, {"freed_bytes": byte_count, **values})
            send(done if error is None else protocol.RequestFailed(request, *to_wire(error)))

        self._go_on(_Removal(ended, freed, self._disk.used_bytes, keys, blobs))

    def _submit(self, removal: _Removal, function: Callable[[], Any], then: Callable[[Any], None]) -> None:
        """Call `function` in a thread, and then `then`."""

        def done(result: Any, error: BaseException | None) -> None:
            if error is not None:
                self._end(removal, error)
            else:
                then(result)

        def hung() -> Done:
            self._end(removal, self._hangs())
            return lambda result, error: None

        self._pool.submit(function, done=done, hung=hung)

    def _go_on(self, removal: _Removal) -> None:
        """Remove the next files."""
        keys, blobs = removal.keys[-_AT_ONCE:], removal.blobs[-_AT_ONCE:]
        del removal.keys[-_AT_ONCE:], removal.blobs[-_AT_ONCE:]

        def remove() -> None:
            self._evictor.remove(keys)
            for name in blobs:
                self._disk.remove_blob(name)

        def removed(result: None) -> None:
            self._evictor.settle(keys)
            self._go_on(removal)

        if keys or blobs:
            self._submit(removal, remove, removed)
        else:
            self._end(removal, None)

    def _end(self, removal: _Removal, error: BaseException | None) -> None:
        if not removal.is_ended:
            removal.is_ended = True
            removal.ended(removal.freed + max(0, removal.before - self._disk.used_bytes), error)

    def _hangs(self) -> CacheError:
        return CacheError(f"the disk cache {self._disk.directory} does not answer; clear it again when it does")


def _object_of(blob: str) -> bytes:
    """The object whose index a blob is; b"" for another."""
    try:
        return bytes.fromhex(blob)
    except ValueError:
        return b""
