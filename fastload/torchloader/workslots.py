"""The slots of a worker: memory for batches, which the trainer maps. `packing` has the theory."""

from __future__ import annotations

import itertools
import os
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fastload.torchloader.ledger import SLOTS_MAX, Counters, Ledger
from fastload.torchloader.unpacking import Place
from fastload.transport.filling import copy_into
from fastload.transport.lending import Collected, lent
from fastload.transport.mapping import map_shared
from fastload.transport.slots import address_of, size_class, take_fitting

__all__ = ["Slot", "Slots"]

Bytes = npt.NDArray[np.uint8]

# Where buffers begin in a slot: a cache line, which vector instructions like.
_ALIGNMENT = 64
# A buffer of at least this part of a batch has a slot to itself, so that keeping it keeps little else.
_OWN_SLOT_PART = 8
_COUNTERS_WRAP = 1 << 32  # they are uint32
_NOTHING: Bytes = np.empty(0, np.uint8)


@dataclass(slots=True, eq=False)
class Slot:
    """Memory of the worker. Another slot of the same `index` has another `generation`."""

    index: int
    generation: int
    base: Bytes
    fd: int
    address: int = field(init=False)
    lent: int = 0  # arrays of this process that are in use
    sent: int = 0  # buffers that the trainer was sent and has not let go of
    was_forked: bool = False  # a process that did it while it used this, so that a child may see it

    def __post_init__(self) -> None:
        self.address = address_of(self.base)

    def close_fd(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Slots:
    """A worker's slots: those that are free, those that are being filled, and those that somebody uses."""

    def __init__(self, ledger: Ledger, worker: int, retained_bytes: int) -> None:
        self._retained_bytes = retained_bytes
        self._mapped, self._forked = _Counted(ledger.mapped(worker)), _Counted(ledger.forked(worker))
        self._released = _Counted(ledger.released(worker))
        self._by_index: dict[int, Slot] = {}
        self._free: list[Slot] = []
        self._open: list[Slot] = []  # lent out, and not sent since
        self._unused: list[int] = []  # indexes
        self._generations = itertools.count()
        self._collected: deque[Collected[Slot]] = deque()
        self._dropped: list[int] = []

    def take(self, byte_count: int) -> Bytes:
        """A writable array over a slot. Raises `OSError` where there can be none."""
        self._collect()
        slot = take_fitting(self._free, byte_count, lambda slot: slot.base.size) or self._new(byte_count)
        slot.lent += 1
        self._open.append(slot)
        return lent(slot.base[:byte_count], self._collected, slot)

    def place(self, buffers: list[Bytes]) -> tuple[list[Place], list[Slot]]:
        """Where in slots the buffers lie, or were copied to, and which slots those are. The trainer will be told."""
        in_place = [self._find(address_of(buffer), buffer.size) for buffer in buffers]
        # The arrays that were copied to are kept until their slots are counted as sent: till then they are in use.
        copies = self._copied([b for b, there in zip(buffers, in_place, strict=True) if there is None])
        rest = iter(copies)
        there = [each or next(rest)[:2] for each in in_place]
        places = [Place(slot.index, at, b.size) for (slot, at), b in zip(there, buffers, strict=True)]
        used = list(dict.fromkeys(slot for slot, _ in there))
        for slot, _ in there:
            slot.sent += 1
        copies.clear()
        self._open = [slot for slot in self._open if not slot.sent]
        return places, used

    def take_dropped(self) -> list[int]:
        """The indexes of slots that are no more, for the trainer to hear once."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def _find(self, address: int, byte_count: int) -> tuple[Slot, int] | None:
        """The slot that a batch was made in; older ones, which a data set may have kept, are copied from."""
        for slot in self._open:
            offset = address - slot.address
            if offset >= 0 and offset + byte_count <= slot.base.size:
                return slot, offset
        return None

    def _copied(self, buffers: list[Bytes]) -> list[tuple[Slot, int, Bytes]]:
        own_bytes = sum(buffer.size for buffer in buffers) // _OWN_SLOT_PART
        shared = [buffer for buffer in buffers if buffer.size < own_bytes]
        offsets = list(itertools.accumulate((-(-b.size // _ALIGNMENT) * _ALIGNMENT for b in shared), initial=0))
        together = self.take(offsets[-1]) if shared else np.empty(0, np.uint8)
        common = self._open[-1] if shared else None
        rest, copied = iter(offsets), []
        for buffer in buffers:
            if buffer.size < own_bytes:
                assert common is not None, "there are buffers that share it"
                slot, offset, memory = common, next(rest), together
            else:
                memory = self.take(buffer.size)
                slot, offset = self._open[-1], 0
            copy_into(memory[offset : offset + buffer.size], buffer)
            copied.append((slot, offset, memory))
        return copied

    def _new(self, byte_count: int) -> Slot:
        index = self._unused.pop() if self._unused else len(self._by_index)
        if index >= SLOTS_MAX:
            raise OSError(f"{SLOTS_MAX} batches are kept already")
        fd = os.memfd_create("fastload-slot", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size_class(byte_count))
            slot = Slot(index, next(self._generations), map_shared(fd, size_class(byte_count)), fd)
        except BaseException:
            os.close(fd)
            self._unused.append(index)
            raise
        self._by_index[index] = slot
        return slot

    def _collect(self) -> None:
        """Hear of what is not used any more, here and there."""
        while self._collected:
            slot, was_forked = self._collected.popleft()
            slot.lent -= 1
            slot.was_forked |= was_forked
            self._free_if_unused(slot)
        # Looked at in this order: what was let go of has been mapped before, so that its descriptor is not needed, and
        # it was said before whether a child may see it.
        released = self._released.news(len(self._by_index))
        for index, _ in self._mapped.news(len(self._by_index)):
            self._by_index[index].close_fd()
        for index, _ in self._forked.news(len(self._by_index)):
            self._by_index[index].was_forked = True
        for index, count in released:
            slot = self._by_index[index]
            slot.sent -= count
            self._free_if_unused(slot)
        while sum(slot.base.size for slot in self._free) > self._retained_bytes:
            self._drop(self._free.pop(0))

    def _free_if_unused(self, slot: Slot) -> None:
        if slot.lent or slot.sent:
            return
        self._open = [each for each in self._open if each is not slot]
        if slot.was_forked:
            self._drop(slot)
        else:
            self._free.append(slot)

    def _drop(self, slot: Slot) -> None:
        slot.close_fd()
        slot.base = _NOTHING  # no view of it, which would keep the memory
        self._unused.append(slot.index)
        self._dropped.append(slot.index)


class _Counted:
    """Counters of the ledger, and what was seen of them."""

    def __init__(self, counters: Counters) -> None:
        # Plain numbers: there are a few slots mostly, and numpy takes longer to be asked than to look.
        self._counters, self._seen = counters.data, list[int]()

    def news(self, count: int) -> list[tuple[int, int]]:
        """Which of the first `count` have grown since, and by how much."""
        now = self._counters[:count].tolist()
        seen = self._seen + [0] * (count - len(self._seen))
        self._seen = now + seen[count:]
        if now == seen:
            return []
        pairs = enumerate(zip(now, seen, strict=False))
        return [(index, (new - old) % _COUNTERS_WRAP) for index, (new, old) in pairs if new != old]
