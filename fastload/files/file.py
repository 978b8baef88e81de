"""An open object as a file: seekable, read-only, binary.

`ObjectFile` is a `BufferedReader`, so that small reads cost a copy of a few bytes, and everything that takes an open
file takes it. Under it is a raw file, which copies from chunks in the arena. It watches in which order it is read, and
has what is expected on its way (`sequential`; in halves of a chunk, so that a file that is read from its start is known
for that before its second chunk is needed).
"""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING

import numpy as np

from fastload.callers import public
from fastload.client.attached import OpenedObject
from fastload.files.connection import Bytes, Connection
from fastload.files.sequential import Streams

if TYPE_CHECKING:
    from typing_extensions import Buffer

# Reads below this are served from one copy: that many bytes take ten microseconds, as much as the calls around them.
_BUFFER_BYTES = 64 << 10
# Chunks that one file has on its way: eight of 8 MiB hide 20 ms at 800 MB/s.
_AHEAD_MAX = 8
# Chunks that one file keeps because it has stopped in the middle of them: as many streams go on without a message.
_KEPT_MAX = 4
_UNITS = 2  # of a chunk


class RawObject(io.RawIOBase):
    """The raw file under an `ObjectFile`. Not for several threads."""

    def __init__(self, connection: Connection, opened: OpenedObject) -> None:
        super().__init__()
        self.name, self.size = opened.info.url, opened.info.size
        self.mode = "rb"
        self._connection, self._opened = connection, opened
        self._chunk_bytes = connection.chunk_bytes
        self._unit_bytes = self._chunk_bytes // _UNITS
        self._position = 0
        self._streams = Streams(-(-self.size // self._unit_bytes))
        self._ahead: set[int] = set()  # chunks that are on their way
        self._kept: dict[int, None] = {}  # chunks in whose middle it has stopped, the oldest first

    def readable(self) -> bool:
        """It is, while it is open."""
        self._check_open()
        return True

    def seekable(self) -> bool:
        """It is, while it is open."""
        self._check_open()
        return True

    def tell(self) -> int:
        """The position."""
        self._check_open()
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Move; beyond the end is allowed, as in other files."""
        self._check_open()
        bases = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}
        if whence not in bases:
            raise ValueError(f"whence={whence!r} must be os.SEEK_SET, os.SEEK_CUR or os.SEEK_END")
        position = bases[whence] + offset
        if position < 0:
            raise ValueError(f"{self.name}: seek to {position}, before the beginning")
        self._position = position
        return position

    @public
    def readinto(self, buffer: Buffer, /) -> int:
        """Fill the buffer, or what of it the object fills; the errors of the store."""
        self._check_open()
        view = memoryview(buffer).cast("B")
        count = min(len(view), max(0, self.size - self._position))
        if count == 0:
            return 0
        out = np.frombuffer(view, np.uint8)
        end = self._position + count
        self._streams.saw(self._position // self._unit_bytes, (end - 1) // self._unit_bytes)
        index_last, done = (end - 1) // self._chunk_bytes, 0
        while done < count:
            index = self._position // self._chunk_bytes
            length = min(count - done, (index + 1) * self._chunk_bytes - self._position)
            self._expect(index, index_last)
            self._copy(index, out[done : done + length])
            self._position += length
            self._leave(index)
            done += length
        return count

    def readall(self) -> bytes:
        """All from the position on."""
        self._check_open()
        count = max(0, self.size - self._position)
        if count == 0:
            return b""
        room = io.BytesIO()  # the one thing that makes bytes out of memory that was written to, without a copy
        room.seek(count - 1)
        room.write(b"\0")
        view = room.getbuffer()
        self.readinto(view)
        view.release()
        return room.getvalue()

    def close(self) -> None:
        """Close. What is leased for it is given back soon."""
        if not self.closed:
            left = self._ahead | self._kept.keys()
            if left:
                self._connection.abandon(self._opened, left)
            del self._connection
        super().close()

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError(f"I/O operation on closed file {self.name}")

    def _expect(self, index: int, index_last: int) -> None:
        """Have on its way what is read next: the rest of this read, and then what is expected after it."""
        units = self._streams.ahead(_UNITS * _AHEAD_MAX)
        if index == index_last and not units and not self._ahead:
            return
        rest = range(index + 1, min(index_last, index + _AHEAD_MAX) + 1)
        expected = dict.fromkeys([*rest, *(unit // _UNITS for unit in units)])
        expected.pop(index, None)
        expected_next = list(expected)[:_AHEAD_MAX]
        stale = self._ahead.difference(expected_next, (index,))
        if stale:
            self._connection.release(self._opened, stale)
            self._ahead -= stale
        if not self._ahead.issuperset(expected_next):
            self._ahead |= self._connection.want(self._opened, expected_next)

    def _copy(self, index: int, out: Bytes) -> None:
        """Fill `out` from the chunk that the position is in."""
        with self._connection.acquire(self._opened, index) as held:
            arena, _, offsets = held.groups[0]
            start = int(offsets[0]) + self._position - index * self._chunk_bytes
            out[:] = arena[start : start + len(out)]
        self._ahead.discard(index)

    def _leave(self, index: int) -> None:
        """The position has moved on in, or out of, this chunk."""
        if self._position == min(self.size, (index + 1) * self._chunk_bytes):
            self._kept.pop(index, None)
            self._connection.release(self._opened, [index])
        elif index not in self._kept:
            if len(self._kept) == _KEPT_MAX:
                oldest = next(iter(self._kept))
                del self._kept[oldest]
                self._connection.release(self._opened, [oldest])
            self._kept[index] = None
            self._connection.keep(self._opened, index)


class ObjectFile(io.BufferedReader):
    """One object of a store, read through the node's cache. See `fastload.open`."""

    raw: RawObject

    def __init__(self, raw: RawObject) -> None:
        super().__init__(raw, _BUFFER_BYTES)

    @property
    def url(self) -> str:
        """Where the object is; a local file's absolute path."""
        return self.raw.name

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.raw.size
