"""What indexers have in common (see `formats.Indexer`): those that read all of a shard, and those of its head."""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fastload.errors import ShardError


class WholeIndexer(ABC):
    """An `Indexer` that reads all of a shard, in order, without `finish`. Used by one thread."""

    def __init__(self, url: str, size: int) -> None:
        self._url, self._size = url, size
        self._at = 0

    @property
    def next_offset(self) -> int:
        """The offset of the next byte that is needed; the object's size once none is."""
        return self._at

    @property
    def done(self) -> bool:
        """Whether no more bytes are needed."""
        return self._at >= self._size

    def feed(self, chunk: NDArray[np.uint8], start: int) -> None:
        """Read `chunk`, which lies at `start` in the object. ShardError: no such shard."""
        if start != self._at:
            raise ShardError(f"{self._url}: bytes from {start} came where those from {self._at} were needed")
        self._read(chunk, start)
        self._at += len(chunk)

    @abstractmethod
    def _read(self, chunk: NDArray[np.uint8], start: int) -> None:
        """See `feed`."""


class HeadIndexer(ABC):
    """An `Indexer` of the head of a shard of records, as MDS and LitData have it: how many there are, where each begins
    and the last ends, all u32, and what else lies before the first. Without `finish`. Used by one thread.
    """

    kind: ClassVar[str]
    each: ClassVar[str]  # what a record is called

    def __init__(self, url: str, size: int) -> None:
        """ShardError for an empty object."""
        if size < 8:
            raise ShardError(f"{url}: {size} bytes are no {self.kind}; upload it again")
        self._url, self._size = url, size
        self._head = bytearray()
        self._head_bytes = -1  # not known yet
        self._needed = 8  # bytes from the start

    @property
    def next_offset(self) -> int:
        """The offset of the next byte that is needed; the object's size once none is."""
        return self._size if self.done else len(self._head)

    @property
    def done(self) -> bool:
        """Whether no more bytes are needed."""
        return len(self._head) >= self._needed

    @abstractmethod
    def _check_start(self, count: int, first: int) -> None:
        """ShardError where a shard cannot begin so: with as many records, the first of them there."""

    def feed(self, chunk: NDArray[np.uint8], start: int) -> None:
        """Read `chunk`, which lies at `start` in the object. ShardError: no such shard."""
        at = len(self._head)
        if not start <= at < start + len(chunk):
            raise ShardError(f"{self._url}: bytes from {start} came where those from {at} were needed")
        self._head += chunk[at - start : at - start + self._needed - at].data
        if self.done and self._head_bytes < 0:
            count, first = struct.unpack_from("<II", self._head)
            self._check_start(count, first)
            self._needed = self._head_bytes = first
            self._head += chunk[8 - start : first - start].data

    def _ends(self) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
        """Where records begin, and last where they end; and their sizes. ShardError where one ends before it begins."""
        (count,) = struct.unpack_from("<I", self._head)
        ends = np.frombuffer(self._head, "<u4", count + 1, 4).astype(np.int64)
        sizes = np.diff(ends)
        if len(sizes) and sizes.min() < 0:
            wrong = int(sizes.argmin())
            raise ShardError(
                f"{self._url}: {self.each} {wrong} ends at byte {ends[wrong + 1]}, before it begins; write it again"
            )
        return ends, sizes.astype(np.uint32)
