"""An image: the memory in which a trainer has laid out what it saves, as the service holds it."""

from __future__ import annotations

import contextlib
import fcntl
import stat
from collections.abc import Sequence

from fastload.cache import syscalls
from fastload.errors import ServiceError
from fastload.store.filemap import FileMap


class Image:
    """Read-only. The trainer does not write to it until it was given back."""

    def __init__(self, fd: int, byte_count: int, segments: Sequence[tuple[int, int]], record: tuple[int, int]) -> None:
        """`fd` is ours to close, also where this raises ServiceError: it is no sealed memory of that size. `segments`
        and `record`, the part record, are where they begin and how long they are.
        """
        self.fd, self.byte_count, self.segments = fd, byte_count, tuple(segments)
        self._record = record
        self._map: FileMap | None = None
        try:
            for start, size in (*segments, record):
                if not (0 <= start <= byte_count and 0 <= size <= byte_count - start):
                    raise ServiceError(f"an image of {byte_count} bytes is said to have {size} from {start} on")
            status = syscalls.fstat(fd)
            # Memory that can be cut off would end this process when it is read.
            is_sealed = stat.S_ISREG(status.st_mode) and syscalls.get_seals(fd) & fcntl.F_SEAL_SHRINK
            if status.st_uid != syscalls.geteuid() or status.st_size != byte_count or not is_sealed:
                raise ServiceError(f"an image is no sealed memory of {byte_count} bytes")
            self._map = FileMap(fd, byte_count)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError | ValueError):
                raise ServiceError(f"an image of {byte_count} bytes cannot be mapped: {error}") from error
            raise

    def segment(self, number: int) -> memoryview:
        """Its bytes, which are all going to be read."""
        start, size = self.segments[number]
        assert self._map is not None
        self._map.populate(start, size)
        return self._part(start, size)

    def record(self) -> bytes:
        """The part record as the trainer has left it."""
        return bytes(self._part(*self._record))

    def _part(self, start: int, size: int) -> memoryview:
        assert self._map is not None
        return memoryview(self._map)[start : start + size]

    def close(self) -> None:
        """Let go of it, at once or when the last that is read of it goes. May be called twice."""
        mapping, self._map = self._map, None
        if mapping is not None:
            with contextlib.suppress(BufferError):
                mapping.close()
        fd, self.fd = self.fd, -1
        if fd >= 0:
            syscalls.close(fd)
