"""One file as a checkpoint: anything that writes to a file object, committed when that is closed.

It is stored as one tensor of bytes, in segments that are uploaded while more is written, so that all that reads,
verifies or deletes checkpoints does so with these.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO

from fastload.checkpoint import attempts
from fastload.checkpoint.attempts import Place, opened, try_conditions
from fastload.checkpoint.boxes import Box
from fastload.checkpoint.copies import Copies
from fastload.checkpoint.reading import Wanted, requests
from fastload.checkpoint.records import Contents, Part, object_name
from fastload.checkpoint.segments import PAGE_BYTES, Piece, Segment, checksums, header_of
from fastload.client.cache import AnyCache
from fastload.errors import CheckpointError

NAME = "file"
# So much is held of each segment that is in flight, and of the one that is being written.
_SEGMENT_BYTES = 64 << 20
_IN_FLIGHT = 4
_BUFFER_BYTES = 1 << 20


@contextlib.contextmanager
def create(
    url: str | os.PathLike[str], *, overwrite: bool = False, storage_options: Mapping[str, Any] | None = None
) -> Iterator[BinaryIO]:
    """A file to write to, for `torch.save` and the like: the checkpoint at `url` once the block has ended, and nothing
    where it ended with an error. `open_file` reads it.

    Raises what `save` does.
    """
    with opened(url, storage_options) as place:
        try_conditions(place)
        plan = attempts.begin(place, 1, overwrite=overwrite, now_s=time.time())
        with ThreadPoolExecutor(_IN_FLIGHT, "fastload-checkpoint") as pool:
            file = _Written(place, plan.attempt, pool)
            try:
                yield file  # type: ignore[misc]  # a raw file has all that a writer needs
                segments = file.finish()
            finally:
                file.close()
                pool.shutdown(wait=False, cancel_futures=True)
        attempts.finish_rank(place, Part.of(plan.attempt, 0, segments))
        attempts.commit_all(place, plan.attempt)


class _Written(io.RawIOBase):
    """What is written becomes segments."""

    def __init__(self, place: Place, attempt: str, pool: ThreadPoolExecutor) -> None:
        super().__init__()
        self._place, self._attempt, self._pool = place, attempt, pool
        self._segment = bytearray(PAGE_BYTES)  # room for the header
        self._lengths: list[int] = []
        self._sums: list[Future[bytes]] = []
        self._size = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._size

    def write(self, data: Any) -> int:
        if self.closed:
            raise ValueError("this file is closed, and what was written is committed or given up")
        rest = memoryview(data).cast("B")
        count = len(rest)
        while len(rest):
            room = PAGE_BYTES + _SEGMENT_BYTES - len(self._segment)
            if room == 0:
                self._store(self._size + 1)  # there is more to come
                continue
            self._segment += rest[:room]
            self._size += min(room, len(rest))
            rest = rest[room:]
        return count

    def finish(self) -> list[tuple[Segment, bytes]]:
        """All segments, with their checksums, once they are stored."""
        self._store(self._size)
        starts = itertools.accumulate(self._lengths[:-1], initial=0)
        pieces = [_piece(self._size, *each) for each in zip(starts, self._lengths, strict=True)]
        return [
            (Segment(header_of([piece]), (piece,)), sums.result())
            for piece, sums in zip(pieces, self._sums, strict=True)
        ]

    def _store(self, size: int) -> None:
        """Begin to store the segment that is being written; the file has `size` bytes at least."""
        if len(self._sums) >= _IN_FLIGHT:
            self._sums[-_IN_FLIGHT].result()
        data, number, length = self._segment, len(self._lengths), len(self._segment) - PAGE_BYTES
        header = header_of([_piece(size, self._size - length, length)])
        assert len(header) == PAGE_BYTES
        data[:PAGE_BYTES] = header
        self._segment = bytearray(PAGE_BYTES)
        self._lengths.append(length)
        self._sums.append(self._pool.submit(self._put, number, memoryview(data)))

    def _put(self, number: int, data: memoryview) -> bytes:
        self._place.store.put(self._place.folder + object_name(self._attempt, 0, number), data)
        return checksums([data])


def _piece(size: int, start: int, length: int) -> Piece:
    return Piece(NAME, "U8", (size,), Box((start,), (length,)))


def open_file(
    url: str | os.PathLike[str], *, cache: AnyCache = None, storage_options: Mapping[str, Any] | None = None
) -> io.BufferedReader:
    """What `create` wrote at `url`, as a file to read and to seek in: every byte is verified. To be closed.

    Raises `ObjectMissingError` where no checkpoint is, and `CheckpointError` for one that `create` did not write.
    """
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(opened(url, storage_options))
        copies = stack.enter_context(Copies(cache, storage_options))
        there = attempts.contents(place)
        if (
            list(there.tensors) != [NAME]
            or there.values
            or there.tensors[NAME][0] != "U8"
            or len(there.tensors[NAME][1]) != 1
        ):
            raise CheckpointError(f"{place.folder} holds no file that create() wrote; load() reads it")
        return io.BufferedReader(_Read(place, there, copies, stack.pop_all()), _BUFFER_BYTES)
    raise AssertionError


class _Read(io.RawIOBase):
    def __init__(self, place: Place, there: Contents, copies: Copies, stack: contextlib.ExitStack) -> None:
        super().__init__()
        self._pieces = sorted(there.places(NAME), key=lambda each: each.box.offsets)
        (self._size,) = there.tensors[NAME][1]
        self._at = 0
        self._stack = stack
        self._begin = stack.enter_context(requests(place.store, place.folder, copies, self._size))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        at = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence] + offset
        if at < 0:
            raise ValueError(f"a place before the beginning of the file: {at}")
        self._at = at
        return at

    def readinto(self, buffer: Any) -> int:
        out = memoryview(buffer).cast("B")
        first = self._at
        end = max(first, min(first + len(out), self._size))
        pieces = []
        for each in self._pieces:
            start = each.box.offsets[0]
            low, high = max(first, start), min(end, start + each.length)
            if low < high:
                pieces.append(
                    Wanted(each.object, each.offset + low - start, out[low - first : high - first], lambda: None)
                )
        for future in self._begin(pieces):
            future.result()
        self._at = end
        return end - first

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._stack.close()
