"""A file in memory that knows which file it is, so that the system can send its bytes without anybody touching them."""

from __future__ import annotations

import errno
import mmap
import os

import numpy as np

_POPULATE_READ = 22  # of madvise
# In one call, which holds the interpreter's lock: for a millisecond.
_POPULATE_BYTES = 4 << 20


class FileMap(mmap.mmap):
    """All of a file, to be read. Its descriptor is its own, and open as long as any view of it is there."""

    fd: int

    def __new__(cls, fd: int, byte_count: int) -> FileMap:
        self = super().__new__(cls, fd, byte_count, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        self.fd = os.dup(fd)
        return self

    def populate(self, start: int, byte_count: int) -> None:
        """Have these bytes mapped, which takes a third of the time that faults at each page would."""
        begin = start // mmap.PAGESIZE * mmap.PAGESIZE
        for at in range(begin, start + byte_count, _POPULATE_BYTES):
            try:
                self.madvise(_POPULATE_READ, at, min(_POPULATE_BYTES, start + byte_count - at))
            except OSError as error:
                if error.errno != errno.EINVAL:  # of a Linux before 5.14
                    raise
                return

    def close(self) -> None:
        """BufferError while there are views; the last of them closes it then."""
        super().close()
        self._let_go()

    def __del__(self) -> None:
        self._let_go()

    def _let_go(self) -> None:
        fd, self.fd = getattr(self, "fd", -1), -1
        if fd >= 0:
            os.close(fd)


def place_of(view: memoryview) -> tuple[int, int] | None:
    """The descriptor of the file that these bytes are of, and where in it they begin; None where they are of none."""
    if not isinstance(view.obj, FileMap):
        return None
    at, begins = (np.frombuffer(each, np.uint8).ctypes.data for each in (view, view.obj))
    return view.obj.fd, at - begins
