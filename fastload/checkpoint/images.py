"""Images: memory in which a trainer lays out what it saves, so that the service can take it from there.

One is a memfd: it has no name that could outlive its users, takes one descriptor whatever the number of tensors, and
lives on in the service when the trainer dies. It is used again for the next save, since to get memory from the kernel
takes four times as long as to copy; a second one, of the same size, is made and touched beside training, once the first
is used. While the service may read an image nobody writes to it: it is read-only here, so that a stray write ends the
process instead of spoiling a checkpoint. There are two of a process at most. The next save waits then.
"""

from __future__ import annotations

import ctypes
import fcntl
import logging
import mmap
import os
import threading
from collections.abc import Callable

from fastload.cache import syscalls
from fastload.checkpoint.segments import PAGE_BYTES
from fastload.errors import FastloadError, WaitTimeoutError
from fastload.lifecycle import on_drop

_IMAGES_MAX = 2
# Sizes differ a little from save to save.
_GRAIN_BYTES = 4 << 20
_POPULATE_WRITE = 23  # of madvise; Linux 5.14
_POPULATE_BYTES = 32 << 20  # in one call, during which no other thread can map memory
log = logging.getLogger("fastload.checkpoint")
_libc = ctypes.CDLL(None, use_errno=True)


class Image:
    """One of them. For one thread at a time."""

    def __init__(self, byte_count: int) -> None:
        """OSError where the system has no memory to give."""
        self.byte_count = byte_count
        self.fd = syscalls.memfd_create("fastload-image")
        self.close = on_drop(self, os.close, self.fd)  # its memory goes with the last that maps it
        syscalls.ftruncate(self.fd, byte_count)
        syscalls.add_seals(self.fd, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        self._map = syscalls.mmap_shared(self.fd, byte_count, writable=True)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        # Of one in use: waits until the save can do without it, and says whether nobody reads it any more.
        self.take_back: Callable[[float], bool] | None = None

    @property
    def view(self) -> memoryview:
        return memoryview(self._map)

    def populate(self, is_wanted: Callable[[], bool] = lambda: True) -> None:
        """Have its pages from the kernel."""
        for start in range(0, self.byte_count, _POPULATE_BYTES):
            length = min(_POPULATE_BYTES, self.byte_count - start)
            if not is_wanted() or _libc.madvise(
                ctypes.c_void_p(self._address + start), ctypes.c_size_t(length), _POPULATE_WRITE
            ):
                return  # an older kernel: they come as they are written

    def protect(self, *, writable: bool) -> None:
        """Let this process write to it, or only read."""
        prot = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        length = -(-self.byte_count // PAGE_BYTES) * PAGE_BYTES
        if _libc.mprotect(ctypes.c_void_p(self._address), ctypes.c_size_t(length), prot):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


class Images:
    """Those of this process and one cache. Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._images: list[Image] = []
        self._busy: dict[Image, None] = {}  # the oldest first
        self._awaited: set[Image] = set()  # of these, those that a thread waits for

    def take(self, byte_count: int, room_bytes: int, timeout_s: float) -> Image | None:
        """One of at least this size, to be written to; None where all of them together may not be as large.

        Waits where there are two already, or no room for another one; WaitTimeoutError as `take_back` of one raises it.
        """
        if byte_count > room_bytes:
            return None
        while True:
            with self._changed:
                there = set(self._images)
                image = self._picked(byte_count, room_bytes)
                if image is not None:
                    break
                oldest = next((each for each in self._busy if each.take_back and each not in self._awaited), None)
                if oldest is None:  # another thread fills it, or waits for it
                    if not self._changed.wait(timeout_s):
                        raise WaitTimeoutError(
                            f"gave up after {timeout_s:g} s waiting for memory to save to: other threads fill it"
                        )
                    continue
                self._awaited.add(oldest)
            try:
                assert oldest.take_back is not None
                is_free = oldest.take_back(timeout_s)
            except WaitTimeoutError:
                raise
            except FastloadError:  # its connection was closed: the service may read it yet
                self._discard(oldest)
            else:
                (self.release if is_free else self._discard)(oldest)
            finally:
                with self._changed:
                    self._awaited.discard(oldest)
                    self._changed.notify_all()
        if image in there:
            image.protect(writable=True)
        else:  # ahead of the copy, which is slower
            _in_a_thread(image.populate, lambda: image.take_back is None)
        return image

    def release(self, image: Image) -> None:
        """Nobody reads or fills it any more."""
        with self._changed:
            image.take_back = None
            self._busy.pop(image, None)
            self._changed.notify_all()

    def _discard(self, image: Image) -> None:
        """Others may read it yet: it is not filled again."""
        with self._changed:
            self._busy.pop(image, None)
            if image in self._images:
                self._images.remove(image)
                image.close()

    def handed_over(self, image: Image, take_back: Callable[[float], bool], room_bytes: int) -> None:
        """It is full, and `take_back` says when it may be filled again. One more is made for the next save."""
        image.take_back = take_back
        with self._changed:
            self._changed.notify_all()
            if len(self._images) >= _IMAGES_MAX or self._taken() + image.byte_count > room_bytes:
                return
            try:
                ahead = Image(image.byte_count)
            except OSError as error:
                log.info("no second image of %d bytes: %s", image.byte_count, error)
                return
            self._images.append(ahead)
        _in_a_thread(ahead.populate, lambda: ahead not in self._busy)

    def _picked(self, byte_count: int, room_bytes: int) -> Image | None:
        free = [each for each in self._images if each not in self._busy]
        fitting = [each for each in free if byte_count <= each.byte_count]
        if fitting:
            image = min(fitting, key=lambda each: each.byte_count)
        else:
            for each in free:
                self._images.remove(each)
                each.close()
            if len(self._images) >= _IMAGES_MAX or self._taken() + byte_count > room_bytes:
                return None
            image = Image(min(room_bytes, -(-byte_count // _GRAIN_BYTES) * _GRAIN_BYTES))
            self._images.append(image)
        self._busy[image] = None
        return image

    def _taken(self) -> int:
        return sum(each.byte_count for each in self._images)


def _in_a_thread(function: Callable[[Callable[[], bool]], object], is_wanted: Callable[[], bool]) -> None:
    threading.Thread(target=function, args=(is_wanted,), name="fastload-image", daemon=True).start()
