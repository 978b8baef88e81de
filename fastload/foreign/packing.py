"""How a batch crosses from a worker process to the trainer: a pickle on a queue, large buffers beside it.

A *slot* is shared memory of the worker (an anonymous file) that is used again and again, which saves what torch's way
costs: a new file, its page faults and a socket for every tensor. The worker packs a batch in the thread that made it,
so what cannot be pickled is an error there. Buffers of 64 KiB or more are copied into a slot, or lie in one already,
where `default_collate` stacked them; a large one has a slot to itself, the others of a batch share one. The trainer
opens `/proc/<worker>/fd/<n>` and maps the slot once; then the worker closes its descriptor.

The arrays that the trainer makes of a slot are writable and belong to the user. A slot is used again when nothing in
the worker uses it and the trainer's `Ledger` says that as many buffers were let go of as were sent. What was let go of
is noted in a deque (see `lending`), and the next batch's unpacking carries that into the ledger. So what is kept stays
as it is, for as long as it is kept, and nobody waits for memory: where no slot is free, a new one is made. Free slots
beyond a budget are dropped, and so are those that a child of the trainer or the worker may still look at.

Where a slot cannot be had (no memory, no descriptors), a batch crosses in torch's way.
"""

from __future__ import annotations

import io
import itertools
import math
import os
import pickle
import warnings
import weakref
from collections import deque
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from fastload.foreign.ledger import SLOTS_MAX, Counters, Ledger
from fastload.transfer import NO_MOVER, mover_of, pinned
from fastload.transport.filling import copy_into
from fastload.transport.lending import Collected, lent
from fastload.transport.mapping import map_shared
from fastload.transport.pickling import FORKING_TABLE, is_plain, reduced, tensor_over
from fastload.transport.slots import SMALL_BYTES, address_of, size_class, take_fitting

Bytes = npt.NDArray[np.uint8]

# Where buffers begin in a slot: a cache line, which vector instructions like.
_ALIGNMENT = 64
# A buffer of at least this part of a batch has a slot to itself, so that keeping it keeps little else.
_OWN_SLOT_PART = 8
# A longer pickle lies in a slot, too: the queue would carry it in pieces. For shorter ones a slot is more to do than a
# few copies (64 kB: 15 to 30 us a batch more).
_PICKLE_BYTES_MAX = 90 << 10
_COUNTERS_WRAP = 1 << 32  # they are uint32
_NOTHING: Bytes = np.empty(0, np.uint8)


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


class _Place(NamedTuple):
    """Where a buffer of a batch lies."""

    slot: int  # its index
    offset: int
    byte_count: int


class _NewSlot(NamedTuple):
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
    data: bytes  # the pickle; where this is empty, it lies in the last of the places
    places: list[_Place]
    new_slots: list[_NewSlot]
    dropped: list[int]

    def __reduce__(self) -> tuple[Any, ...]:
        # Plain tuples: a class has to be looked up wherever one of its is unpickled.
        places, new_slots = list(map(tuple, self.places)), list(map(tuple, self.new_slots))
        return _unpacked, (*self[:4], places, new_slots, self.dropped)


# In the worker


@dataclass(slots=True, eq=False)
class _Slot:
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


class Packer:
    """Packs the batches of one worker. Used by one thread, but for finalizers."""

    def __init__(self, ledger: Ledger, receiver: int, worker: int, retained_bytes: int) -> None:
        self._ledger, self._receiver, self._worker = ledger, receiver, worker
        self._slots = _Slots(ledger, worker, retained_bytes)
        self._is_open, self._has_warned = False, False

    def pack(self, arrived: Arrived) -> Packed | Arrived:
        """What to put on the queue. Raises what pickling raises."""
        if not self._may_send():
            return arrived
        buffers: list[Bytes] = []
        stream = io.BytesIO()
        _Pickler(stream, buffers, self._slots).dump((arrived.batch, arrived.state, arrived.before, arrived.mover))
        data = stream.getvalue()
        if len(data) > _PICKLE_BYTES_MAX:
            buffers.append(np.frombuffer(data, np.uint8))
            data = b""
        try:
            placed = self._slots.place(buffers)
        except OSError as error:
            self._warn(error)
            return arrived
        places, used = placed
        new = [_NewSlot(s.index, s.generation, s.fd, s.base.size) for s in used if s.fd >= 0]
        dropped = self._slots.take_dropped()
        return Packed(self._receiver, self._worker, os.getpid(), data, places, new, dropped)

    def take_tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An empty tensor to make a batch in, over a slot where it is large enough to lie in one; here, whatever device
        the user has torch make tensors on.
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
        """Whether the trainer can open what this process has open. Where it can, it will."""
        self._is_open = self._is_open or self._ledger.is_open(self._worker)
        return self._is_open

    def _warn(self, error: OSError) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"worker {self._worker} of the loader has no shared memory for a batch ({error}); it and others may "
                "cross more slowly. Raise the memory or the descriptors (ulimit -n) that a process may have",
                RuntimeWarning,
                stacklevel=2,
            )


class _Pickler(pickle.Pickler):
    """torch's, but that plain tensors and arrays give their memory; large buffers are put aside."""

    def __init__(self, stream: io.BytesIO, buffers: list[Bytes], slots: _Slots) -> None:
        # Not a method: a cycle would keep the batch, which the pickler remembers, until the collector comes by.
        super().__init__(stream, 5, buffer_callback=partial(_put_aside, buffers))
        self.dispatch_table = FORKING_TABLE
        self._slots = slots

    def reducer_override(self, value: Any) -> Any:
        if type(value) is torch.Tensor and is_plain(value) and value.is_contiguous():
            made_in = self._slots.holding(value.data_ptr(), value.nbytes)
            if made_in is not None:
                return tensor_over(made_in, value)
        return reduced(value)


def _put_aside(buffers: list[Bytes], buffer: pickle.PickleBuffer) -> bool:
    """Whether it is small, and stays in the pickle."""
    raw = buffer.raw()
    if raw.nbytes < SMALL_BYTES:
        return True
    buffers.append(np.frombuffer(raw, np.uint8))
    return False


class _Slots:
    """A worker's slots: those that are free, those that are being filled, and those that somebody uses."""

    def __init__(self, ledger: Ledger, worker: int, retained_bytes: int) -> None:
        self._retained_bytes = retained_bytes
        self._mapped, self._forked = _Counted(ledger.mapped(worker)), _Counted(ledger.forked(worker))
        self._released = _Counted(ledger.released(worker))
        self._by_index: dict[int, _Slot] = {}
        self._free: list[_Slot] = []
        self._open: list[_Slot] = []  # lent out, and not sent since
        self._unused: list[int] = []  # indexes
        self._generations = itertools.count()
        self._collected: deque[Collected[_Slot]] = deque()
        self._dropped: list[int] = []

    def take(self, byte_count: int) -> Bytes:
        """A writable array over a slot. Raises `OSError` where there can be none."""
        self._collect()
        slot = take_fitting(self._free, byte_count, lambda slot: slot.base.size) or self._new(byte_count)
        slot.lent += 1
        self._open.append(slot)
        return lent(slot.base[:byte_count], self._collected, slot)

    def place(self, buffers: list[Bytes]) -> tuple[list[_Place], list[_Slot]]:
        """Where in slots the buffers lie, or were copied to, and which slots those are. The trainer will be told."""
        in_place = [self._find(address_of(buffer), buffer.size) for buffer in buffers]
        # The arrays that were copied to are kept until their slots are counted as sent: till then they are in use.
        copies = self._copied([b for b, there in zip(buffers, in_place, strict=True) if there is None])
        rest = iter(copies)
        there = [each or next(rest)[:2] for each in in_place]
        places = [_Place(slot.index, at, b.size) for (slot, at), b in zip(there, buffers, strict=True)]
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

    def holding(self, address: int, byte_count: int) -> Bytes | None:
        """The memory of a slot that a batch was made in, if it lies there."""
        found = self._find(address, byte_count)
        return None if found is None else found[0].base[found[1] : found[1] + byte_count]

    def _find(self, address: int, byte_count: int) -> tuple[_Slot, int] | None:
        """The slot that a batch was made in; older ones, which a data set may have kept, are copied from."""
        for slot in self._open:
            offset = address - slot.address
            if offset >= 0 and offset + byte_count <= slot.base.size:
                return slot, offset
        return None

    def _copied(self, buffers: list[Bytes]) -> list[tuple[_Slot, int, Bytes]]:
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

    def _new(self, byte_count: int) -> _Slot:
        index = self._unused.pop() if self._unused else len(self._by_index)
        if index >= SLOTS_MAX:
            raise OSError(f"{SLOTS_MAX} batches are kept already")
        fd = os.memfd_create("fastload-slot", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size_class(byte_count))
            slot = _Slot(index, next(self._generations), map_shared(fd, size_class(byte_count)), fd)
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

    def _free_if_unused(self, slot: _Slot) -> None:
        if slot.lent or slot.sent:
            return
        self._open = [each for each in self._open if each is not slot]
        if slot.was_forked:
            self._drop(slot)
        else:
            self._free.append(slot)

    def _drop(self, slot: _Slot) -> None:
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


# In the trainer

_receivers: weakref.WeakValueDictionary[int, Receiver] = weakref.WeakValueDictionary()
_receiver_numbers = itertools.count()


class Receiver:
    """The slots of all workers of an iteration, as the trainer sees them. Used by one thread, but for finalizers."""

    def __init__(self, ledger: Ledger) -> None:
        self.number = next(_receiver_numbers)
        self.ledger = ledger
        self._bases: dict[tuple[int, int], tuple[int, Bytes]] = {}  # (worker, index) -> generation, memory
        self._collected: deque[Collected[tuple[int, int]]] = deque()
        _receivers[self.number] = self

    def unpack(self, packed: Packed) -> Arrived:
        """Its batch. Raises `OSError` where the worker is gone."""
        for index in packed.dropped:
            self._bases.pop((packed.worker, index), None)
        for slot in packed.new_slots:
            self._map(packed.worker, packed.pid, _NewSlot(*slot))
        self._tell()
        buffers = [self._view(packed.worker, _Place(*place)) for place in packed.places]
        data = packed.data or buffers.pop().data
        return Arrived(*pickle.loads(data, buffers=buffers))

    def _map(self, worker: int, pid: int, slot: _NewSlot) -> None:
        key = worker, slot.slot
        if key in self._bases and self._bases[key][0] == slot.generation:
            return
        fd = os.open(f"/proc/{pid}/fd/{slot.fd}", os.O_RDWR | os.O_CLOEXEC)
        try:
            self._bases[key] = slot.generation, map_shared(fd, slot.byte_count)
        finally:
            os.close(fd)
        self.ledger.mapped(worker)[slot.slot] += 1

    def _view(self, worker: int, place: _Place) -> Bytes:
        base = self._bases[worker, place.slot][1]
        return lent(base[place.offset : place.offset + place.byte_count], self._collected, (worker, place.slot))

    def _tell(self) -> None:
        while self._collected:
            (worker, index), was_forked = self._collected.popleft()
            if was_forked:  # to be said before the worker may use it again
                self.ledger.forked(worker)[index] += 1
            self.ledger.released(worker)[index] += 1


def _unpacked(*fields: Any) -> Arrived:
    packed = Packed(*fields)
    receiver = _receivers.get(packed.receiver)
    if receiver is None:
        raise RuntimeError("a batch came for an iteration that is over")
    return receiver.unpack(packed)
