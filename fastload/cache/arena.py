"""The node's RAM tier: one piece of shared memory, cut into buffers of one chunk.

Every byte is received into the arena, verified there and served from there, so it has to be one mapping that
many processes share without copies, that vanishes with its last user, however it ends, and that no
consumer can damage. An anonymous memfd is all three: it has no name to go stale, and its seals forbid
growing, shrinking (a mapping of cut memory would end its user with SIGBUS) and any further writable mapping,
while the owner keeps the one it has.

Memory is taken from the machine page by page, by what is first written to it, so the arena takes up what was put into
it. That costs 3 ms for 8 MiB, in the threads that receive. A thread that touches memory ahead of them (by
MADV_POPULATE_WRITE) takes as long for it, so that nothing is saved where all cores are busy, and has to touch whole
buffers, also where a short chunk will fill half of one: shards of 9 MB took twice their size.

Memory that is sealed cannot be given back in parts, so an arena that is not in use moves to fresh memory (`renew`).

The arena knows nothing of which chunk lies where; that is the service's state. A view that outlives `close()`
keeps its mapping until it is gone itself.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt

from fastload.cache import syscalls
from fastload.config import exact_bytes
from fastload.errors import CacheError

# An arena keeps its size: a mapping of memory that was cut off ends its user with SIGBUS.
_FIXED = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_CURE = "lower ram_bytes, or raise the limit on memory or open files of this process"


class Arena:
    """The owner's side."""

    def __init__(self, ram_bytes: int, chunk_bytes: int) -> None:
        """Room for `ram_bytes // chunk_bytes` buffers; CacheError where the kernel gives none."""
        self.chunk_bytes = chunk_bytes
        self.buffer_count = ram_bytes // chunk_bytes
        self.byte_count = self.buffer_count * chunk_bytes
        if self.buffer_count < 1:
            raise CacheError(
                f"ram_bytes={exact_bytes(ram_bytes)} is below one chunk of {chunk_bytes} bytes; raise ram_bytes"
            )
        self.fd = -1
        self._map: mmap.mmap | None = None
        self._view = memoryview(b"")
        try:
            self.fd, self._map = _new_memory(self.byte_count)
        except (OSError, ValueError, OverflowError) as error:  # the latter: more than can be addressed
            raise CacheError(f"cannot make an arena of ram_bytes={exact_bytes(ram_bytes)}: {error}; {_CURE}") from error
        self._view = memoryview(self._map)

    def buffer(self, number: int) -> memoryview:
        """Buffer `number`: `chunk_bytes` writable bytes that start on a page."""
        if not 0 <= number < self.buffer_count:
            raise IndexError(f"no buffer {number} among {self.buffer_count}")
        start = number * self.chunk_bytes
        return self._view[start : start + self.chunk_bytes]

    @property
    def touched_bytes(self) -> int:
        """How much memory it takes up: what was used so far."""
        return 0 if self.fd < 0 else syscalls.fstat(self.fd).st_blocks * 512

    def renew(self) -> Callable[[], None]:
        """Go over to fresh memory, which takes up nothing; what the old holds is lost.

        Returns what lets go of the old, for a thread: it takes up to half a second for each GiB that was touched.
        OSError where the system has no other to give, and then nothing has changed.
        """
        fd, mapping = _new_memory(self.byte_count)
        old = self.fd, self._map, self._view
        self.fd, self._map, self._view = fd, mapping, memoryview(mapping)
        return partial(_let_go, *old)

    def close(self) -> None:
        """Let go of the memory, at once or when the last buffer in use goes. May be called twice."""
        old = self.fd, self._map, self._view
        self.fd, self._map = -1, None
        _let_go(*old)


class ArenaView:
    """A consumer's side: the arena, mapped read-only."""

    def __init__(self, fd: int, byte_count: int) -> None:
        """Map the arena `fd` of `byte_count` bytes; the descriptor stays the caller's to close.

        CacheError where `fd` is not a sealed arena of that size, or another user's.
        """
        try:
            status = syscalls.fstat(fd)
            # Its owner may write to it, and so to what is trained on.
            if status.st_uid != syscalls.geteuid():
                raise CacheError(f"the arena received belongs to user {status.st_uid}; restart the service")
            if status.st_size != byte_count or syscalls.get_seals(fd) & _FIXED != _FIXED:
                raise CacheError(f"the arena received is not a sealed one of {byte_count} bytes; restart the service")
            self._map: mmap.mmap | None = syscalls.mmap_shared(fd, byte_count, writable=False)
        except (OSError, ValueError) as error:
            raise CacheError(f"cannot map the arena of {byte_count} bytes: {error}; {_CURE}") from error
        self.byte_count = byte_count
        self._view = memoryview(self._map)
        self.array: npt.NDArray[np.uint8] = np.frombuffer(self._view, dtype=np.uint8)

    def close(self) -> None:
        """Let go of the memory, at once or when the last array over it goes. May be called twice."""
        mapping, self._map = self._map, None
        self.array = np.empty(0, np.uint8)
        if mapping is not None:
            _close_mapping(mapping, self._view)


def _new_memory(byte_count: int) -> tuple[int, mmap.mmap]:
    """Shared memory that keeps its size: its descriptor, and how we see it."""
    fd = syscalls.memfd_create("fastload-arena")
    try:
        syscalls.ftruncate(fd, byte_count)
        mapping = syscalls.mmap_shared(fd, byte_count, writable=True)
        _seal(fd)
    except BaseException:
        syscalls.close(fd)
        raise
    return fd, mapping


def _let_go(fd: int, mapping: mmap.mmap | None, view: memoryview) -> None:
    if mapping is not None:
        _close_mapping(mapping, view)
    if fd >= 0:
        syscalls.close(fd)


def _seal(fd: int) -> None:
    try:
        syscalls.add_seals(fd, _FIXED | syscalls.F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        syscalls.add_seals(fd, _FIXED)  # before Linux 5.1 only consumers' good manners keep them from writing


def _close_mapping(mapping: mmap.mmap, view: memoryview) -> None:
    try:
        view.release()
        mapping.close()
    except BufferError:
        # A view of it is still in use. The mapping ends with its last view.
        pass
