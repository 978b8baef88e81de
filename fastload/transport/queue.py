"""A queue between processes with the interface of `multiprocessing.Queue`, which sends in the caller's thread.

Python's own queue passes every object to a thread, which pickles it and writes it to a pipe. A process whose main
thread is busy in Python pays for that with a thread switch, and contention for the interpreter lock, for every message
of some hundred bytes. Here `put` itself pickles and sends; only for messages that do not fit into the socket's buffer a
thread is started, which ends when everything is sent. So `put` never blocks, and an object that cannot be pickled is an
error of `put`.

Messages go over a pair of Unix sockets that keep message boundaries (SOCK_SEQPACKET): each is sent whole or not at all,
regardless of other senders and of exceptions of signal handlers. So writers need no lock, which a killed writer could
have held for ever. A message that is too long for one packet is sent in pieces.

The reader waits for a semaphore that counts packets, not for the socket: the kernel takes a send for the sender's last
act and wakes the waiting reader on the sender's core, where it waits until the sender pauses (with pipes: half as many
batches of small tensors; with the semaphore a sixth more than with Python's queue). Packets that a sender was killed
before it could count, or has not counted yet, are found when the reader looks at the socket, which it does before it
waits and at its timeout. If such a packet is counted afterwards, the count is one too high, which is harmless.

Where all cores are busy, the reader would wait for the end of the sender's time slice, 3 ms; so processes that were
started for the reader's sake yield the CPU after a send (a quarter of the transfers of large batches took 2.5 ms, and
take 0.9).

A packet: uint32 the number of the message in its process, uint32 how many pieces follow, uint64 the process, all
little-endian; then a pickle, or a piece of one. Both ends are processes of one user, one of which started the other,
and trust each other's pickles.
"""

from __future__ import annotations

import errno
import itertools
import os
import pickle
import queue
import select
import socket
import struct
import threading
import time
from collections import deque
from multiprocessing import context
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize, register_after_fork
from typing import Any, TypeAlias

from fastload.transport.pickling import forking_dumps
from fastload.transport.worker_process import Watchdog, watchdog_of

_HEAD = struct.Struct("<IIQ")
_Packet: TypeAlias = tuple[bytes, memoryview]  # a head, and what follows it
# Bytes of a packet, and of the socket's buffer; the kernel allows up to twice that if its limits permit.
_PIECE_BYTES, _BUFFER_BYTES = 96 << 10, 512 << 10
# How often a thread that cannot send checks whether there is still a reader.
_LOOK_UP_MS = 500
# The pause before a retry when the kernel is out of memory.
_NO_MEMORY_S = 0.001


class Queue:
    """See the module. `processes` is a context of `multiprocessing`, or a module like it. Raises `OSError` where the
    kernel has no such sockets.

    Any process may put, from any thread; one process reads. A queue can be pickled for a process that is being started.
    """

    def __init__(self, processes: Any) -> None:
        ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in ends:
            end.setblocking(False)
        ends[1].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        # The kernel refuses what is longer than the buffer, which may be small (net.core.wmem_default).
        self._piece_bytes = min(_PIECE_BYTES, ends[1].getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // 2)
        # A `Connection` can be pickled for a new process, and closes its descriptor without a warning.
        self._reader, self._writer = (Connection(end.detach()) for end in ends)
        self._count = processes.Semaphore(0)
        self._made_in = os.getpid()
        self._arrive()

    def _arrive(self) -> None:
        """Set up the queue in the process in which it was made or unpickled."""
        self._is_closed = False
        self._begin()
        register_after_fork(self, Queue._begin)

    def _begin(self) -> None:
        """Set up the state that a forked child must not inherit: threads, locks, messages in flight."""
        self._reading, self._putting = threading.Lock(), threading.RLock()
        self._room = bytearray(_HEAD.size + _PIECE_BYTES)
        self._begun: dict[tuple[int, int], list[bytes]] = {}
        self._numbers = itertools.count()
        self._waiting: deque[_Packet] = deque()
        self._thread: threading.Thread | None = None
        self._at_exit: Finalize | None = None  # while messages wait that must be sent
        self._is_dispensable = False
        self._watchdog: Watchdog | None = None  # in a process that the reader has started

    def __getstate__(self) -> tuple[Any, ...]:
        context.assert_spawning(self)
        return self._reader, self._writer, self._count, self._made_in, self._piece_bytes

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._reader, self._writer, self._count, self._made_in, self._piece_bytes = state
        self._arrive()

    def put(self, value: Any) -> None:
        """Put an object. Raises what pickling raises, `ValueError` where this process has closed the queue."""
        pieces = self._pieces(forking_dumps(value))
        with self._putting:
            if self._is_closed:
                raise ValueError("the queue was closed by this process")
            if self._watchdog is None:
                self._watchdog = watchdog_of(self._made_in)
            if len(pieces) > 1 or self._waiting or not self._send(pieces[0]):
                self._leave_to_thread(pieces)
        if os.getpid() != self._made_in:
            os.sched_yield()

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """The next object. Raises `queue.Empty` where there is none, or nothing arrives for `timeout` seconds."""
        is_counted = False
        while True:
            with self._reading:
                piece = self._read()
                if piece is not None:
                    if not is_counted:
                        self._count.acquire(False)
                    is_counted, data = False, self._joined(*piece)
                    if data is not None:
                        return pickle.loads(data)
                    continue
            is_counted = self._count.acquire(block, timeout)
            if not is_counted and not self._reader.poll(0):
                raise queue.Empty

    def close(self) -> None:
        """This process will no longer put or get; messages that were put are still sent. Idempotent."""
        with self._putting:
            self._is_closed = True
            self._reader.close()
            if not self._waiting:
                self._writer.close()

    def cancel_join_thread(self) -> None:
        """Messages that are unsent when this process ends, or closes the queue, may be lost."""
        with self._putting:
            self._is_dispensable = True
            if self._at_exit is not None:
                self._at_exit.cancel()

    def _pieces(self, data: bytes) -> list[_Packet]:
        number, begins = next(self._numbers) & 0xFFFFFFFF, range(0, len(data), self._piece_bytes)
        whole = memoryview(data)
        return [
            (_HEAD.pack(number, remaining, os.getpid()), whole[begin : begin + self._piece_bytes])
            for begin, remaining in zip(begins, reversed(range(len(begins))), strict=True)
        ]

    def _send(self, piece: _Packet) -> bool:
        """Whether the socket had room for it."""
        try:
            os.writev(self._writer.fileno(), piece)
        except BlockingIOError:
            return False
        except ConnectionError:  # the reader is gone
            return True
        except OSError as error:
            if error.errno not in (errno.ENOBUFS, errno.ENOMEM):
                raise
            time.sleep(_NO_MEMORY_S)
            return False
        except BaseException:  # of a signal handler: it may have been sent, and a count too high is harmless
            self._count.release()
            raise
        self._count.release()
        return True

    def _leave_to_thread(self, pieces: list[_Packet]) -> None:
        self._waiting += pieces
        if self._at_exit is None and not self._is_dispensable:
            # At the end of this process, when Python's own queues are flushed too.
            self._at_exit = Finalize(None, self._send_waiting, exitpriority=-5)
        if self._is_sending():
            return
        self._thread = threading.Thread(target=self._send_waiting, name="fastload-queue", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # no more threads can be started: `put` raises, and no part of the message is sent
            for _ in pieces:
                self._waiting.pop()
            raise

    def _is_sending(self) -> bool:
        """Whether a thread is known to send. After an exception of a signal handler it may not have started, or seem
        dead; several threads are harmless.
        """
        return self._thread is not None and self._thread.is_alive()

    def _read(self) -> tuple[int, int, int, memoryview] | None:
        """The next packet, counted or not: a head, and a pickle or a piece of one."""
        try:
            size = os.readv(self._reader.fileno(), [self._room])
        except BlockingIOError:
            return None
        message = memoryview(self._room)[:size]
        return *_HEAD.unpack_from(message), message[_HEAD.size :]

    def _joined(self, number: int, remaining: int, process: int, piece: memoryview) -> Any:
        """The whole pickle, if that was its last piece."""
        if not remaining and (process, number) not in self._begun:
            return piece
        self._begun.setdefault((process, number), []).append(bytes(piece))
        return None if remaining else b"".join(self._begun.pop((process, number)))

    def _send_waiting(self) -> None:
        """Send until no message waits or the reader is gone; in a thread, and at the end of this process. The socket
        does not report that the reader is gone while other workers of it hold its end: the watchdog does.
        """
        while True:
            with self._putting:
                if self._watchdog is not None and not self._watchdog.is_alive():
                    self._waiting.clear()
                if not self._waiting or (self._is_closed and self._is_dispensable):
                    return self._end_thread()
                if self._send(self._waiting[0]):
                    self._waiting.popleft()
                    continue
                writable = select.poll()
                writable.register(self._writer, select.POLLOUT)
            writable.poll(_LOOK_UP_MS)

    def _end_thread(self) -> None:
        self._thread = None
        if self._at_exit is not None:
            self._at_exit.cancel()
            self._at_exit = None
        if self._is_closed:
            self._writer.close()
