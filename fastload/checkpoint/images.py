"""Images: memory in which a trainer lays out what it saves, so that the service can take it from there.

One is a memfd: it has no name that could outlive its users, takes one descriptor whatever the number of tensors, and
lives on in the service when the trainer dies. It is used again for the next save, since to get memory from the kernel
takes four times as long as to copy. A second one is made only for a save that comes while the first is being stored;
there are two of a process at most, and the next save waits then. What was not used for some time is given back to the
system. While the service may read an image, it is read-only here, so that a stray write ends the
process instead of spoiling a checkpoint.

What `async_save` copies is in an image as well (`staging`), which is lent to the tensors of that copy: it is not filled
again before the last of them has gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import logging
import math
import mmap
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence

import numpy as np

from fastload.cache import syscalls
from fastload.checkpoint.saving import Saving
from fastload.checkpoint.segments import PAGE_BYTES
from fastload.errors import FastloadError, WaitTimeoutError
from fastload.lifecycle import call_later, on_drop

_log = logging.getLogger("fastload.checkpoint")

_IMAGES_MAX = 2
# How long an image is kept for the next save.
_IDLE_S = 600.0
# Sizes differ a little from save to save.
_GRAIN_BYTES = 4 << 20
_SOON_S = 0.1
# How often is looked for what only garbage refers to.
_LOOK_S = 1.0
# A wait for states that others hold is said in the log when it has taken so long.
_SAID_AFTER_S = 10.0
# The deadline of a wait in the background.
_PATIENCE_S = 10.0
_POPULATE_WRITE = 23  # of madvise; Linux 5.14
_POPULATE_BYTES = 32 << 20  # in one call, during which no other thread can map memory
_libc = ctypes.CDLL(None, use_errno=True)


class Image:
    """One of them. For one thread at a time."""

    def __init__(self, byte_count: int, fd: int = -1) -> None:
        """OSError where the system has no memory to give. `fd`: that of another process, which is ours to close."""
        self.byte_count = byte_count
        self.fd = fd if fd >= 0 else syscalls.memfd_create("fastload-image")
        self._close_fd = on_drop(self, os.close, self.fd)
        if fd < 0:
            syscalls.ftruncate(self.fd, byte_count)
            syscalls.add_seals(self.fd, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        self._map = syscalls.mmap_shared(self.fd, byte_count, writable=True)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.saving: Saving | None = None  # what is saved from it
        self.used_s = time.monotonic()
        self.is_moved = False  # what was staged in it is no longer where it was
        self.is_closed = False
        self.is_received = False  # it is another process's, which fills it
        self.is_registered = False  # with CUDA
        self.before_close: Callable[[], object] = lambda: None

    @property
    def view(self) -> memoryview:
        return memoryview(self._map)

    def array(self) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        """All of it, which lives as long as the array does."""
        return np.frombuffer(self._map, np.uint8)

    def offset_of(self, address: int, length: int) -> int | None:
        """Where these bytes of this process lie in it; None: they do not."""
        offset = address - self._address
        return offset if 0 <= offset <= self.byte_count - length else None

    def move(self, moves: Sequence[tuple[int, int, int]]) -> None:
        """Bytes within it, each from where, to where and how many; both in order, and none of them twice."""
        # What goes left is never in the way of what comes behind it, nor is what goes right of what is before it.
        ordered = [each for each in moves if each[1] < each[0]] + [each for each in moves[::-1] if each[1] > each[0]]
        for source, target, length in ordered:
            ctypes.memmove(self._address + target, self._address + source, length)

    @property
    def is_handed_over_elsewhere(self) -> bool:
        """Whether another process, to which it was sent, has handed it over and not taken it back."""
        return self._map[self.byte_count - 1] != 0

    @is_handed_over_elsewhere.setter
    def is_handed_over_elsewhere(self, is_so: bool) -> None:
        # Its last byte, which both processes see; what is staged ends before it.
        self._map[self.byte_count - 1] = is_so

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
        self.is_closed = True
        self.before_close()
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
        self._lent: set[Image] = set()
        # Those that were lent until now. A finalizer puts them there, in any thread and at any moment.
        self._returned: queue.SimpleQueue[Image] = queue.SimpleQueue()
        self._is_watched = False  # by a thread that gives back what is not used
        self._ended = threading.Event()
        on_drop(self, call_later, self._ended.set)

    def take(
        self, byte_count: int, room_bytes: int, timeout_s: float, *, waits_for_states: bool = True
    ) -> Image | None:
        """One of at least this size, to be written to; None where all of them together may not be as large, or where
        others are filled, or hold states that were staged, and these are not to be waited for.

        Waits where there are two already that are in use, or no room for another one; WaitTimeoutError as `take_back`
        of a `Saving` raises it.
        """
        if byte_count > room_bytes:
            return None
        deadline = time.monotonic() + timeout_s
        said_at = time.monotonic() + _SAID_AFTER_S
        may_come_soon = True
        while True:
            with self._changed:
                self._settle()
                if may_come_soon and self._lent - self._busy.keys():
                    # torch says that a save is over before the thread that made it has dropped its state.
                    may_come_soon = False
                    self._changed.wait(_SOON_S)
                    self._settle()
                there = set(self._images)
                oldest = next((each for each in self._busy if each.saving and each not in self._awaited), None)
                is_unused = oldest is not None and oldest.saving is not None and oldest.saving.is_over
                image = self._free(byte_count) or (None if is_unused else self._made(byte_count, room_bytes))
                if image is not None:
                    self._busy[image] = None
                    is_watched, self._is_watched = self._is_watched, True
                    break
                if oldest is not None:
                    self._awaited.add(oldest)
            if oldest is not None:
                self._take_back(oldest, timeout_s)
            elif not waits_for_states:
                return None
            else:  # another thread fills it, or waits for it; or a state is in it
                if time.monotonic() >= said_at:
                    said_at = math.inf
                    _log.warning("this save waits for memory: %s", self._in_the_way())
                self._await_change(deadline, timeout_s)
        if not is_watched:
            arguments = weakref.ref(self), self._ended
            threading.Thread(target=_watch, args=arguments, name="fastload-image", daemon=True).start()
        if image in there:
            image.protect(writable=True)
        else:  # ahead of the copy, which is slower
            _in_a_thread(image.populate, lambda: image.saving is None)
        return image

    def _await_change(self, deadline: float, timeout_s: float) -> None:
        # The state of a save that is over may be in a cycle of references: an exception that was caught on the way
        # keeps the frames of torch's calls. Nobody says when the next collection is, while all wait here.
        if self._lent:
            gc.collect()
        with self._changed:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise WaitTimeoutError(
                    f"gave up after {timeout_s:g} s waiting for memory to save to: {self._in_the_way()}"
                )
            if self._returned.empty():
                self._changed.wait(min(left_s, _LOOK_S))

    def _in_the_way(self) -> str:
        return (
            f"other threads fill it, or states that were staged are still in use ({len(self._lent)}); wait for the "
            "futures of earlier saves, and drop those that failed"
        )

    def lend(self, image: Image) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        """All of one that was taken. It is not filled again while something refers to the array; where it was not
        handed over until then, it is released.
        """
        array = image.array()
        image.is_handed_over_elsewhere, image.is_moved = False, False
        with self._changed:
            self._lent.add(image)
        on_drop(array, self._was_dropped, image)
        return array

    def _was_dropped(self, image: Image) -> None:
        self._returned.put(image)
        call_later(self._notify)

    def _notify(self) -> None:
        with self._changed:
            self._settle()
            self._changed.notify_all()

    def _settle(self) -> None:
        """What was lent until now."""
        with contextlib.suppress(queue.Empty):
            while True:
                image = self._returned.get_nowait()
                self._lent.discard(image)
                if image.is_handed_over_elsewhere:
                    self._discard(image)
                elif image.saving is None:
                    self._busy.pop(image, None)

    def give_back(self) -> None:
        """What nothing is in, to the system, now or as soon as that is so."""
        with self._changed:
            self._settle()
            for image in list(self._images):
                image.used_s = -math.inf
                if not self._is_in_use(image):
                    self._images.remove(image)
                    image.close()

    def _is_in_use(self, image: Image) -> bool:
        return image in self._busy or image in self._lent

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
            self._settle()
            unused = [each for each in self._images if time.monotonic() - each.used_s >= _IDLE_S]
            over = [each for each in unused if each.saving and each.saving.is_over and each not in self._awaited]
            self._awaited.update(over)
        for image in over:
            with contextlib.suppress(WaitTimeoutError):  # others read it, as a process that starts again: later then
                self._take_back(image, _PATIENCE_S)
        with self._changed:
            for image in unused:
                if not self._is_in_use(image) and image in self._images:
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
        free = [each for each in self._images if not self._is_in_use(each)]
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
