"""One end of a connection between two processes, over which Python objects pass whose large arrays are not copied.

A message is a pickle (protocol 5) and its buffers (see `transport.pickling`). A buffer of 64 KiB or more crosses in
shared memory: where it lies in a slot already, by name; otherwise it is copied into one. Small ones follow the pickle.
Whatever arrives is writable, and the receiver's own.

On the wire, all integers little-endian uint64: the length of a head, the length of what follows it; the head, which is
a pickled `_Head`; the object's pickle; the small buffers end to end. Descriptors of slots that the other end has not
seen come with the first bytes.

Both ends are processes of one user, one of which started the other; so they trust each other's pickles. Each end is
used by one thread at a time.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import socket
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastload.transport.filling import copy_into
from fastload.transport.lending import Collected
from fastload.transport.memory import PeerMemory, SharedPool, Slot
from fastload.transport.pickling import Where, buffers_of, dump_apart, memory_of
from fastload.transport.slots import SMALL_BYTES

Bytes = npt.NDArray[np.uint8]

_LENGTHS = struct.Struct("<QQ")
# The kernel takes no more descriptors with one message (SCM_MAX_FD).
_FDS_MAX = 253
# Nothing that belongs here comes near to it: a length beyond is not one of ours.
_MESSAGE_BYTES_MAX = 1 << 40


class LinkClosedError(ConnectionError):
    """The other end has gone."""


class _Place(NamedTuple):
    """Where a buffer of a message lies."""

    kind: str  # "small": after the pickle; "mine": in a slot of the sender; "yours": in one of the receiver
    number: int
    offset: int
    byte_count: int


class _Head(NamedTuple):
    pickle_bytes: int
    places: list[_Place]
    where: list[Where]
    new_slots: list[int]  # whose descriptors come with this message
    collected: list[Collected[int]]  # over slots of the receiver
    dropped: list[int]  # slots of the sender that are no more


class Link:
    """See the module. `pool` is where this end's large buffers go, and where to take memory from that will be sent."""

    def __init__(self, sock: socket.socket, pool: SharedPool) -> None:
        self._sock, self.pool = sock, pool
        self._peer = PeerMemory()

    def fileno(self) -> int:
        """The socket's, to wait for."""
        return self._sock.fileno()

    def send(self, message: Any) -> None:
        """Send; whatever pickling raises is raised before anything is sent. `LinkClosedError` where nobody is there."""
        stream = io.BytesIO()
        buffers, where = buffers_of(dump_apart(message, stream))
        places, small, new_slots = self._placed(buffers)
        data, numbers = stream.getbuffer(), [slot.number for slot in new_slots]
        head = _Head(len(data), places, where, numbers, self._peer.take_collected(), self.pool.take_dropped())
        self._send(pickle.dumps(tuple(head), 5), [data, *small], [slot.fd for slot in new_slots])
        for slot in new_slots:
            slot.close_fd()

    def receive(self) -> Any:
        """The next message; waits for it. `LinkClosedError` where the other end has gone."""
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
        self.pool.let_go(head.collected)  # after what lies in them was taken again
        return pickle.loads(body[: head.pickle_bytes], buffers=memory_of(buffers, head.where))

    def close(self) -> None:
        """Close this end; the other one finds out, whoever else a fork has handed it to. May be called twice."""
        with contextlib.suppress(OSError):  # it is closed, or the other end is
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        self.pool.close()
        self._peer.close()

    def _placed(self, buffers: list[Bytes]) -> tuple[list[_Place], list[memoryview], list[Slot]]:
        """Where each buffer goes, the small ones, and slots that are new to the other end."""
        places, small, new_slots = [], [], []
        for data in buffers:
            if data.size < SMALL_BYTES:
                small.append(data.data)
                places.append(_Place("small", 0, 0, data.size))
            elif (there := self._peer.find(data)) is not None:
                places.append(_Place("yours", *there, data.size))
            else:
                slot, offset = self.pool.tell(data) or self._copied(data)
                if slot.fd >= 0 and slot not in new_slots:
                    new_slots.append(slot)
                places.append(_Place("mine", slot.number, offset, data.size))
        return places, small, new_slots

    def _copied(self, data: Bytes) -> tuple[Slot, int]:
        copy = self.pool.take(data.size)
        copy_into(copy, data)
        told = self.pool.tell(copy)
        assert told is not None, "it was just taken from the pool"
        return told

    def _send(self, head: bytes, body: list[memoryview], fds: list[int]) -> None:
        try:
            self._send_first(_LENGTHS.pack(len(head), sum(each.nbytes for each in body)), fds)
            self._sock.sendall(head)
            for part in body:
                self._sock.sendall(part)
        except OSError as error:
            raise LinkClosedError("the other process has gone") from error

    def _send_first(self, lengths: bytes, fds: list[int]) -> None:
        """The lengths, with the descriptors: a byte at a time carries as many as the kernel takes."""
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

    def _buffers(self, places: list[_Place], small: memoryview) -> Iterator[Any]:
        """The buffers of a message, writable; the small ones lie end to end in `small`."""
        for kind, number, offset, byte_count in places:
            if kind == "small":
                yield bytearray(small[:byte_count])
                small = small[byte_count:]
            elif kind == "mine":
                yield self._peer.view(number, offset, byte_count)
            else:
                yield self.pool.returned(number, offset, byte_count)
