"""Reusable memory for batches: slots.

A batch of tens of megabytes in fresh memory costs more in page faults than in copying. So batches are written into
*slots*. A slot is reused once the last array or tensor over it has been collected, however long the user keeps it: an
array that a user holds is writable and never changes.

How: memory is lent as a small owner object that exposes it through numpy's array interface. Every view of the array,
and every tensor made from one, keeps that owner alive, and its finalizer returns the memory. A finalizer may run in any
thread at any point, so it does one thing: append to a deque.

`SlotPool` lends memory of this process. It never blocks: when no slot is free it makes one. It keeps at most
`retained_bytes` of free memory.

`lent` is for memory that processes share. Its notices also say whether this process was forked while the array existed:
the child has a view of its own, never reports that it is done with it, and would see later writes. So memory of which a
child may still hold a view must not be reused.

`SharedSlots` is the base of both pools of such memory: `link.SharedPool` and `worker_slots.WorkerSlots`.

`map_shared` and `map_private` map a memfd without keeping its descriptor. `mmap.mmap` keeps a duplicate for as long as
the memory is mapped, so a trainer that keeps many batches would run out of descriptors (the limit is often 1024); hence
the system call is made through ctypes.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from fastload.lifecycle import fork_count, on_drop

Bytes = npt.NDArray[np.uint8]
T = TypeVar("T")
# Below this, malloc is as good and a slot is only overhead.
SMALL_BYTES = 64 * 1024


class Slots(Protocol):
    """An allocator of batch memory."""

    def take(self, byte_count: int) -> Bytes:
        """A writable uint8 array whose content is undefined."""
        ...

    def take_array(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[np.generic]:
        """A writable C-contiguous array over such memory."""
        ...


class MemoryOwner:
    """The base object of an array over memory at `address`; it dies with the last view of the array."""

    __slots__ = ("__array_interface__", "__weakref__")

    def __init__(self, address: int, byte_count: int) -> None:
        self.__array_interface__ = {"data": (address, False), "shape": (byte_count,), "typestr": "|u1", "version": 3}


def address_of(memory: Bytes) -> int:
    """The address of its first byte; `ctypes.data` is slower."""
    address: int = memory.__array_interface__["data"][0]
    return address


class SlotPool:
    """Lends byte arrays and reclaims them by itself. Thread-safe."""

    def __init__(self, retained_bytes: int) -> None:
        self._retained_bytes = retained_bytes
        self._lock = threading.Lock()
        self._free: list[Bytes] = []
        self._returned: deque[Bytes] = deque()
        self._held_bytes = 0

    def take(self, byte_count: int) -> Bytes:
        """A writable uint8 array of `byte_count` bytes whose content is undefined."""
        if byte_count < SMALL_BYTES:
            return np.empty(byte_count, np.uint8)
        memory = self._reuse(byte_count)
        if memory is None:
            memory = np.empty(size_class(byte_count), np.uint8)
            with self._lock:
                self._held_bytes += memory.size
        owner = MemoryOwner(address_of(memory), byte_count)
        on_drop(owner, self._returned.append, memory)
        return np.asarray(owner)

    def take_array(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[np.generic]:
        """A writable C-contiguous array over a slot."""
        kind = np.dtype(dtype)
        byte_count = math.prod(shape) * kind.itemsize
        return self.take(byte_count).view(kind).reshape(shape)

    @property
    def held_bytes(self) -> int:
        """The memory of all slots, lent or free."""
        with self._lock:
            self._collect()
            return self._held_bytes

    def free_bytes(self) -> int:
        with self._lock:
            self._collect()
            return sum(memory.size for memory in self._free)

    def _reuse(self, byte_count: int) -> Bytes | None:
        """The smallest free slot that fits without wasting more than half of it."""
        with self._lock:
            self._collect()
            return take_fitting(self._free, byte_count, len)

    def _collect(self) -> None:
        """Take back the memory that finalizers returned; drop the oldest above the limit."""
        while self._returned:
            self._free.append(self._returned.popleft())
        while sum(memory.size for memory in self._free) > self._retained_bytes:
            self._held_bytes -= self._free.pop(0).size


def take_fitting(free: list[T], byte_count: int, size_of: Callable[[T], int]) -> T | None:
    """Remove from `free` the smallest that fits without wasting more than half of it; None where none does."""
    sizes = [size_of(each) for each in free]
    fitting = [i for i, size in enumerate(sizes) if byte_count <= size <= 2 * size_class(byte_count)]
    return free.pop(min(fitting, key=sizes.__getitem__)) if fitting else None


def size_class(byte_count: int) -> int:
    """`byte_count` rounded up to one of eight sizes an octave, so that batches of nearly one size share slots."""
    step = 1 << max(12, byte_count.bit_length() - 4)
    return -(-byte_count // step) * step


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64,
]  # fmt: skip
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_FAILED = ctypes.c_void_p(-1).value


def map_shared(fd: int, byte_count: int) -> npt.NDArray[np.uint8]:
    """The first bytes of a memfd as a writable array, unmapped with its last view. Raises `OSError`."""
    return _mapped(fd, byte_count, mmap.MAP_SHARED)


def map_private(fd: int, byte_count: int) -> npt.NDArray[np.uint8]:
    """The same, copy-on-write: other processes do not see writes."""
    return _mapped(fd, byte_count, mmap.MAP_PRIVATE)


def _mapped(fd: int, byte_count: int, flags: int) -> npt.NDArray[np.uint8]:
    address = _libc.mmap(None, byte_count, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, 0)
    if address == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, f"cannot map {byte_count} bytes of shared memory: {os.strerror(number)}")
    owner = MemoryOwner(address, byte_count)
    on_drop(owner, _libc.munmap, address, byte_count)
    return np.asarray(owner)


class Collected(NamedTuple, Generic[T]):
    """A notice that a lent array has been collected."""

    what: T  # as given to `lent`
    was_forked: bool  # while the array existed, so that a child may still read it


def lent(memory: Bytes, collected: deque[Collected[T]], what: T) -> Bytes:
    """An array over `memory`; when its last view is gone, a notice about `what` is appended to `collected`."""
    return np.asarray(_Lent(memory, collected, what))


class _Lent(MemoryOwner, Generic[T]):
    """The base object of a lent array. `__del__` costs half of what a finalizer (`lifecycle.on_drop`) does."""

    __slots__ = ("_collected", "_forks", "_memory", "_what")

    def __init__(self, memory: Bytes, collected: deque[Collected[T]], what: T) -> None:
        # First, so that the notice is sent even where a signal handler raises before the array exists.
        self._memory, self._collected, self._what, self._forks = memory, collected, what, fork_count()
        super().__init__(address_of(memory), memory.size)

    def __del__(self) -> None:
        was_forked = self._forks != fork_count()
        self._collected.append(Collected(self._what, was_forked))  # only now may the memory be unmapped


@dataclass(slots=True, eq=False)
class SharedSlot:
    """Memory over an anonymous file, which its owner lends out and another process maps."""

    number: int
    base: Bytes
    fd: int = -1  # until the other process has mapped it
    generation: int = 0  # of slots that have the same number one after another
    address: int = field(init=False)
    lent: int = 0  # arrays of this process that are in use
    sent: int = 0  # buffers that the other process was sent and has not released
    was_forked: bool = False  # either process, while it used the slot, so that a child may read it

    def __post_init__(self) -> None:
        self.address = address_of(self.base)

    def offset_of(self, address: int, byte_count: int) -> int | None:
        """The offset of that memory in this slot; None where it lies outside."""
        offset = address - self.address
        return offset if offset >= 0 and offset + byte_count <= self.base.size else None

    def close_fd(self) -> None:
        """Close the descriptor, which the other process needs no longer. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class SharedSlots(ABC):
    """The slots of a process that another one maps: numbered by a subclass, which knows what the other has released.

    A slot is free when neither process uses it. It is then reused, or dropped where it was forked or where free slots
    take more than `retained_bytes`. Used by one thread at a time, except for finalizers.
    """

    def __init__(self, retained_bytes: int) -> None:
        self._retained_bytes = retained_bytes
        self._by_number: dict[int, SharedSlot] = {}
        self._free: list[SharedSlot] = []
        self._collected: deque[Collected[SharedSlot]] = deque()
        self._dropped: list[int] = []  # numbers, of which the other process was not notified yet

    @abstractmethod
    def _new(self, byte_count: int) -> SharedSlot:
        """Make a slot under a new number."""

    @abstractmethod
    def _drop(self, slot: SharedSlot) -> None:
        """Forget a slot that is not in use."""

    def _taken(self, byte_count: int) -> SharedSlot:
        """A slot that was free, or a new one."""
        return take_fitting(self._free, byte_count, lambda slot: slot.base.size) or self._new(byte_count)

    def _made(self, number: int, byte_count: int, generation: int = 0) -> SharedSlot:
        fd = os.memfd_create("fastload-slot", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size_class(byte_count))
            slot = SharedSlot(number, map_shared(fd, size_class(byte_count)), fd, generation)
        except BaseException:
            os.close(fd)
            raise
        self._by_number[number] = slot
        return slot

    def _lend(self, slot: SharedSlot, offset: int, byte_count: int) -> Bytes:
        slot.lent += 1
        return lent(slot.base[offset : offset + byte_count], self._collected, slot)

    def _reclaim(self) -> None:
        """Count arrays of this process that were collected."""
        while self._collected:
            slot, was_forked = self._collected.popleft()
            if self._by_number.get(slot.number) is slot:  # not closed meanwhile
                slot.lent -= 1
                slot.was_forked |= was_forked
                self._free_if_unused(slot)

    def _release(self, slot: SharedSlot, count: int, *, was_forked: bool = False) -> None:
        """Count buffers that the other process has released."""
        slot.sent -= count
        slot.was_forked |= was_forked
        self._free_if_unused(slot)

    def _trim(self) -> None:
        """Drop the oldest free slots above the limit."""
        while sum(slot.base.size for slot in self._free) > self._retained_bytes:
            self._drop(self._free.pop(0))

    def _free_if_unused(self, slot: SharedSlot) -> None:
        if slot.lent or slot.sent:
            return
        if slot.was_forked:
            self._drop(slot)
        else:
            self._free.append(slot)

    def _take_dropped(self) -> list[int]:
        dropped, self._dropped = self._dropped, []
        return dropped
