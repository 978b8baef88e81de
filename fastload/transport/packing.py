"""How a batch crosses from a worker process to the trainer: a pickle on a queue, large buffers beside it.

The worker packs a batch in the thread that made it, so what cannot be pickled is an error there. Buffers of 64 KiB or
more are copied into a slot of the worker (see `worker_slots`), or lie in one already, where `default_collate` stacked
them; a large one has a slot to itself, the others of a batch share one. Compared with torch's way, this saves a new
file, its page faults and a socket for every tensor. The memory of small tensors goes before the pickle, and is copied
to shared memory on arrival, since torch's tensors arrive in shared memory too. The trainer opens
`/proc/<worker>/fd/<n>` and maps the slot once; then the worker closes its descriptor.

The arrays that the trainer makes over a slot are writable and belong to the user. When the last view of one is gone, a
notice goes to a deque (see `slots`), and the next batch's unpacking adds it to the trainer's `SlotCounters`. So an
array that is kept stays as it is, for as long as it is kept.

Where a slot cannot be had (no memory, no descriptors), a batch crosses in torch's way.
"""

from __future__ import annotations

import io
import itertools
import math
import mmap
import os
import pickle
import weakref
from collections import deque
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from fastload import callers
from fastload.device import NO_MOVER, mover_of, pinned
from fastload.transport.pickling import FORKING_TABLE, BufferOffset, buffers_of, dump_apart, memory_of
from fastload.transport.slots import SMALL_BYTES, Collected, lent, map_shared, size_class, take_fitting
from fastload.transport.worker_slots import NO_SLOT, SlotCounters, SlotRef, WorkerSlots

Bytes = npt.NDArray[np.uint8]
# Free pieces of shared memory, of some 100 KB at most, that are kept for reuse.
_FREE_MAX = 32
# A longer pickle, with the small buffers before it, lies in a slot too: the queue would send it in pieces. For shorter
# ones a slot is more work than a few copies (64 kB: 15 to 30 us a batch more).
_DATA_BYTES_MAX = 90 << 10
# Of buffers before a pickle.
_ALIGNMENT = 16


@dataclass(slots=True)
class Arrived:
    """A batch as it arrives, and the worker's state after it (and `before` it, if it is the first), or None.

    `state` is `NOT_REPORTED` where there is one, and it was not due with this batch.
    """

    batch: Any
    state: Any = None
    before: Any = None
    mover: int = NO_MOVER

    def pin_memory(self) -> Arrived:
        """Called by pinning threads, torch's among them. If the iteration has a mover, it begins to move the batch."""
        mover = mover_of(self.mover)
        batch = pinned(self.batch) if mover is None else mover.begin(self.batch)
        return replace(self, batch=batch)


class NewSlot(NamedTuple):
    """A slot that the trainer has not mapped yet, as far as the worker knows."""

    slot: int  # its number
    generation: int
    fd: int
    byte_count: int


class Packed(NamedTuple):
    """A packed batch; unpickled, it is an `Arrived`."""

    receiver: int
    worker: int
    pid: int
    data: bytes  # small buffers and the pickle; if empty, they lie in the last of the places
    small_bytes: int  # of small buffers
    places: list[SlotRef]
    where: list[BufferOffset]
    new_slots: list[NewSlot]
    dropped: list[int]

    def __reduce__(self) -> tuple[Any, ...]:
        # Plain tuples: unpickling an instance looks up its class each time.
        places, new_slots = list(map(tuple, self.places)), list(map(tuple, self.new_slots))
        return _unpacked, (*self[:5], places, self.where, new_slots, self.dropped)


_receivers: weakref.WeakValueDictionary[int, Receiver] = weakref.WeakValueDictionary()
_receiver_numbers = itertools.count()


class Receiver:
    """The slots of all workers of an iteration, as mapped by the trainer. Used by one thread, except for finalizers."""

    def __init__(self, counters: SlotCounters) -> None:
        self.number = next(_receiver_numbers)
        self.counters = counters
        self._bases: dict[tuple[int, int], tuple[int, Bytes]] = {}  # (worker, index) -> generation, memory
        self._collected: deque[Collected[tuple[int, int]]] = deque()
        self._small = _Small()
        _receivers[self.number] = self

    def unpack(self, packed: Packed) -> Arrived:
        """The batch. Raises `OSError` where the worker is gone."""
        for index in packed.dropped:
            self._bases.pop((packed.worker, index), None)
        for slot in packed.new_slots:
            self._map(packed.worker, packed.pid, NewSlot(*slot))
        self._count_released()
        places = [SlotRef(*place) for place in packed.places]
        is_shared = True
        if packed.data:
            data = np.frombuffer(packed.data, np.uint8)
            small, is_shared = self._small.copied(data[: packed.small_bytes])
        else:
            small = data = self._view(packed.worker, places.pop())
        buffers = [
            small[place.offset : place.offset + place.byte_count]
            if place.slot == NO_SLOT
            else self._view(packed.worker, place)
            for place in places
        ]
        memory = memory_of(buffers, packed.where, is_shared=is_shared)
        return Arrived(*pickle.loads(data[packed.small_bytes :].data, buffers=memory))

    def _map(self, worker: int, pid: int, slot: NewSlot) -> None:
        key = worker, slot.slot
        if key in self._bases and self._bases[key][0] == slot.generation:
            return
        fd = os.open(f"/proc/{pid}/fd/{slot.fd}", os.O_RDWR | os.O_CLOEXEC)
        try:
            self._bases[key] = slot.generation, map_shared(fd, slot.byte_count)
        finally:
            os.close(fd)
        self.counters.mapped(worker)[slot.slot] += 1

    def _view(self, worker: int, place: SlotRef) -> Bytes:
        base = self._bases[worker, place.slot][1]
        return lent(base[place.offset : place.offset + place.byte_count], self._collected, (worker, place.slot))

    def _count_released(self) -> None:
        while self._collected:
            (worker, index), was_forked = self._collected.popleft()
            if was_forked:  # counted first, before the worker may reuse it
                self.counters.forked(worker)[index] += 1
            self.counters.released(worker)[index] += 1


class _Small:
    """Shared memory for small buffers, between this process and its children. It is reused, since new memory takes five
    times as long. Used by one thread, except for finalizers.
    """

    def __init__(self) -> None:
        self._free: list[Bytes] = []
        self._collected: deque[Collected[Bytes]] = deque()

    def copied(self, data: Bytes) -> tuple[Bytes, bool]:
        """A copy, and whether it lies in shared memory: the number of mappings of a process is limited."""
        if not data.size:
            return data, True
        while self._collected:
            used, was_forked = self._collected.popleft()
            if not was_forked and len(self._free) < _FREE_MAX:
                self._free.append(used)
        memory = take_fitting(self._free, data.size, len)
        if memory is None:
            try:
                memory = np.frombuffer(mmap.mmap(-1, size_class(data.size)), np.uint8)
            except OSError:
                return data.copy(), False
        copy = lent(memory[: data.size], self._collected, memory)
        copy[:] = data
        return copy, True


def _unpacked(*fields: Any) -> Arrived:
    packed = Packed(*fields)
    receiver = _receivers.get(packed.receiver)
    if receiver is None:
        raise RuntimeError("a batch arrived for an iteration that is over")
    return receiver.unpack(packed)


class Packer:
    """Packs the batches of one worker. Used by one thread, except for finalizers."""

    def __init__(self, counters: SlotCounters, receiver: int, worker: int, retained_bytes: int) -> None:
        self._counters, self._receiver, self._worker = counters, receiver, worker
        self._slots = WorkerSlots(counters, worker, retained_bytes)
        self._is_open, self._has_warned = False, False

    def pack(self, arrived: Arrived) -> Packed | Arrived:
        """The message for the queue. Raises what pickling raises."""
        if not self._may_send():
            return arrived
        pickled, data = io.BytesIO(), bytearray()
        value = arrived.batch, arrived.state, arrived.before, arrived.mover
        buffers, where = buffers_of(dump_apart(value, pickled, FORKING_TABLE))
        places = [_appended(data, buffer) if buffer.size < SMALL_BYTES else None for buffer in buffers]
        large = [buffer for buffer in buffers if buffer.size >= SMALL_BYTES]
        small_bytes = len(data)
        data += pickled.getbuffer()
        if len(data) > _DATA_BYTES_MAX:
            places.append(None)
            large.append(np.frombuffer(data, np.uint8))
            data = bytearray()
        try:
            in_slots, used = self._slots.place(large)
        except OSError as error:
            self._warn(error)
            return arrived
        rest = iter(in_slots)
        there = [place or next(rest) for place in places]
        new = [NewSlot(s.number, s.generation, s.fd, s.base.size) for s in used if s.fd >= 0]
        dropped = self._slots.take_dropped()
        sent = bytes(data), small_bytes, there, where, new, dropped
        return Packed(self._receiver, self._worker, os.getpid(), *sent)

    def take_tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An empty tensor for a batch, over a slot where it is large enough; in host memory, whatever torch's default
        device is.
        """
        byte_count = math.prod(shape) * dtype.itemsize
        if byte_count < SMALL_BYTES or not self._may_send():
            return torch.empty(shape, dtype=dtype, device="cpu")
        try:
            memory = self._slots.take(byte_count)
        except OSError as error:
            self._warn(error)
            return torch.empty(shape, dtype=dtype, device="cpu")
        return torch.frombuffer(memory, dtype=dtype).view(shape)

    def _may_send(self) -> bool:
        """Whether the trainer can open this process's descriptors. Once true, it stays true."""
        self._is_open = self._is_open or self._counters.is_open(self._worker)
        return self._is_open

    def _warn(self, error: OSError) -> None:
        if not self._has_warned:
            self._has_warned = True
            callers.warn(
                f"worker {self._worker} of the loader has no shared memory for a batch ({error}); this batch and "
                "others may cross more slowly. Raise the limit on memory or descriptors (ulimit -n) of a process",
                RuntimeWarning,
            )


def _appended(data: bytearray, buffer: Bytes) -> SlotRef:
    """Append a buffer; its place."""
    data += bytes(-len(data) % _ALIGNMENT)
    place = SlotRef(NO_SLOT, len(data), buffer.size)
    data += buffer.data
    return place
