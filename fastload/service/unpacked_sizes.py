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
from dataclasses import dataclass

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


@dataclass(eq=False, slots=True)
class _Size:
    """The size of an object that is found out, or has been, and how many `Question`s want to know it."""

    found: Future[int | ShardError]
    asked_count: int = 0


@dataclass(frozen=True, slots=True)
class Question:
    """Objects whose sizes are wanted, all with one set of options; `UnpackedSizes.forget` ends it."""

    key: str
    infos: Sequence[ObjectInfo]


class UnpackedSizes:
    """See the module's text."""

    def __init__(self, unpacking: Unpacking) -> None:
        self._unpacking = unpacking
        self._lock = threading.Lock()
        self._sizes: dict[tuple[str, ObjectInfo], _Size] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._is_closed = False

    def ask(self, key: str, infos: Sequence[ObjectInfo]) -> Question:
        """Begin to find out the unpacked sizes of these packed objects, where that is not under way."""
        with self._lock:
            if self._is_closed:
                raise StoreUnavailableError("the cache service ends")
            if self._pool is None:
                self._pool = ThreadPoolExecutor(_AT_ONCE, "fastload-unpacked-size")
            for info in infos:
                if (key, info) not in self._sizes:
                    self._sizes[key, info] = _Size(self._pool.submit(self._size_of, key, info))
                self._sizes[key, info].asked_count += 1
        return Question(key, infos)

    def wait(self, question: Question, patience_s: float) -> list[int | ShardError | None]:
        """The sizes; what is wrong with an object instead; None where that is not known after this time, and may be
        asked for again. Raises the store's errors.
        """
        with self._lock:
            futures = [self._sizes[question.key, info].found for info in question.infos]
        wait(futures, patience_s, FIRST_EXCEPTION)
        return [future.result() if future.done() else None for future in futures]

    def forget(self, question: Question) -> None:
        """End a question that was answered and whose sizes were stored. A size is kept while another question waits for
        it, so that no object is measured twice. An error is kept until its object is asked for alone, so that the
        consumer that wants to read it need not wait again.
        """
        is_alone = len(question.infos) == 1
        with self._lock:
            for info in question.infos:
                size = self._sizes[question.key, info]
                size.asked_count -= 1
                if not size.asked_count and size.found.done() and (is_alone or not _is_bad(size.found)):
                    del self._sizes[question.key, info]

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
