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
import math
import os
import pickle
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fastload import callers
from fastload.foreign.ledger import Ledger
from fastload.foreign.unpacking import Arrived, NewSlot, Packed
from fastload.foreign.workslots import Slots
from fastload.transport.pickling import FORKING_TABLE, is_plain, reduced, tensor_over
from fastload.transport.slots import SMALL_BYTES

__all__ = ["Packer"]

Bytes = npt.NDArray[np.uint8]

# A longer pickle lies in a slot, too: the queue would carry it in pieces. For shorter ones a slot is more to do than a
# few copies (64 kB: 15 to 30 us a batch more).
_PICKLE_BYTES_MAX = 90 << 10


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
        new = [NewSlot(s.index, s.generation, s.fd, s.base.size) for s in used if s.fd >= 0]
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
            callers.warn(
                f"worker {self._worker} of the loader has no shared memory for a batch ({error}); it and others may "
                "cross more slowly. Raise the memory or the descriptors (ulimit -n) that a process may have",
                RuntimeWarning,
            )


class _Pickler(pickle.Pickler):
    """torch's, but that plain tensors and arrays give their memory; large buffers are put aside."""

    def __init__(self, stream: io.BytesIO, buffers: list[Bytes], slots: Slots) -> None:
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
