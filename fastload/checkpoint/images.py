"""Images: memory in which a trainer lays out what it saves, so that the service can take it from there.

One is a memfd: it has no name that could outlive its users, takes one descriptor whatever the number of tensors, and
lives on in the service when the trainer dies. It is used again for the next save, since to get memory from the kernel
takes four times as long as to copy. A second one is made only for a save that comes while the first is being stored;
there are two of a process at most, and the next save waits then. What was not used for some time is given back to the
system. While the service may read an image, it is read-only here, so that a stray write ends the
process instead of spoiling a checkpoint.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import threading
import time
import weakref
from collections.abc import Callable

from fastload.cache import syscalls
from fastload.checkpoint.saving import Saving
from fastload.checkpoint.segments import PAGE_BYTES
from fastload.errors import FastloadError, WaitTimeoutError
from fastload.lifecycle import call_later, on_drop

_IMAGES_MAX = 2
# How long an image is kept for the next save.
_IDLE_S = 600.0
# Sizes differ a little from save to save.
_GRAIN_BYTES = 4 << 20
# The deadline of a wait in the background.
_PATIENCE_S = 10.0
_POPULATE_WRITE = 23  # of madvise; Linux 5.14
_POPULATE_BYTES = 32 << 20  # in one call, during which no other thread can map memory
_libc = ctypes.CDLL(None, use_errno=True)


class Image:
    """One of them. For one thread at a time."""

    def __init__(self, byte_count: int) -> None:
        """OSError where the system has no memory to give."""
        self.byte_count = byte_count
        self.fd = syscalls.memfd_create("fastload-image")
        self._close_fd = on_drop(self, os.close, self.fd)
        syscalls.ftruncate(self.fd, byte_count)
        syscalls.add_seals(self.fd, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        self._map = syscalls.mmap_shared(self.fd, byte_count, writable=True)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.saving: Saving | None = None  # what is saved from it
        self.used_s = time.monotonic()

    @property
    def view(self) -> memoryview:
        return memoryview(self._map)

    def populate(self, is_wanted: Callable[[], bool] = lambda: True) -> None:
        """Have its pages from the kernel."""
        with self.view:  # while which it is not unmapped
            for start in range(0, self.byte_count, _POPULATE_BYTES):
                length = min(_POPULATE_BYTES, self.byte_count - start)
                if not is_wanted() or _libc.madvise(
                    ctypes.c_void_p(self._address + start), ctypes.c_size_t(length), _POPULATE_WRITE
                ):
                    return  # an older kernel: they come as they are written

    def close(self) -> None:
        """Give the memory back, which goes with the last process that maps it."""
        self._close_fd()
        with contextlib.suppress(BufferError):  # a thread is at it: it goes with this object
            self._map.close()

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
        self._is_watched = False  # by a thread that gives back what is not used
        self._ended = threading.Event()
        on_drop(self, call_later, self._ended.set)

    def take(self, byte_count: int, room_bytes: int, timeout_s: float) -> Image | None:
        """One of at least this size, to be written to; None where all of them together may not be as large.

        Waits where there are two already that are in use, or no room for another one; WaitTimeoutError as `take_back`
        of a `Saving` raises it.
        """
        if byte_count > room_bytes:
            return None
        while True:
            with self._changed:
                there = set(self._images)
                oldest = next((each for each in self._busy if each.saving and each not in self._awaited), None)
                is_unused = oldest is not None and oldest.saving is not None and oldest.saving.is_over
                image = self._free(byte_count) or (None if is_unused else self._made(byte_count, room_bytes))
                if image is not None:
                    self._busy[image] = None
                    is_watched, self._is_watched = self._is_watched, True
                    break
                if oldest is None:  # another thread fills it, or waits for it
                    if not self._changed.wait(timeout_s):
                        raise WaitTimeoutError(
                            f"gave up after {timeout_s:g} s waiting for memory to save to: other threads fill it"
                        )
                    continue
                self._awaited.add(oldest)
            self._take_back(oldest, timeout_s)
        if not is_watched:
            arguments = weakref.ref(self), self._ended
            threading.Thread(target=_watch, args=arguments, name="fastload-image", daemon=True).start()
        if image in there:
            image.protect(writable=True)
        else:  # ahead of the copy, which is slower
            _in_a_thread(image.populate, lambda: image.saving is None)
        return image

    def release(self, image: Image) -> None:
        """Nobody reads or fills it any more."""
        with self._changed:
            image.saving = None
            self._busy.pop(image, None)
            self._changed.notify_all()

    def _discard(self, image: Image) -> None:
        """Others may read it yet: it is not filled again."""
        with self._changed:
            self._busy.pop(image, None)
            if image in self._images:
                self._images.remove(image)
                image.close()

    def handed_over(self, image: Image, saving: Saving) -> None:
        """It is full, and saved from."""
        with self._changed:
            image.saving, image.used_s = saving, time.monotonic()
            self._changed.notify_all()

    def give_back_unused(self) -> bool:
        """Those that were not used for some time, to the system; whether any are left."""
        with self._changed:
            unused = [each for each in self._images if time.monotonic() - each.used_s >= _IDLE_S]
            over = [each for each in unused if each.saving and each.saving.is_over and each not in self._awaited]
            self._awaited.update(over)
        for image in over:
            with contextlib.suppress(WaitTimeoutError):  # others read it, as a process that starts again: later then
                self._take_back(image, _PATIENCE_S)
        with self._changed:
            for image in unused:
                if image not in self._busy and image in self._images:
                    self._images.remove(image)
                    image.close()
            self._is_watched = bool(self._images)
            return self._is_watched

    def _take_back(self, image: Image, timeout_s: float) -> None:
        """Of one that this thread waits for."""
        try:
            assert image.saving is not None
            is_free = image.saving.take_back(timeout_s)
        except WaitTimeoutError:
            raise
        except FastloadError:  # its connection was closed: the service may read it yet
            self._discard(image)
        else:
            (self.release if is_free else self._discard)(image)
        finally:
            with self._changed:
                self._awaited.discard(image)
                self._changed.notify_all()

    def _free(self, byte_count: int) -> Image | None:
        """The smallest that is free and large enough; those that are free and too small go."""
        free = [each for each in self._images if each not in self._busy]
        fitting = [each for each in free if byte_count <= each.byte_count]
        if not fitting:
            for each in free:
                self._images.remove(each)
                each.close()
        return min(fitting, key=lambda each: each.byte_count, default=None)

    def _made(self, byte_count: int, room_bytes: int) -> Image | None:
        if len(self._images) >= _IMAGES_MAX or self._taken() + byte_count > room_bytes:
            return None
        image = Image(min(room_bytes - self._taken(), -(-byte_count // _GRAIN_BYTES) * _GRAIN_BYTES))
        self._images.append(image)
        return image

    def _taken(self) -> int:
        return sum(each.byte_count for each in self._images)


def _watch(images: weakref.ref[Images], ended: threading.Event) -> None:
    while not ended.wait(_IDLE_S / 10):
        those = images()
        if those is None or not those.give_back_unused():
            return
        del those


def _in_a_thread(function: Callable[[Callable[[], bool]], object], is_wanted: Callable[[], bool]) -> None:
    threading.Thread(target=function, args=(is_wanted,), name="fastload-image", daemon=True).start()
