"""What arrives in the trainer: batches that were packed, over slots that are mapped once. `packing` has the theory."""

from __future__ import annotations

import itertools
import mmap
import os
import pickle
import weakref
from collections import deque
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastload.device import NO_MOVER, mover_of, pinned
from fastload.torchloader.ledger import Ledger
from fastload.transport.lending import Collected, lent
from fastload.transport.mapping import map_shared
from fastload.transport.pickling import Where, memory_of
from fastload.transport.slots import size_class, take_fitting

__all__ = ["Arrived", "NewSlot", "Packed", "Place", "Receiver"]

Bytes = npt.NDArray[np.uint8]

# Pieces of shared memory that wait to be used again, of some 100 KB at most.
_FREE_MAX = 32


@dataclass(slots=True)
class Arrived:
    """What a worker sent: a batch, and the worker's state after it (and `before` it, if it is the first), or None.

    `state` is `UNTOLD` where there is one, and it was not the batch to tell it with.
    """

    batch: Any
    state: Any = None
    before: Any = None
    mover: int = NO_MOVER

    def pin_memory(self) -> Arrived:
        """For threads that copy into pinned memory: torch's, and ours. Where there is a mover, the batch is begun."""
        mover = mover_of(self.mover)
        batch = pinned(self.batch) if mover is None else mover.begin(self.batch)
        return replace(self, batch=batch)


NO_SLOT = -1


class Place(NamedTuple):
    """Where a buffer of a batch lies."""

    slot: int  # its index; NO_SLOT: before the pickle
    offset: int
    byte_count: int


class NewSlot(NamedTuple):
    """A slot that the trainer has not mapped yet, as far as the worker knows."""

    slot: int  # its index
    generation: int
    fd: int
    byte_count: int


class Packed(NamedTuple):
    """What is put on the queue; when it is taken from there, it is an `Arrived`."""

    receiver: int
    worker: int
    pid: int
    data: bytes  # small buffers and the pickle; where this is empty, they lie in the last of the places
    small_bytes: int  # of small buffers
    places: list[Place]
    where: list[Where]
    new_slots: list[NewSlot]
    dropped: list[int]

    def __reduce__(self) -> tuple[Any, ...]:
        # Plain tuples: a class has to be looked up wherever one of its is unpickled.
        places, new_slots = list(map(tuple, self.places)), list(map(tuple, self.new_slots))
        return _unpacked, (*self[:5], places, self.where, new_slots, self.dropped)


_receivers: weakref.WeakValueDictionary[int, Receiver] = weakref.WeakValueDictionary()
_receiver_numbers = itertools.count()


class Receiver:
    """The slots of all workers of an iteration, as the trainer sees them. Used by one thread, but for finalizers."""

    def __init__(self, ledger: Ledger) -> None:
        self.number = next(_receiver_numbers)
        self.ledger = ledger
        self._bases: dict[tuple[int, int], tuple[int, Bytes]] = {}  # (worker, index) -> generation, memory
        self._collected: deque[Collected[tuple[int, int]]] = deque()
        self._small = _Small()
        _receivers[self.number] = self

    def unpack(self, packed: Packed) -> Arrived:
        """Its batch. Raises `OSError` where the worker is gone."""
        for index in packed.dropped:
            self._bases.pop((packed.worker, index), None)
        for slot in packed.new_slots:
            self._map(packed.worker, packed.pid, NewSlot(*slot))
        self._tell()
        places = [Place(*place) for place in packed.places]
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
        self.ledger.mapped(worker)[slot.slot] += 1

    def _view(self, worker: int, place: Place) -> Bytes:
        base = self._bases[worker, place.slot][1]
        return lent(base[place.offset : place.offset + place.byte_count], self._collected, (worker, place.slot))

    def _tell(self) -> None:
        while self._collected:
            (worker, index), was_forked = self._collected.popleft()
            if was_forked:  # to be said before the worker may use it again
                self.ledger.forked(worker)[index] += 1
            self.ledger.released(worker)[index] += 1


class _Small:
    """Shared memory for what is small, in this process and its children. It is used again, since new memory takes five
    times as long. Used by one thread, but for finalizers.
    """

    def __init__(self) -> None:
        self._free: list[Bytes] = []
        self._collected: deque[Collected[Bytes]] = deque()

    def copied(self, data: Bytes) -> tuple[Bytes, bool]:
        """A copy, and whether it is in shared memory: a process may have no more mappings than so many."""
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
        raise RuntimeError("a batch came for an iteration that is over")
    return receiver.unpack(packed)
