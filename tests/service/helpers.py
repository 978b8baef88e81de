"""What the service's tests share: some objects with known bytes, and a consumer's way through them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from fastload.client import Consumer, Held
from fastload.client.attached import chunk_starts
from fastload.errors import FastloadError, ObjectChangedError, ObjectMissingError
from fastload.store.types import ObjectInfo
from tests.patience import PATIENCE_S

CHUNK_BYTES = 64 << 10


def random_bytes(seed: int, size: int) -> bytes:
    """`size` bytes that `seed` stands for."""
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8).tobytes()


@dataclass
class FakeStore:
    """Objects in memory. `hold` chunks are not answered until `release` says so; `errors` are raised, by URL."""

    contents: dict[str, bytes] = field(default_factory=dict)
    reads: list[tuple[str, int]] = field(default_factory=list)
    errors: dict[str, FastloadError] = field(default_factory=dict)
    before_read: Callable[[str, int], None] = lambda url, start: None

    def put(self, name: str, data: bytes) -> ObjectInfo:
        """Store an object; gives its info."""
        url = f"s3://fake/{name}"
        self.contents[url] = data
        return self.head(url)

    def list(self, prefix_url: str) -> Iterator[ObjectInfo]:
        """All objects under the prefix."""
        return iter([self.head(url) for url in sorted(self.contents) if url.startswith(prefix_url)])

    def head(self, url: str) -> ObjectInfo:
        """The object."""
        if url not in self.contents:
            raise ObjectMissingError(f"{url} is not there")
        return ObjectInfo(url, len(self.contents[url]), etag=f'"{hash(self.contents[url]):x}"')

    def read_into(self, info: ObjectInfo, start: int, out: memoryview) -> None:
        """Fill `out`."""
        self.reads.append((info.url, start))
        self.before_read(info.url, start)
        if info.url in self.errors:
            raise self.errors[info.url]
        if info.etag is not None and info != FakeStore.head(self, info.url):
            raise ObjectChangedError(f"{info.url} is another by now")
        out[:] = self.contents[info.url][start : start + len(out)]

    def close(self) -> None:
        """Nothing to let go of."""


def chunks_of(objects: Sequence[ObjectInfo], number: int, chunk_bytes: int = CHUNK_BYTES) -> list[int]:
    """The chunk numbers of object `number`."""
    starts = chunk_starts([info.size for info in objects], chunk_bytes)
    return list(range(int(starts[number]), int(starts[number + 1])))


def contents(held: Held, chunk_bytes: int = CHUNK_BYTES) -> dict[int, bytes]:
    """A copy of what is held, by chunk number; the last chunk of an object has bytes of no meaning at its end."""
    found = {}
    for arena, chunk_nos, offsets in held.groups:
        for chunk_no, offset in zip(chunk_nos.tolist(), offsets.tolist(), strict=True):
            found[chunk_no] = arena[offset : offset + chunk_bytes].tobytes()
    return found


def read(consumer: Consumer, chunk_nos: Iterable[int], deadline_s: float = PATIENCE_S) -> dict[int, bytes]:
    """Acquire chunks until all have been here once; they stay leased."""
    left = set(chunk_nos)
    found: dict[int, bytes] = {}
    while left:
        with consumer.acquire(sorted(left), deadline_s) as held:
            found.update(contents(held, consumer.chunk_bytes))
        left -= set(found)
    return found


def read_object(consumer: Consumer, objects: Sequence[ObjectInfo], number: int) -> bytes:
    """A whole object through the cache; its leases are given back."""
    chunk_nos = chunks_of(objects, number, consumer.chunk_bytes)
    found = read(consumer, chunk_nos)
    consumer.release(chunk_nos)
    return b"".join(found[chunk_no] for chunk_no in chunk_nos)[: objects[number].size]


def read_epoch(consumer: Consumer, objects: Sequence[ObjectInfo], order: Sequence[int], epoch: int = 0) -> list[bytes]:
    """All objects in `order`, by a plan, advancing with each."""
    consumer.set_plan(order, epoch)
    found, position = [], 0
    for number in order:
        found.append(read_object(consumer, objects, number))
        position += len(chunks_of(objects, number, consumer.chunk_bytes))
        consumer.advance(position)
    return found


def eventually(true: Callable[[], bool], what: str, deadline_s: float = PATIENCE_S) -> None:
    """Wait for something that no event tells of."""
    deadline = time.monotonic() + deadline_s
    while not true():
        assert time.monotonic() < deadline, f"gave up waiting until {what}"
        time.sleep(0.01)


def service_pid(consumer: Consumer) -> int:
    """The process that serves."""
    return int(consumer.stats()["node"]["pid"])


def kill_service(consumer: Consumer) -> int:
    """kill -9 the service; returns its process id."""
    pid = service_pid(consumer)
    os.kill(pid, signal.SIGKILL)
    return pid
