"""Emptying the cache while it serves: what is in use stays, everything else goes, also what live plans name.

In RAM that is at once. On disk it takes a system call for each chunk, so it is done in a thread, some at a time; what
is written meanwhile stays. A disk that does not answer is an error for whoever asked (see `stalls`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastload import protocol
from fastload.cache import ChunkKey
from fastload.errors import CacheError, to_wire
from fastload.service.consumers import ConsumerState
from fastload.service.diskorder import DiskOrder
from fastload.service.indexes import Indexes
from fastload.service.pools import Done
from fastload.service.remembering import Remembering
from fastload.service.stalls import DiskWatch
from fastload.service.tiers import Disk
from fastload.service.versions import Versions

# Files that are removed in one go: little beside the time after which a disk counts as hanging, also where each takes
# ten milliseconds.
_AT_ONCE = 256


@dataclass(slots=True, eq=False)
class _Clearing:
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
        self,
        disk: Disk,
        order: DiskOrder,
        indexes: Indexes,
        versions: Versions,
        history: Remembering,
        watch: DiskWatch,
        drop_idle: Callable[[], int],
        forget: Callable[[], None],
    ) -> None:
        """`drop_idle()` empties the buffers that nobody uses, and says how many bytes were in them. `forget()` ends all
        predictions.
        """
        self._disk, self._order, self._indexes, self._versions = disk, order, indexes, versions
        self._history, self._watch, self._drop_idle, self._forget = history, watch, drop_idle, forget
        self._pool = watch.pool("clear", 1)

    def clear(self, consumer: ConsumerState, message: protocol.Clear) -> None:
        """Do so, and answer."""
        if message.history:
            self._forget()  # now, so that nothing more is fetched for it
        freed = self._drop_idle()
        self._indexes.clear()
        self._versions.clear()
        clearing = _Clearing(consumer, message, freed, self._disk.used_bytes, self._disk.keys())
        if self._watch.stalled:
            self._answer(clearing, 0, self._hangs())
            return

        def found(names: list[str] | None) -> None:
            clearing.blobs = names or []
            self._go_on(clearing)

        self._submit(clearing, self._disk.blob_names, found)

    def _submit(self, clearing: _Clearing, function: Callable[[], Any], then: Callable[[Any], None]) -> None:
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

    def _go_on(self, clearing: _Clearing) -> None:
        """Remove the next files; when there are none left, forget the history."""
        keys, blobs = clearing.keys[-_AT_ONCE:], clearing.blobs[-_AT_ONCE:]
        del clearing.keys[-_AT_ONCE:], clearing.blobs[-_AT_ONCE:]

        def remove() -> None:
            for key in keys:
                self._disk.remove(key)
            for name in blobs:
                self._disk.remove_blob(name)

        def removed(result: None) -> None:
            for key in keys:
                if not self._disk.contains(key):
                    self._order.discard(key)
            self._go_on(clearing)

        if keys or blobs:
            self._submit(clearing, remove, removed)
            return
        freed = clearing.freed + max(0, clearing.before - self._disk.used_bytes)
        if clearing.message.history:
            self._forget()  # somebody may have looked into it since
            self._history.clear(lambda byte_count, failed: self._answer(clearing, freed + byte_count, failed))
        else:
            self._answer(clearing, freed, None)

    def _answer(self, clearing: _Clearing, byte_count: int, error: BaseException | None) -> None:
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
