"""Batch memory that is used again: slots.

A batch of tens of megabytes in fresh memory costs more in page faults than in copying. So batches are written into
*slots*, and a slot comes back when the last array or tensor over it has been collected, however long the user keeps it:
what he holds is his and writable, and nothing is ever reused under his hands.

How: the memory belongs to the pool; what is lent is a small owner object that exposes it through numpy's array
interface. Every view of the array, and every tensor made from one, keeps that owner alive, and its finalizer puts the
memory back. A finalizer may run in any thread at any point, so it does one thing: append to a deque.

The pool never blocks: when no slot is free it makes one. It keeps at most `retained_bytes` of free memory.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from fastload.lifecycle import on_drop

Bytes = npt.NDArray[np.uint8]
T = TypeVar("T")

# Below this, malloc is as good and a slot is only overhead.
SMALL_BYTES = 64 * 1024


class Slots(Protocol):
    """Where batches are written into."""

    def take(self, byte_count: int) -> Bytes:
        """A writable uint8 array whose content is undefined."""
        ...

    def take_array(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[np.generic]:
        """A writable C-contiguous array over such."""
        ...


class Owner:
    """What an array over memory at `address` is based on; dies with the last view of it."""

    __slots__ = ("__array_interface__", "__weakref__")

    def __init__(self, address: int, byte_count: int) -> None:
        self.__array_interface__ = {"data": (address, False), "shape": (byte_count,), "typestr": "|u1", "version": 3}


def address_of(memory: Bytes) -> int:
    """Where it begins; `ctypes.data` takes a longer way there."""
    address: int = memory.__array_interface__["data"][0]
    return address


class SlotPool:
    """Lends byte arrays and takes them back by itself. Safe to use from several threads."""

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
        owner = Owner(address_of(memory), byte_count)
        on_drop(owner, self._returned.append, memory)
        return np.asarray(owner)

    def take_array(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[np.generic]:
        """A writable C-contiguous array over a slot."""
        kind = np.dtype(dtype)
        byte_count = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        return self.take(byte_count).view(kind).reshape(shape)

    @property
    def held_bytes(self) -> int:
        """All memory of its slots, lent or free."""
        with self._lock:
            self._collect()
            return self._held_bytes

    def free_bytes(self) -> int:
        """How much memory is waiting to be used again."""
        with self._lock:
            self._collect()
            return sum(memory.size for memory in self._free)

    def _reuse(self, byte_count: int) -> Bytes | None:
        """The smallest free slot that fits without wasting more than half of it."""
        with self._lock:
            self._collect()
            return take_fitting(self._free, byte_count, len)

    def _collect(self) -> None:
        """Take in what the finalizers have returned; drop the oldest when it is more than is worth keeping."""
        while self._returned:
            self._free.append(self._returned.popleft())
        while sum(memory.size for memory in self._free) > self._retained_bytes:
            self._held_bytes -= self._free.pop(0).size


def take_fitting(free: list[T], byte_count: int, size_of: Callable[[T], int]) -> T | None:
    """Take out of `free` the smallest that fits without wasting more than half of it, if there is one."""
    sizes = [size_of(each) for each in free]
    fitting = [i for i, size in enumerate(sizes) if byte_count <= size <= 2 * size_class(byte_count)]
    return free.pop(min(fitting, key=sizes.__getitem__)) if fitting else None


def size_class(byte_count: int) -> int:
    """`byte_count` rounded up to one of eight sizes an octave, so that batches of nearly one size share slots."""
    step = 1 << max(12, byte_count.bit_length() - 4)
    return -(-byte_count // step) * step
