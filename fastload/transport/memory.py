"""Memory that two processes share, used again and again: slots, as in `transport.slots`, over anonymous files.

What crosses from one process to another in fresh memory costs more in page faults, and in names that outlive crashes,
than in copying. So each end of a link has a pool of slots of its own, each over a memfd whose descriptor the other end
is sent once. A slot is lent out as an array; it may be used again when

- the last array or tensor over it has been collected in the process that owns it,
- the other process, if it was told of the slot, has said as often as it was told that nothing there uses it any more,
  and
- neither of them was forked meanwhile: the child has what its parent held, and says nothing when it lets go of it. Such
  a slot is dropped, and its memory goes with the last process that sees it.

Both are heard of late and never missed: a finalizer, which may run in any thread at any point, appends to a deque, and
the other process's word comes with its next message. So what a user keeps stays as it is, and whatever a process
forgets to let go costs memory, not a wrong value.

Free slots beyond `retained_bytes` are dropped, and the other end is told to drop them too.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fastload.transport.lending import Collected, lent
from fastload.transport.mapping import map_shared
from fastload.transport.slots import SMALL_BYTES, address_of, size_class, take_fitting

Bytes = npt.NDArray[np.uint8]


@dataclass(slots=True, eq=False)
class Slot:
    """Memory of one process, which the other maps. `number` is never used again."""

    number: int
    base: Bytes
    fd: int = -1  # until the other end has it
    address: int = field(init=False)
    lent: int = 0  # arrays of this process that are in use
    told: int = 0  # buffers that the other end was told of, and has not let go of
    was_forked: bool = False  # while somebody used it

    def __post_init__(self) -> None:
        self.address = address_of(self.base)

    def offset_of(self, address: int, byte_count: int) -> int | None:
        """Where in it so many bytes at an address lie; None where they do not."""
        offset = address - self.address
        return offset if offset >= 0 and offset + byte_count <= self.base.size else None

    def close_fd(self) -> None:
        """The descriptor is not needed any more."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class SharedPool:
    """The slots of one end of a link. Safe to use from several threads."""

    def __init__(self, retained_bytes: int) -> None:
        self._retained_bytes = retained_bytes
        self._lock = threading.Lock()
        self._slots: dict[int, Slot] = {}
        self._free: list[Slot] = []
        self._collected: deque[Collected[int]] = deque()
        self._dropped: list[int] = []  # since the last message
        self._next_number = 0

    def take(self, byte_count: int) -> Bytes:
        """A writable uint8 array whose content is undefined: over a slot, unless it is small."""
        if byte_count < SMALL_BYTES:
            return np.empty(byte_count, np.uint8)
        with self._lock:
            self._collect()
            slot = take_fitting(self._free, byte_count, lambda slot: slot.base.size) or self._new(byte_count)
            return self._lend(slot, 0, byte_count)

    def take_array(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[np.generic]:
        """A writable C-contiguous array over a slot."""
        kind = np.dtype(dtype)
        byte_count = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        return self.take(byte_count).view(kind).reshape(shape)

    def tell(self, data: Bytes) -> tuple[Slot, int] | None:
        """The slot in which `data` lies, and where; the other end is about to be told. None where it is in none."""
        address = address_of(data)
        with self._lock:
            for slot in self._slots.values():
                if (offset := slot.offset_of(address, data.size)) is not None:
                    slot.told += 1
                    return slot, offset
        return None

    def returned(self, number: int, offset: int, byte_count: int) -> Bytes:
        """What the other end has sent back, which lies in a slot of ours that it was sent."""
        with self._lock:
            return self._lend(self._slots[number], offset, byte_count)

    def let_go(self, collected: Iterable[Collected[int]]) -> None:
        """The other end uses these no more, each as often as it was told of it."""
        with self._lock:
            for number, was_forked in collected:
                slot = self._slots[number]
                slot.told -= 1
                slot.was_forked |= was_forked
                self._free_if_unused(slot)

    def take_dropped(self) -> list[int]:
        """Slots that are no more, for the other end to hear once."""
        with self._lock:
            self._collect()
            dropped, self._dropped = self._dropped, []
            return dropped

    def close(self) -> None:
        """Let go of all slots; arrays over them stay valid as long as they live."""
        with self._lock:
            for slot in self._slots.values():
                slot.close_fd()
            self._slots.clear()
            self._free.clear()

    @property
    def free_bytes(self) -> int:
        """How much memory is waiting to be used again."""
        with self._lock:
            self._collect()
            return sum(slot.base.size for slot in self._free)

    def _new(self, byte_count: int) -> Slot:
        fd = os.memfd_create("fastload-slot", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size_class(byte_count))
            slot = Slot(self._next_number, map_shared(fd, size_class(byte_count)), fd)
        except BaseException:
            os.close(fd)
            raise
        self._next_number += 1
        self._slots[slot.number] = slot
        return slot

    def _lend(self, slot: Slot, offset: int, byte_count: int) -> Bytes:
        slot.lent += 1
        return lent(slot.base[offset : offset + byte_count], self._collected, slot.number)

    def _collect(self) -> None:
        while self._collected:
            number, was_forked = self._collected.popleft()
            slot = self._slots.get(number)
            if slot is not None:  # the pool was not closed meanwhile
                slot.lent -= 1
                slot.was_forked |= was_forked
                self._free_if_unused(slot)
        while sum(slot.base.size for slot in self._free) > self._retained_bytes:
            self._drop(self._free.pop(0))

    def _free_if_unused(self, slot: Slot) -> None:
        if slot.lent or slot.told:
            return
        if slot.was_forked:
            self._drop(slot)
        else:
            self._free.append(slot)

    def _drop(self, slot: Slot) -> None:
        if slot.fd < 0:  # else the other end has never heard of it
            self._dropped.append(slot.number)
        slot.close_fd()
        del self._slots[slot.number]


class PeerMemory:
    """The slots of the other end, as this one sees them. Used by one thread at a time, but for finalizers."""

    def __init__(self) -> None:
        self._mapped: dict[int, Slot] = {}
        self._collected: deque[Collected[int]] = deque()

    def map(self, number: int, fd: int) -> None:
        """A new slot; takes over `fd`."""
        try:
            self._mapped[number] = Slot(number, map_shared(fd, os.fstat(fd).st_size))
        finally:
            os.close(fd)

    def view(self, number: int, offset: int, byte_count: int) -> Bytes:
        """A writable array over a part of a slot, which is let go of when the last view of it is collected."""
        return lent(self._mapped[number].base[offset : offset + byte_count], self._collected, number)

    def find(self, data: Bytes) -> tuple[int, int] | None:
        """The slot in which `data` lies, and where."""
        address = address_of(data)
        for number, slot in self._mapped.items():
            if (offset := slot.offset_of(address, data.size)) is not None:
                return number, offset
        return None

    def drop(self, numbers: Iterable[int]) -> None:
        """The other end has dropped these."""
        for number in numbers:
            del self._mapped[number]

    def close(self) -> None:
        """Let go of all; arrays over them stay valid as long as they live."""
        self._mapped.clear()

    def take_collected(self) -> list[Collected[int]]:
        """The slots of which a view is used no more, each as often as that."""
        collected = []
        while self._collected:
            collected.append(self._collected.popleft())
        return collected
