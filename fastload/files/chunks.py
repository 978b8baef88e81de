"""The chunks of all open files of a process: which objects are open, what is leased, and what is wanted ahead.

A lease is pinned while bytes are copied. It is kept longer only where a file has stopped in the middle of a chunk,
since it will mostly go on there; a few of these at most, in the order of their use. Chunks that files expect to need
are wanted ahead, within a budget that all files of the process share. What is kept can be recalled by the service.

Safe to use from several threads. Files that are dropped may be collected under any lock, so what they leave is given
back by another thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastload import shares
from fastload.client.attached import OpenedObject
from fastload.client.cache import Handle
from fastload.client.leases import Held
from fastload.errors import ObjectChangedError, ServiceError
from fastload.history.library import OPENING
from fastload.lifecycle import call_later, on_drop, reset_on_fork
from fastload.store.urls import scheme

Bytes = npt.NDArray[np.uint8]

# Objects on a consumer's list. Each costs the service about a kilobyte while the list is in use; a new list costs a
# millisecond.
_OBJECTS_MAX = 16_384
# How long the version of an object is taken as known without asking the service, which may ask the store.
_KNOWN_S = 60.0
# Chunks that stay leased because a file has stopped in the middle of them.
_KEPT_MAX = 8
# Chunks asked for ahead, for all files together; and of the arena at most this part.
_AHEAD_MAX = 32
_AHEAD_SHARE = int(1 / shares.READ_AHEAD)


@dataclass(frozen=True, slots=True)
class _Known:
    opened: OpenedObject
    until_s: float


class ChunkReader:
    """See the module's text. It is closed when it is collected."""

    def __init__(
        self, cache: Handle, storage_options: Mapping[str, Any] | None, now: Callable[[], float] = time.monotonic
    ) -> None:
        """Connect; the errors of `Handle.consumer`."""
        self._now = now
        self._consumer = cache.consumer(storage_options, name=OPENING)
        on_drop(self, call_later, self._consumer.close)
        self.chunk_bytes = self._consumer.chunk_bytes
        self._ahead_max = max(1, min(_AHEAD_MAX, self._consumer.buffer_count // _AHEAD_SHARE))
        self._known: dict[str, _Known] = {}
        self._begin()
        reset_on_fork(self, ChunkReader._begin)

    def _begin(self) -> None:
        """What belongs to this process's leases."""
        self._lock = threading.Lock()
        self._kept: dict[int, None] = {}  # the one that was used last is the last
        self._ahead: set[int] = set()

    @property
    def is_spent(self) -> bool:
        """Whether files to come need another one."""
        return self._consumer.is_ended or self._consumer.object_count >= _OBJECTS_MAX

    def open(self, url: str) -> OpenedObject:
        """The object at `url`, which is normalised; the store's errors."""
        known = self._known.get(url)
        if known is not None and self._now() < known.until_s:
            return known.opened
        opened = self._consumer.open(url)
        if known is not None and known.opened.info == opened.info:
            opened = known.opened  # so that its chunks have one number
        is_local = scheme(url) == "file"  # looking at a file costs nothing, and files are written to more often
        self._known[url] = _Known(opened, self._now() + (0 if is_local else _KNOWN_S))
        return opened

    def acquire(self, opened: OpenedObject, index: int) -> Held:
        """Wait for a chunk of an object and pin it."""
        chunk = opened.first_chunk + index
        try:
            held = self._consumer.acquire([chunk])
        except ObjectChangedError:
            self._known.pop(opened.info.url, None)
            raise
        with self._lock:
            self._ahead.discard(chunk)
        return held

    def keep(self, opened: OpenedObject, index: int) -> None:
        """A file has stopped in the middle of this chunk."""
        chunk = opened.first_chunk + index
        with self._lock:
            self._kept.pop(chunk, None)
            self._kept[chunk] = None
            spare = next(iter(self._kept)) if len(self._kept) > _KEPT_MAX else None
            if spare is not None:
                del self._kept[spare]
        if spare is not None:
            self._consumer.release([spare])

    def want(self, opened: OpenedObject, indexes: Iterable[int]) -> set[int]:
        """Have these on their way, as far as the budget goes; those that are."""
        with self._lock:
            wanted, asked = set(), []
            for index in indexes:
                chunk = opened.first_chunk + index
                if chunk not in self._ahead and chunk not in self._kept:
                    if len(self._ahead) >= self._ahead_max:
                        break
                    self._ahead.add(chunk)
                    asked.append(chunk)
                wanted.add(index)
        if asked:
            self._consumer.want(asked)
        return wanted

    def release(self, opened: OpenedObject, indexes: Iterable[int]) -> None:
        """Give these back, and no longer want them."""
        chunks = [opened.first_chunk + index for index in indexes]
        with self._lock:
            for chunk in chunks:
                self._kept.pop(chunk, None)
                self._ahead.discard(chunk)
        if chunks:
            self._consumer.release(chunks)

    def abandon(self, opened: OpenedObject, indexes: set[int]) -> None:
        """Release these soon. Takes no lock and never waits: for files that are collected."""
        call_later(self._release_left, opened, indexes)

    def _release_left(self, opened: OpenedObject, indexes: set[int]) -> None:
        try:
            self.release(opened, indexes)
        except ServiceError:
            if not self._consumer.is_ended:
                raise
            # It was closed meanwhile, and with it all that it held.
