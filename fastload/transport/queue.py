"""A queue between processes, as `multiprocessing.Queue` is one, that sends at once.

Python's own hands every object to a thread, which pickles it and writes it to a pipe. A process whose main thread is
busy in Python pays for that with a change of threads, and a fight for the interpreter lock, for every message of some
hundred bytes. Here whoever puts also pickles and sends; only for what does not fit now a thread is started, which ends
when all is sent. So `put` never waits, and an object that cannot be pickled is an error where it was put.

Messages go over a pair of Unix sockets that keep them apart (SOCK_SEQPACKET): each is sent whole or not at all, whoever
else sends, and whatever a signal's handler raises meanwhile. So writers need no lock, which one that is killed could
have taken along. What is too long for one is sent in pieces.

The reader waits for a semaphore that counts them, not for the socket: the kernel takes the sending for the sender's
last act, and wakes who waits for it on the sender's core, where it waits until the sender pauses (with pipes: half as
many batches of small tensors; with the semaphore a sixth more than with Python's queue). What a sender was killed
before it could count, or has not counted yet, is found when the reader looks, which it does before it waits and when
its time limit is over. What is counted after that is one too many, which does no harm.

Where all cores are busy, the reader would wait for the end of the sender's turn, 3 ms; so processes that were started
for the reader's sake let others run when they have sent (a quarter of the hand-overs of large batches took 2.5 ms, and
takes 0.9).

A message: uint32 which one of its process, uint32 pieces after this one, uint64 the process, all little-endian; then a
pickle, or a piece of one. Both ends are processes of one user, one of which started the other, and trust each other's.
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
from fastload.transport.watching import Watchdog, watchdog_of

_HEAD = struct.Struct("<IIQ")
_Piece: TypeAlias = tuple[bytes, memoryview]  # a head, and what follows it
# Of a message; the kernel holds twice the buffer's size that nobody has read yet, where it may be so large.
_PIECE_BYTES, _BUFFER_BYTES = 96 << 10, 512 << 10
# How often a thread that cannot send looks whether that is still wanted.
_LOOK_UP_MS = 500
# How long the kernel is left to find memory.
_NO_MEMORY_S = 0.001


class Queue:
    """See the module. `processes` is a context of `multiprocessing`, or a module like it. Raises `OSError` where the
    kernel has no such sockets.

    Any process may put, from any thread; one reads. A queue can be pickled for a process that is being started.
    """

    def __init__(self, processes: Any) -> None:
        ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in ends:
            end.setblocking(False)
        ends[1].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        # The kernel refuses what is longer than the buffer, which may be small (net.core.wmem_default).
        self._piece_bytes = min(_PIECE_BYTES, ends[1].getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // 2)
        # What holds a descriptor, can be pickled for a new process, and closes it without a warning.
        self._reader, self._writer = (Connection(end.detach()) for end in ends)
        self._count = processes.Semaphore(0)
        self._made_in = os.getpid()
        self._arrive()

    def _arrive(self) -> None:
        """The queue is new in this process."""
        self._is_closed = False
        self._begin()
        register_after_fork(self, Queue._begin)

    def _begin(self) -> None:
        """What is of this process, and not of one that it was forked from: threads, locks, what they were at."""
        self._reading, self._putting = threading.Lock(), threading.RLock()
        self._room = bytearray(_HEAD.size + _PIECE_BYTES)
        self._begun: dict[tuple[int, int], list[bytes]] = {}
        self._numbers = itertools.count()
        self._waiting: deque[_Piece] = deque()
        self._thread: threading.Thread | None = None
        self._at_exit: Finalize | None = None  # while something is waiting that is not dispensable
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
        """The next object. Raises `queue.Empty` where there is none, or no more of one for `timeout` seconds."""
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
        """This process will not put or get any more; what was put is still sent. May be called twice."""
        with self._putting:
            self._is_closed = True
            self._reader.close()
            if not self._waiting:
                self._writer.close()

    def cancel_join_thread(self) -> None:
        """What was not sent when this process ends, or closes the queue, is not missed."""
        with self._putting:
            self._is_dispensable = True
            if self._at_exit is not None:
                self._at_exit.cancel()

    def _pieces(self, data: bytes) -> list[_Piece]:
        number, begins = next(self._numbers) & 0xFFFFFFFF, range(0, len(data), self._piece_bytes)
        whole = memoryview(data)
        return [
            (_HEAD.pack(number, remaining, os.getpid()), whole[begin : begin + self._piece_bytes])
            for begin, remaining in zip(begins, reversed(range(len(begins))), strict=True)
        ]

    def _send(self, piece: _Piece) -> bool:
        """Whether there was room for it."""
        try:
            os.writev(self._writer.fileno(), piece)
        except BlockingIOError:
            return False
        except ConnectionError:  # there is nobody who could read it
            return True
        except OSError as error:
            if error.errno not in (errno.ENOBUFS, errno.ENOMEM):
                raise
            time.sleep(_NO_MEMORY_S)  # the kernel has none for it now
            return False
        except BaseException:  # of a signal's handler; it may be sent, and one too many does no harm
            self._count.release()
            raise
        self._count.release()
        return True

    def _leave_to_thread(self, pieces: list[_Piece]) -> None:
        self._waiting += pieces
        if self._at_exit is None and not self._is_dispensable:
            # At the end of this process, when Python's own queues wait, too.
            self._at_exit = Finalize(None, self._send_waiting, exitpriority=-5)
        if self._is_sending():
            return
        self._thread = threading.Thread(target=self._send_waiting, name="fastload-queue", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # there can be no more threads: whoever put hears of it, and nobody gets a part
            for _ in pieces:
                self._waiting.pop()
            raise

    def _is_sending(self) -> bool:
        """Whether a thread is known to. Where a signal's handler raises, one may not have begun, or be taken for dead;
        several do no harm.
        """
        return self._thread is not None and self._thread.is_alive()

    def _read(self) -> tuple[int, int, int, memoryview] | None:
        """What is there, counted or not: a head, and a pickle or a piece of one."""
        try:
            size = os.readv(self._reader.fileno(), [self._room])
        except BlockingIOError:
            return None
        message = memoryview(self._room)[:size]
        return *_HEAD.unpack_from(message), message[_HEAD.size :]

    def _joined(self, number: int, remaining: int, process: int, piece: memoryview) -> Any:
        """A pickle, if that was its last piece."""
        if not remaining and (process, number) not in self._begun:
            return piece
        self._begun.setdefault((process, number), []).append(bytes(piece))
        return None if remaining else b"".join(self._begun.pop((process, number)))

    def _send_waiting(self) -> None:
        """In a thread, and at the end of this process: send until nothing is waiting, or nobody is there to read it.
        Other processes that were started for the reader's sake may hold its end when it is gone.
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
