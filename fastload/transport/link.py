"""One end of a connection between two processes, over which Python objects pass without copying their large arrays.

A message is a pickle (protocol 5) and its buffers (see `transport.pickling`). A buffer of 64 KiB or more crosses in
shared memory: if it lies in a slot already, by reference; otherwise it is copied into one. Small buffers follow the
pickle. Everything that is received is writable, and belongs to the receiver.

**On the wire**, all integers little-endian uint64: the length of a head, the length of what follows it; the head, which
is a pickled `_Head`; the object's pickle; the small buffers end to end. Descriptors of slots that are new to the other
end come with the first bytes.

**Slots.** Fresh memory for what crosses costs more in page faults, and in names that outlive crashes, than the copying.
So each end has a `SharedPool` of slots, each over a memfd whose descriptor is sent to the other end once. A slot is
lent out as an array (see `transport.slots`). It is reused when

- the last array or tensor over it has been collected in the process that owns it,
- the other process has released it as often as it was sent, and
- neither process was forked meanwhile: the child holds what its parent held, and never releases it. Such a slot is
  dropped, and its memory goes with the last process that maps it.

Both kinds of notices may come late and are never lost: a finalizer, which may run in any thread at any point, appends
to a deque, and the other process's releases come with its next message. So an array that a user keeps stays as it is,
and a release that is missing costs memory, not a wrong value. Free slots beyond `retained_bytes` are dropped, and the
other end is notified to drop them too.

Both ends are processes of one user, one of which started the other; so they trust each other's pickles. Each end is
used by one thread at a time.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import pickle
import socket
import struct
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastload.transport.bulk_copy import copy_into
from fastload.transport.pickling import BufferOffset, buffers_of, dump_apart, memory_of
from fastload.transport.slots import SMALL_BYTES, Collected, SharedSlot, SharedSlots, address_of, lent, map_shared

Bytes = npt.NDArray[np.uint8]


_LENGTHS = struct.Struct("<QQ")
# The kernel takes no more descriptors with one message (SCM_MAX_FD).
_FDS_MAX = 253
# No message comes near it: a greater length is not one of a message.
_MESSAGE_BYTES_MAX = 1 << 40


class LinkClosedError(ConnectionError):
    """The other end has closed, or its process has ended."""


class _BufferRef(NamedTuple):
    """Where a buffer of a message lies."""

    kind: str  # "small": after the pickle; "mine": in a slot of the sender; "yours": in one of the receiver
    number: int
    offset: int
    byte_count: int


class _Head(NamedTuple):
    pickle_bytes: int
    places: list[_BufferRef]
    where: list[BufferOffset]
    new_slots: list[int]  # whose descriptors come with this message
    collected: list[Collected[int]]  # releases of slots of the receiver
    dropped: list[int]  # slots that the sender has dropped


class Link:
    """See the module. `pool` holds this end's large buffers; take memory that will be sent from it."""

    def __init__(self, sock: socket.socket, pool: SharedPool) -> None:
        self._sock, self.pool = sock, pool
        self._peer = PeerMemory()

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, message: Any) -> None:
        """Send. Raises what pickling raises, before anything is sent; `LinkClosedError` where the other end is gone."""
        stream = io.BytesIO()
        buffers, where = buffers_of(dump_apart(message, stream))
        places, small, new_slots = self._placed(buffers)
        data, numbers = stream.getbuffer(), [slot.number for slot in new_slots]
        head = _Head(len(data), places, where, numbers, self._peer.take_collected(), self.pool.take_dropped())
        self._send(pickle.dumps(tuple(head), 5), [data, *small], [slot.fd for slot in new_slots])
        for slot in new_slots:
            slot.close_fd()

    def receive(self) -> Any:
        """Wait for the next message. Raises `LinkClosedError` where the other end is gone."""
        head_bytes, body_bytes, fds = self._first()
        try:
            head = _Head(*pickle.loads(self._exactly(head_bytes)))
            for number in head.new_slots:
                self._peer.map(number, fds.pop(0))
        finally:
            for fd in fds:
                os.close(fd)
        body = memoryview(self._exactly(body_bytes))
        self._peer.drop(head.dropped)
        buffers = list(self._buffers(head.places, body[head.pickle_bytes :]))
        self.pool.release(head.collected)  # after the message has taken its own references
        return pickle.loads(body[: head.pickle_bytes], buffers=memory_of(buffers, head.where))

    def close(self) -> None:
        """Close this end; the other end is notified, even if a forked child holds the socket too. Idempotent."""
        with contextlib.suppress(OSError):  # this end or the other is closed already
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        self.pool.close()
        self._peer.close()

    def _placed(self, buffers: list[Bytes]) -> tuple[list[_BufferRef], list[memoryview], list[SharedSlot]]:
        """Where each buffer lies, the small buffers, and the slots that are new to the other end."""
        places, small, new_slots = [], [], []
        for data in buffers:
            if data.size < SMALL_BYTES:
                small.append(data.data)
                places.append(_BufferRef("small", 0, 0, data.size))
            elif (there := self._peer.find(data)) is not None:
                places.append(_BufferRef("yours", *there, data.size))
            else:
                slot, offset = self.pool.count_sent(data) or self._copied(data)
                if slot.fd >= 0 and slot not in new_slots:
                    new_slots.append(slot)
                places.append(_BufferRef("mine", slot.number, offset, data.size))
        return places, small, new_slots

    def _copied(self, data: Bytes) -> tuple[SharedSlot, int]:
        copy = self.pool.take(data.size)
        copy_into(copy, data)
        sent = self.pool.count_sent(copy)
        assert sent is not None, "it was just taken from the pool"
        return sent

    def _send(self, head: bytes, body: list[memoryview], fds: list[int]) -> None:
        try:
            self._send_first(_LENGTHS.pack(len(head), sum(each.nbytes for each in body)), fds)
            self._sock.sendall(head)
            for part in body:
                self._sock.sendall(part)
        except OSError as error:
            raise LinkClosedError("the other process has gone") from error

    def _send_first(self, lengths: bytes, fds: list[int]) -> None:
        """The lengths, with the descriptors: each byte carries as many as the kernel accepts."""
        while len(fds) > _FDS_MAX:
            socket.send_fds(self._sock, [lengths[:1]], fds[:_FDS_MAX])
            lengths, fds = lengths[1:], fds[_FDS_MAX:]
        sent = socket.send_fds(self._sock, [lengths], fds) if fds else 0
        self._sock.sendall(lengths[sent:])

    def _first(self) -> tuple[int, int, list[int]]:
        data, fds = b"", []
        while len(data) < _LENGTHS.size:
            try:
                part, received, _, _ = socket.recv_fds(
                    self._sock, _LENGTHS.size - len(data), _FDS_MAX, socket.MSG_CMSG_CLOEXEC
                )
            except OSError as error:
                raise LinkClosedError("the other process has gone") from error
            fds += received
            if not part:
                for fd in fds:
                    os.close(fd)
                raise LinkClosedError("the other process has gone")
            data += part
        head_bytes, body_bytes = _LENGTHS.unpack(data)
        assert max(head_bytes, body_bytes) < _MESSAGE_BYTES_MAX, "what came is not a message"
        return head_bytes, body_bytes, fds

    def _exactly(self, byte_count: int) -> bytearray:
        data = bytearray(byte_count)
        view = memoryview(data)
        while len(view):
            try:
                count = self._sock.recv_into(view)
            except OSError as error:
                raise LinkClosedError("the other process has gone") from error
            if not count:
                raise LinkClosedError("the other process has gone")
            view = view[count:]
        return data

    def _buffers(self, places: list[_BufferRef], small: memoryview) -> Iterator[Any]:
        """The buffers of a message, writable; small ones lie end to end in `small`."""
        for kind, number, offset, byte_count in places:
            if kind == "small":
                yield bytearray(small[:byte_count])
                small = small[byte_count:]
            elif kind == "mine":
                yield self._peer.view(number, offset, byte_count)
            else:
                yield self.pool.returned(number, offset, byte_count)


class SharedPool(SharedSlots):
    """The slots of one end of a link. Thread-safe."""

    def __init__(self, retained_bytes: int) -> None:
        super().__init__(retained_bytes)
        self._lock = threading.Lock()
        self._numbers = itertools.count()  # none is reused

    def take(self, byte_count: int) -> Bytes:
        """A writable uint8 array whose content is undefined: over a slot, unless it is small."""
        if byte_count < SMALL_BYTES:
            return np.empty(byte_count, np.uint8)
        with self._lock:
            self._collect()
            return self._lend(self._taken(byte_count), 0, byte_count)

    def take_array(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[np.generic]:
        """A writable C-contiguous array over a slot."""
        kind = np.dtype(dtype)
        byte_count = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        return self.take(byte_count).view(kind).reshape(shape)

    def count_sent(self, data: Bytes) -> tuple[SharedSlot, int] | None:
        """The slot in which `data` lies, and where, counted as sent. None where it lies in no slot."""
        address = address_of(data)
        with self._lock:
            for slot in self._by_number.values():
                if (offset := slot.offset_of(address, data.size)) is not None:
                    slot.sent += 1
                    return slot, offset
        return None

    def returned(self, number: int, offset: int, byte_count: int) -> Bytes:
        """An array that the other end has sent back, in a slot of this pool."""
        with self._lock:
            return self._lend(self._by_number[number], offset, byte_count)

    def release(self, collected: Iterable[Collected[int]]) -> None:
        """Count releases by the other end, of which there is one for each buffer that was sent."""
        with self._lock:
            for number, was_forked in collected:
                self._release(self._by_number[number], 1, was_forked=was_forked)

    def take_dropped(self) -> list[int]:
        """The slots that were dropped since the last call, to notify the other end of."""
        with self._lock:
            self._collect()
            return self._take_dropped()

    def close(self) -> None:
        """Close all slots; arrays over them stay valid as long as they live."""
        with self._lock:
            for slot in self._by_number.values():
                slot.close_fd()
            self._by_number.clear()
            self._free.clear()

    @property
    def free_bytes(self) -> int:
        with self._lock:
            self._collect()
            return sum(slot.base.size for slot in self._free)

    def _new(self, byte_count: int) -> SharedSlot:
        return self._made(next(self._numbers), byte_count)

    def _drop(self, slot: SharedSlot) -> None:
        if slot.fd < 0:  # otherwise the other end has never mapped it
            self._dropped.append(slot.number)
        slot.close_fd()
        del self._by_number[slot.number]

    def _collect(self) -> None:
        self._reclaim()
        self._trim()


class PeerMemory:
    """The slots of the other end, as mapped here. Used by one thread at a time, except for finalizers."""

    def __init__(self) -> None:
        self._mapped: dict[int, SharedSlot] = {}
        self._collected: deque[Collected[int]] = deque()

    def map(self, number: int, fd: int) -> None:
        """Map a new slot. Takes ownership of `fd`."""
        try:
            self._mapped[number] = SharedSlot(number, map_shared(fd, os.fstat(fd).st_size))
        finally:
            os.close(fd)

    def view(self, number: int, offset: int, byte_count: int) -> Bytes:
        """A writable array over a part of a slot, which is released when its last view is collected."""
        return lent(self._mapped[number].base[offset : offset + byte_count], self._collected, number)

    def find(self, data: Bytes) -> tuple[int, int] | None:
        """The slot in which `data` lies, and where."""
        address = address_of(data)
        for number, slot in self._mapped.items():
            if (offset := slot.offset_of(address, data.size)) is not None:
                return number, offset
        return None

    def drop(self, numbers: Iterable[int]) -> None:
        """Unmap slots that the other end has dropped."""
        for number in numbers:
            del self._mapped[number]

    def close(self) -> None:
        """Unmap all; arrays over them stay valid as long as they live."""
        self._mapped.clear()

    def take_collected(self) -> list[Collected[int]]:
        """The releases since the last call: a slot comes once for each view that was collected."""
        collected = []
        while self._collected:
            collected.append(self._collected.popleft())
        return collected
