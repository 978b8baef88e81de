"""The slots of a worker process: memory for batches, which the trainer maps, and the counters by which it is reclaimed.

A slot is an anonymous file that is reused. It is free when nothing in the worker uses it and the trainer has released
as many buffers in it as were sent. Nothing waits for memory: if no slot is free, a new one is made. Free slots beyond a
budget are dropped, and so are slots that a forked child of the trainer or the worker may still read.

Apart from torch's queue of indexes, which is torch's, a worker has no channel from its trainer. So the trainer makes a
small anonymous file before it starts the workers, which inherit it: `SlotCounters`, which only the trainer writes. It
has, for each worker: whether the trainer can open the worker's descriptors; and for each slot of that worker, how often
the trainer has mapped it, how many buffers in it were released, and how many of those the trainer held when it was
forked, so that its child may still read them. Counters only grow (modulo 2^32), so a worker that looks late has missed
nothing.
"""

from __future__ import annotations

import itertools
import os
from multiprocessing import reduction
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastload.transport.bulk_copy import copy_into
from fastload.transport.slots import SharedSlot, SharedSlots, address_of, map_shared

Bytes = npt.NDArray[np.uint8]
Counters = npt.NDArray[np.uint32]
NO_SLOT = -1
# The most slots of a worker: the kernel maps no more into a process (vm.max_map_count). The file is sparse.
SLOTS_MAX = 1 << 16
_HEAD = 16
_ROW = _HEAD + 3 * SLOTS_MAX
# Of buffers in a slot: a cache line, which suits vector instructions.
_SLOT_ALIGNMENT = 64
# A buffer of at least this fraction of a batch has a slot to itself, so that keeping it keeps little else.
_OWN_SLOT_PART = 8
_COUNTERS_WRAP = 1 << 32  # they are uint32
_NOTHING: Bytes = np.empty(0, np.uint8)


class SlotCounters:
    """See the module. Made by the trainer; a copy that was pickled for a worker maps the same file."""

    def __init__(self, workers: int) -> None:
        """Raises `OSError` where the kernel has no anonymous files."""
        self._workers = workers
        self._fd = os.memfd_create("fastload-counters", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self._fd, workers * _ROW * 4)
            self._table = self._mapped()
        except BaseException:
            self.close_fd()
            raise

    def __getstate__(self) -> dict[str, Any]:
        # Only while a process is being started, whose arguments can carry descriptors.
        return {"workers": self._workers, "fd": reduction.DupFd(self._fd)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._workers, self._fd = state["workers"], state["fd"].detach()
        try:
            self._table = self._mapped()
        finally:
            self.close_fd()

    def close_fd(self) -> None:
        """Call it when all workers have been started. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def is_open(self, worker: int) -> bool:
        """Whether the trainer can open the worker's descriptors."""
        return bool(self._table[worker, 0])

    def set_open(self, worker: int) -> None:
        self._table[worker, 0] = 1

    def mapped(self, worker: int) -> Counters:
        """For each slot, how often the trainer has mapped it."""
        return self._of(worker, 0)

    def released(self, worker: int) -> Counters:
        """For each slot, how many buffers in it the trainer has released."""
        return self._of(worker, 1)

    def forked(self, worker: int) -> Counters:
        """For each slot, how many of those the trainer held when it was forked."""
        return self._of(worker, 2)

    def _of(self, worker: int, kind: int) -> Counters:
        begin = _HEAD + kind * SLOTS_MAX
        return self._table[worker, begin : begin + SLOTS_MAX]

    def _mapped(self) -> Counters:
        table: Counters = map_shared(self._fd, self._workers * _ROW * 4).view(np.uint32).reshape(self._workers, _ROW)
        return table


class SlotRef(NamedTuple):
    """Where a buffer of a batch lies."""

    slot: int  # its number; NO_SLOT: before the pickle
    offset: int
    byte_count: int


class WorkerSlots(SharedSlots):
    """A worker's slots: free, being filled, and in use."""

    def __init__(self, counters: SlotCounters, worker: int, retained_bytes: int) -> None:
        super().__init__(retained_bytes)
        self._mapped, self._forked = _CounterReader(counters.mapped(worker)), _CounterReader(counters.forked(worker))
        self._released = _CounterReader(counters.released(worker))
        self._open: list[SharedSlot] = []  # lent out, and not sent yet
        self._unused: list[int] = []  # numbers of dropped slots, which are reused: the counters have so many
        self._generations = itertools.count()

    def take(self, byte_count: int) -> Bytes:
        """A writable array over a slot. Raises `OSError` where none can be made."""
        self._collect()
        slot = self._taken(byte_count)
        self._open.append(slot)
        return self._lend(slot, 0, byte_count)

    def place(self, buffers: list[Bytes]) -> tuple[list[SlotRef], list[SharedSlot]]:
        """Where the buffers lie in slots, copied there if need be, and the slots; they are counted as sent."""
        in_place = [self._find(address_of(buffer), buffer.size) for buffer in buffers]
        # The copies are kept until their slots are counted as sent: until then they mark the slots as in use.
        copies = self._copied([b for b, there in zip(buffers, in_place, strict=True) if there is None])
        rest = iter(copies)
        there = [each or next(rest)[:2] for each in in_place]
        places = [SlotRef(slot.number, at, b.size) for (slot, at), b in zip(there, buffers, strict=True)]
        used = list(dict.fromkeys(slot for slot, _ in there))
        for slot, _ in there:
            slot.sent += 1
        copies.clear()
        self._open = [slot for slot in self._open if not slot.sent]
        return places, used

    def take_dropped(self) -> list[int]:
        """The numbers of slots that were dropped since the last call, to notify the trainer of."""
        return self._take_dropped()

    def _find(self, address: int, byte_count: int) -> tuple[SharedSlot, int] | None:
        """The slot that this batch was made in. Memory in older slots, which a data set may keep, is copied."""
        for slot in self._open:
            if (offset := slot.offset_of(address, byte_count)) is not None:
                return slot, offset
        return None

    def _copied(self, buffers: list[Bytes]) -> list[tuple[SharedSlot, int, Bytes]]:
        own_bytes = sum(buffer.size for buffer in buffers) // _OWN_SLOT_PART
        shared = [buffer for buffer in buffers if buffer.size < own_bytes]
        offsets = list(
            itertools.accumulate((-(-b.size // _SLOT_ALIGNMENT) * _SLOT_ALIGNMENT for b in shared), initial=0)
        )
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

    def _new(self, byte_count: int) -> SharedSlot:
        number = self._unused.pop() if self._unused else len(self._by_number)
        if number >= SLOTS_MAX:
            raise OSError(f"{SLOTS_MAX} batches are kept already")
        try:
            return self._made(number, byte_count, next(self._generations))
        except BaseException:
            self._unused.append(number)
            raise

    def _collect(self) -> None:
        """Reclaim slots that are no longer used, by worker and trainer."""
        self._reclaim()
        # In this order, the reverse of the trainer's: a buffer that is counted as released was counted before as
        # mapped, so that its descriptor is not needed, and as forked, if a child may read it.
        released = self._released.growth(len(self._by_number))
        for number, _ in self._mapped.growth(len(self._by_number)):
            self._by_number[number].close_fd()
        for number, _ in self._forked.growth(len(self._by_number)):
            self._by_number[number].was_forked = True
        for number, count in released:
            self._release(self._by_number[number], count)
        self._trim()

    def _free_if_unused(self, slot: SharedSlot) -> None:
        if not slot.lent and not slot.sent:
            self._open = [each for each in self._open if each is not slot]
        super()._free_if_unused(slot)

    def _drop(self, slot: SharedSlot) -> None:
        slot.close_fd()
        slot.base = _NOTHING  # not a view of it, which would keep the memory
        self._unused.append(slot.number)
        self._dropped.append(slot.number)


class _CounterReader:
    """One kind of counters, and their values when they were last read."""

    def __init__(self, counters: Counters) -> None:
        # Plain integers: there are few slots mostly, for which calling numpy takes longer than a loop.
        self._counters, self._seen = counters.data, list[int]()

    def growth(self, count: int) -> list[tuple[int, int]]:
        """Which of the first `count` have grown since the last call, and by how much."""
        now = self._counters[:count].tolist()
        seen = self._seen + [0] * (count - len(self._seen))
        self._seen = now + seen[count:]
        if now == seen:
            return []
        pairs = enumerate(zip(now, seen, strict=False))
        return [(index, (new - old) % _COUNTERS_WRAP) for index, (new, old) in pairs if new != old]
