"""How large packed objects are unpacked, which has to be known before they are planned.

What an object says of itself is believed only where it is true of all of it. The end of gzip says how large the last
member is, and nothing but inflating shows whether it is the only one: all of it is unpacked, and counted. So are
objects of other kinds, and small ones. Of zstd the heads of all frames are read, and of their blocks, which say where
the next one begins (`formats.zstd.unpacked_bytes`): all is fetched, and nothing is unpacked. What is found is stored by
those who ask (`queries`), so a node pays for it once.

Used by threads of the pools; all state is under one lock.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait

from fastload import unpacker
from fastload.errors import ShardError, StoreUnavailableError
from fastload.formats import zstd
from fastload.service.unpacking import Unpacking
from fastload.service.unpacking_children import PART_BYTES, Part, bomb
from fastload.store import watch
from fastload.store.packing import FRAMES, is_bomb, packing_of
from fastload.store.types import ObjectInfo

_AT_ONCE = 16
# Up to here an object is unpacked, which keeps what is in it for those who read it next.
_SMALL_BYTES = 1 << 18


class UnpackedSizes:
    """See the module's text."""

    def __init__(self, unpacking: Unpacking) -> None:
        self._unpacking = unpacking
        self._lock = threading.Lock()
        self._found: dict[tuple[str, ObjectInfo], Future[int | ShardError]] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._is_closed = False

    def of(self, key: str, infos: Sequence[ObjectInfo], patience_s: float) -> list[int | ShardError | None]:
        """The unpacked sizes of these packed objects; what is wrong with one instead; None where it is not known after
        that time, and may be asked for again. Raises the store's errors.

        What is wrong is remembered until that object is asked for alone, so that who wants to know it waits no more.
        """
        with self._lock:
            if self._is_closed:
                raise StoreUnavailableError("the cache service ends")
            if self._pool is None:
                self._pool = ThreadPoolExecutor(_AT_ONCE, "fastload-unpacked-size")
            for info in infos:
                if (key, info) not in self._found:
                    self._found[key, info] = self._pool.submit(self._size_of, key, info)
            futures = [self._found[key, info] for info in infos]
        wait(futures, patience_s, FIRST_EXCEPTION)
        with self._lock:
            for info, future in zip(infos, futures, strict=True):
                if future.done() and (len(infos) == 1 or not _is_bad(future)):
                    self._found.pop((key, info), None)
        return [future.result() if future.done() else None for future in futures]

    def _size_of(self, key: str, info: ObjectInfo) -> int | ShardError:
        packing, info = info.packing or packing_of(info.url), info.stored
        if not info.size:
            return ShardError(f"{info.url} is empty, and nothing packs to that; upload it again")
        try:
            size = self._said(key, info, packing)
            if size is not None and is_bomb(info.size, size):
                raise bomb(info, size)
            return self._unpacking.measure(key, info, packing) if size is None else size
        except ShardError as error:
            return error

    def _said(self, key: str, info: ObjectInfo, packing: str) -> int | None:
        """What an object says that is true of all of it; None where it says nothing, and where zstd is damaged:
        unpacking shows where.
        """
        part = self._unpacking.children.part_of(key, info, lambda: watch.Watch(lambda attempt: None))
        if packing == FRAMES:
            return _framed_size(info, part)
        if packing != "zstd" or info.size <= _SMALL_BYTES:
            return None
        return zstd.unpacked_bytes(info.size, lambda start: part(start, min(PART_BYTES, info.size - start)))

    def close(self) -> None:
        """No more begin; those under way end with `Unpacking`. Idempotent."""
        with self._lock:
            self._is_closed = True
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)


def _is_bad(future: Future[int | ShardError]) -> bool:
    return future.exception() is None and isinstance(future.result(), ShardError)


def _framed_size(info: ObjectInfo, part: Part) -> int:
    """How large a chunk of LitData is whose items are packed in frames, as its head says."""
    try:
        return unpacker.framed_size(info.size, part)
    except unpacker.DamagedError as error:
        raise ShardError(
            f"{info.url} is no chunk that is packed in frames, as its index says: {error}; upload it again"
        ) from error
