"""How a batch crosses from a worker process to the trainer: a pickle on a queue, large buffers beside it.

A *slot* is shared memory of the worker (an anonymous file) that is used again and again, which saves what torch's way
costs: a new file, its page faults and a socket for every tensor. The worker packs a batch in the thread that made it,
so what cannot be pickled is an error there. Buffers of 64 KiB or more are copied into a slot, or lie in one already,
where `default_collate` stacked them; a large one has a slot to itself, the others of a batch share one. The memory of
small tensors goes before the pickle, and is copied to shared memory where it arrives, since torch's is there, too. The
trainer opens `/proc/<worker>/fd/<n>` and maps the slot once; then the worker closes its descriptor.

The arrays that the trainer makes of a slot are writable and belong to the user. A slot is used again when nothing in
the worker uses it and the trainer's `Ledger` says that as many buffers were let go of as were sent. What was let go of
is noted in a deque (see `lending`), and the next batch's unpacking carries that into the ledger. So what is kept stays
as it is, for as long as it is kept, and nobody waits for memory: where no slot is free, a new one is made. Free slots
beyond a budget are dropped, and so are those that a child of the trainer or the worker may still look at.

Where a slot cannot be had (no memory, no descriptors), a batch crosses in torch's way.
"""

from __future__ import annotations

import io
import math
import os

import numpy as np
import numpy.typing as npt
import torch

from fastload import callers
from fastload.torchloader.ledger import Ledger
from fastload.torchloader.unpacking import NO_SLOT, Arrived, NewSlot, Packed, Place
from fastload.torchloader.workslots import Slots
from fastload.transport.pickling import FORKING_TABLE, buffers_of, dump_apart
from fastload.transport.slots import SMALL_BYTES

__all__ = ["Packer"]

Bytes = npt.NDArray[np.uint8]

# A longer pickle, with the small buffers before it, lies in a slot, too: the queue would carry it in pieces. For
# shorter ones a slot is more to do than a few copies (64 kB: 15 to 30 us a batch more).
_DATA_BYTES_MAX = 90 << 10
# Where buffers begin before a pickle.
_ALIGNMENT = 16


class Packer:
    """Packs the batches of one worker. Used by one thread, but for finalizers."""

    def __init__(self, ledger: Ledger, receiver: int, worker: int, retained_bytes: int) -> None:
        self._ledger, self._receiver, self._worker = ledger, receiver, worker
        self._slots = Slots(ledger, worker, retained_bytes)
        self._is_open, self._has_warned = False, False

    def pack(self, arrived: Arrived) -> Packed | Arrived:
        """What to put on the queue. Raises what pickling raises."""
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
        new = [NewSlot(s.index, s.generation, s.fd, s.base.size) for s in used if s.fd >= 0]
        dropped = self._slots.take_dropped()
        sent = bytes(data), small_bytes, there, where, new, dropped
        return Packed(self._receiver, self._worker, os.getpid(), *sent)

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
            callers.warn(
                f"worker {self._worker} of the loader has no shared memory for a batch ({error}); it and others may "
                "cross more slowly. Raise the memory or the descriptors (ulimit -n) that a process may have",
                RuntimeWarning,
            )


def _appended(data: bytearray, buffer: Bytes) -> Place:
    """Where a buffer is put behind the others."""
    data += bytes(-len(data) % _ALIGNMENT)
    place = Place(NO_SLOT, len(data), buffer.size)
    data += buffer.data
    return place
