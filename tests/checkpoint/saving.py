"""A small save of two ranks, and a store in memory in which each step can be made to wait or to be the last."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
from typing_extensions import Buffer

from fastload.checkpoint import attempts
from fastload.checkpoint.attempts import Place
from fastload.checkpoint.boxes import Box
from fastload.checkpoint.commit import Step
from fastload.checkpoint.records import Part, object_name
from fastload.checkpoint.segments import Piece, checksums, damaged_block, lay_out
from fastload.errors import ObjectChangedError, ObjectMissingError, WriteConflictError
from fastload.store import ObjectInfo

RANKS = 2
SHAPE = (RANKS, 5)


class Stopped(BaseException):  # what it would be if the process had been killed
    """The process ends here."""


class MemoryStore:
    """`before` is called before each operation with its name and URL, and may wait or raise."""

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, ObjectInfo]] = {}
        self.before: Callable[[str, str], None] = lambda operation, url: None
        self.versions = iter(range(1, 1 << 30))
        self.now_s = 1000.0
        self.lock = threading.Lock()

    def list(self, prefix_url: str) -> Iterator[ObjectInfo]:
        self.before("list", prefix_url)
        with self.lock:
            yield from [info for url, (_, info) in sorted(self.objects.items()) if url.startswith(prefix_url)]

    def head(self, url: str) -> ObjectInfo:
        self.before("head", url)
        with self.lock:
            if url not in self.objects:
                raise ObjectMissingError(f"{url}: no such object")
            return self.objects[url][1]

    def read_into(self, info: ObjectInfo, start: int, out: memoryview) -> None:
        self.before("read", info.url)
        with self.lock:
            data, now = self.objects.get(info.url, (b"", None))
            if now is None:
                raise ObjectMissingError(f"{info.url}: no such object")
            if now != info:
                raise ObjectChangedError(f"{info.url}: changed")
            out[:] = data[start : start + len(out)]

    def put(self, url: str, data: Buffer) -> str | None:
        self.before("put", url)
        with self.lock:
            return self._stored(url, data)

    def put_if_absent(self, url: str, data: Buffer) -> str | None:
        self.before("put_if_absent", url)
        with self.lock:
            if url in self.objects:
                raise WriteConflictError(f"{url}: it is there already")
            return self._stored(url, data)

    def put_if_match(self, url: str, data: Buffer, etag: str) -> str | None:
        self.before("put_if_match", url)
        with self.lock:
            if url not in self.objects or self.objects[url][1].etag != etag:
                raise WriteConflictError(f"{url}: it is another version")
            return self._stored(url, data)

    def delete(self, url: str) -> None:
        self.before("delete", url)
        with self.lock:
            self.objects.pop(url, None)

    def close(self) -> None:
        pass

    def _stored(self, url: str, data: Buffer) -> str:
        info = ObjectInfo(url, memoryview(data).nbytes, f'"{next(self.versions)}"', int(self.now_s * 1e9))
        self.objects[url] = bytes(data), info
        assert info.etag is not None
        return info.etag


def values(content: int) -> np.ndarray:  # type: ignore[type-arg]
    return np.arange(RANKS * 5, dtype=np.float32).reshape(SHAPE) + content


def save_rank(place: Place, attempt: str, rank: int, content: int) -> None:
    (segment,) = lay_out([Piece("w", "F32", SHAPE, Box((rank, 0), (1, 5)))])
    data = segment.header + values(content)[rank].tobytes()
    place.store.put(place.folder + object_name(attempt, rank, 0), data)
    attempts.finish_rank(place, Part.of(attempt, rank, [(segment, checksums([memoryview(data)]))]))


def save(place: Place, content: int, *, overwrite: bool = False) -> Step:
    """One process that does what its ranks would."""
    plan = attempts.begin(place, RANKS, overwrite=overwrite, now_s=time.time())
    for rank in range(RANKS):
        save_rank(place, plan.attempt, rank, content)
    return attempts.commit(place, plan.attempt)


def load(place: Place) -> int | None:
    """The content that was saved, all of it verified; None where there is no checkpoint."""
    try:
        there = attempts.contents(place)
    except ObjectMissingError:
        return None
    found = np.zeros(SHAPE, np.float32)
    for piece in there.places("w"):
        data, _ = place.read(piece.object.name)
        assert damaged_block(piece.object.sums, 0, memoryview(data)) is None
        row = np.frombuffer(data[piece.offset : piece.offset + piece.length], np.float32).reshape(piece.box.sizes)
        found[piece.box.within(Box.whole(SHAPE))] = row
    content = int(found[0, 0])
    np.testing.assert_array_equal(found, values(content))
    return content
