"""`fastload.open`: an object as a file, seekable, read-only and binary.

`ObjectFile` is a `BufferedReader`, so that small reads cost a copy of a few bytes, and everything that takes an open
file takes it. Under it is a raw file, which copies from chunks in the arena. It observes the order of its reads, and
has the chunks that they predict fetched ahead (`readahead`; in halves of a chunk, so that a file that is read from its
start is recognised before its second chunk is needed).

A process has one `ChunkReader` for each cache, set of storage options and environment (what variables say of stores),
made at the first file and shared by all threads. It is found again through the cache's handle. A forked child makes its
own.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fastload.callers import public
from fastload.client.attached import OpenedObject
from fastload.client.cache import AnyCache, Handle, handle_of
from fastload.errors import ConfigError, ObjectMissingError
from fastload.files.chunks import Bytes, ChunkReader
from fastload.files.readahead import Streams
from fastload.store.environment import fingerprint
from fastload.store.logins import apart
from fastload.store.urls import check_key, check_written, normalise

if TYPE_CHECKING:
    from typing_extensions import Buffer

# Reads below this are served from one copy: that many bytes take ten microseconds, as much as the calls around them.
_BUFFER_BYTES = 64 << 10
# Chunks that one file wants ahead: eight of 8 MiB hide 20 ms at 800 MB/s.
_AHEAD_MAX = 8
# Chunks that one file keeps because it has stopped in the middle of them: as many streams go on without a message.
_KEPT_MAX = 4
_UNITS = 2  # of a chunk


class RawObject(io.RawIOBase):
    """The raw file under an `ObjectFile`. Not for several threads."""

    def __init__(self, chunks: ChunkReader, opened: OpenedObject) -> None:
        super().__init__()
        self.name, self.size = opened.info.url, opened.info.size
        self.mode = "rb"
        self._chunks, self._opened = chunks, opened
        self._chunk_bytes = chunks.chunk_bytes
        self._unit_bytes = self._chunk_bytes // _UNITS
        self._position = 0
        self._streams = Streams(-(-self.size // self._unit_bytes))
        self._ahead: set[int] = set()  # chunks that are wanted ahead
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
                self._chunks.abandon(self._opened, left)
            del self._chunks
        super().close()

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError(f"I/O operation on closed file {self.name}")

    def _expect(self, index: int, index_last: int) -> None:
        """Want ahead what is read next: the rest of this read, and then what is expected after it."""
        units = self._streams.ahead(_UNITS * _AHEAD_MAX)
        if index == index_last and not units and not self._ahead:
            return
        rest = range(index + 1, min(index_last, index + _AHEAD_MAX) + 1)
        expected = dict.fromkeys([*rest, *(unit // _UNITS for unit in units)])
        expected.pop(index, None)
        expected_next = list(expected)[:_AHEAD_MAX]
        stale = self._ahead.difference(expected_next, (index,))
        if stale:
            self._chunks.release(self._opened, stale)
            self._ahead -= stale
        if not self._ahead.issuperset(expected_next):
            self._ahead |= self._chunks.want(self._opened, expected_next)

    def _copy(self, index: int, out: Bytes) -> None:
        """Fill `out` from the chunk that the position is in."""
        with self._chunks.acquire(self._opened, index) as held:
            arena, _, offsets = held.groups[0]
            start = int(offsets[0]) + self._position - index * self._chunk_bytes
            out[:] = arena[start : start + len(out)]
        self._ahead.discard(index)

    def _leave(self, index: int) -> None:
        """The position has moved on in, or out of, this chunk."""
        if self._position == min(self.size, (index + 1) * self._chunk_bytes):
            self._kept.pop(index, None)
            self._chunks.release(self._opened, [index])
        elif index not in self._kept:
            if len(self._kept) == _KEPT_MAX:
                oldest = next(iter(self._kept))
                del self._kept[oldest]
                self._chunks.release(self._opened, [oldest])
            self._kept[index] = None
            self._chunks.keep(self._opened, index)


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


@public
def open(  # noqa: A001  # as those of gzip and tarfile
    url: str | os.PathLike[str],
    cache: AnyCache = None,
    *,
    storage_options: Mapping[str, Any] | None = None,
) -> ObjectFile:
    """One object as a file that is read through the node's cache: binary, read-only, seekable.

    `url`: of one object, taken as it is (no patterns), or a local path. `cache`: a `fastload.Cache`, or its directory;
    without one, `$FASTLOAD_CACHE` or the user's cache directory. `storage_options`: as for `StreamingDataset`.

    It reads the version of the object that was there when it was opened: `ObjectChangedError` where bytes that are not
    cached are of another by then. A node asks the store for an object's version once an hour at most. Opening costs a
    message to the cache service, and nothing where this process opened the object in the last minute; so a map-style
    data set may open one in each `__getitem__`, also in worker processes, however they are started.

    An object takes whole chunks of the cache's memory, a small one as much as a large one's part. While it is read in
    some order (forward, backward, in steps, several of these at once) what follows is fetched ahead.

    `size` is the object's size, and `url` its URL. Any number of files may be open, in any thread, also of one object.
    Raises `ObjectMissingError`, which is a `FileNotFoundError`, and the other errors of `fastload.errors`.
    """
    handle = handle_of(_checked_cache(cache))
    (name,), storage_options = apart([_checked(url)], storage_options)
    key = "fastload.open", _options_key(storage_options), fingerprint()
    chunks = handle.shared(key, _ReaderHolder).reader(handle, storage_options)
    try:
        return ObjectFile(RawObject(chunks, chunks.open(name)))
    except ObjectMissingError:
        if os.path.isdir(name):
            raise ObjectMissingError(f"{os.fspath(url)} is a folder; name one object in it") from None
        raise


class _ReaderHolder:
    """Where a handle keeps its reader for one set of options."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reader: ChunkReader | None = None

    def reader(self, cache: Handle, storage_options: Mapping[str, Any] | None) -> ChunkReader:
        """The reader, or another where it is spent; files that are open keep the one they have."""
        with self._lock:
            if self._reader is None or self._reader.is_spent:
                self._reader = ChunkReader(cache, storage_options)
            return self._reader


def _checked(url: str | os.PathLike[str]) -> str:
    if not isinstance(url, str | os.PathLike) or not os.fspath(url):
        raise ConfigError(f"{url!r} is not a URL or path; write s3://bucket/key or /data/file")
    if "\0" in str(os.fspath(url)):
        raise ConfigError(f"{os.fspath(url)!r} has a zero byte in it, which no object's name has")
    check_written(str(os.fspath(url)))
    check_key(str(os.fspath(url)))
    name = normalise(str(os.fspath(url)))
    if name.endswith("/"):
        raise ConfigError(f"{os.fspath(url)}: a folder cannot be opened; name one object in it")
    return name


def _options_key(storage_options: Mapping[str, Any] | None) -> str:
    if not isinstance(storage_options, Mapping):  # what is none either is refused where it is read
        return "" if not storage_options else repr(storage_options)
    return repr(sorted(storage_options.items(), key=repr)) if storage_options else ""


def _checked_cache(cache: AnyCache) -> AnyCache:
    if isinstance(cache, str) and cache in _MODES:  # what `open` of Python takes second would become a directory here
        raise ConfigError(
            f"cache={cache!r} looks like a mode, and none is taken: files are binary and read-only; "
            f"leave it out, or write a cache directory of that name as ./{cache}"
        )
    return cache


_MODES = frozenset({"r", "rb", "rt", "r+", "rb+", "r+b", "w", "wb", "wt", "w+", "wb+", "w+b", "a", "ab", "x", "xb"})
