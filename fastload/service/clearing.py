"""Clearing the cache while it serves: what is in use stays, and everything else goes, also what live plans name.

In RAM that is at once. On disk it takes a system call for each chunk, so it is done in a thread, some at a time; what
is written meanwhile stays. A disk that does not answer is an error for the consumer that asked (see `disk_io`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastload import protocol
from fastload.cache import ChunkKey
from fastload.errors import CacheError, to_wire
from fastload.service.disk_io import DiskEvictor, DiskWatch
from fastload.service.recording import Recording
from fastload.service.residency import Residency
from fastload.service.resources import Resources
from fastload.service.state import ConsumerState
from fastload.service.threads import Done

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
        self, resources: Resources, residency: Residency, recording: Recording, watch: DiskWatch, evictor: DiskEvictor
    ) -> None:
        self._disk, self._events, self._residency = resources.disk, resources.events, residency
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
