"""The socket around the core: accepting consumers, their frames in and out, and when to end.

A `Peer` is one accepted socket. It reads and writes without blocking, in the loop's thread; what the kernel does not
take at once waits in its buffer. The arena's descriptor rides on the first byte of the welcome. A peer whose user is
not ours is closed without a word, one of another version with a word.

A service ends `idle_s` after its last consumer, at SIGTERM, or when it is stopped (`stop`), as by a daemon that is to
serve in its place. At the end
nothing is loaded into any buffer after the sockets are closed, so that consumers may go on reading what they hold.
The socket file goes before the lock: the next holder of the lock finds the place clean. A service whose directory was
removed or emptied writes nothing there any more: the removal may be under way, or another service at that path by now.
Nobody new finds it, so it ends, after some seconds in which the removal may come to its end; its consumers then elect
another one, which makes the directory anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence

from fastload import protocol
from fastload.errors import FastloadError, ServiceError
from fastload.rendezvous import ServiceLocation, peer_uid
from fastload.service.core import Core
from fastload.service.operators import Operator
from fastload.service.state import ConsumerState

log = logging.getLogger("fastload.service")

# What a consumer that reads nothing may be owed before it is cut off.
_UNSENT_BYTES_MAX = 4 * protocol.FRAME_BYTES_MAX
# A service to which no consumer connects at all, although one started it for that.
_FIRST_CONSUMER_S = 10.0
# A connection may stay silent for so long before its hello. It says hello at once, but may be one of hundreds on a busy
# machine.
_HELLO_S = 20.0
# Without descriptors or memory for another connection, the next look is so much later; who waits is in the queue.
_ACCEPT_AGAIN_S = 0.5
_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
# Letters of the reason why a conversation was ended.
_WHY_MAX = 400
# How long reads and writes under way may take to end.
_END_S = 5.0
# How long the end waits at most for a checkpoint of which no other copy is there, and how often is looked.
_SAFE_S, _SAFE_AGAIN_S = 300.0, 0.05
# A service without consumers that has checkpoints to store looks so often whether it may end.
_SAVED_AGAIN_S = 0.5
# How often is looked whether the directory is still there; one that is missed twice is given up.
_LOOK_S = 2.0


class Peer:
    """One consumer's socket. For the loop's thread."""

    def __init__(
        self,
        sock: socket.socket,
        core: Core,
        loop: asyncio.AbstractEventLoop,
        welcomed: Callable[[], None],
        gone: Callable[[Peer], None],
    ) -> None:
        self._sock, self._core, self._loop, self._welcomed, self._gone = sock, core, loop, welcomed, gone
        self._frames = protocol.FrameReader()
        self._unsent = bytearray()
        self._unsent_fds: deque[tuple[int, list[int]]] = deque()  # ours, and the byte of that on which they ride
        self._fds: list[int] = []  # that came with messages which are not whole yet
        self._consumer: ConsumerState | None = None
        self._operator: Operator | None = None
        self._closed = False
        sock.setblocking(False)
        loop.add_reader(sock.fileno(), self._readable)
        self._deadline = loop.call_later(_HELLO_S, self._said_nothing)

    @property
    def is_consumer(self) -> bool:
        """Whether it has said hello."""
        return self._consumer is not None

    @property
    def is_operator(self) -> bool:
        """Whether it watches and steers, and keeps nothing alive."""
        return self._operator is not None

    def _said_nothing(self) -> None:
        log.error("a connection was closed that said no hello for %.0f s", _HELLO_S)
        self.close()

    def send(self, message: protocol.Message) -> None:
        """Send, now or as the peer takes it."""
        if not self._closed:
            self._send(protocol.frame(message))

    def _send_with(self, message: protocol.Message, fds: Sequence[int]) -> None:
        """The same with descriptors on its first byte."""
        if not self._closed:
            self._send(protocol.frame(message), fds)

    def _send(self, data: bytearray, fds: Sequence[int] = ()) -> None:
        sent = 0
        if not self._unsent:
            try:
                sent = socket.send_fds(self._sock, [data], fds) if fds else self._sock.send(data)
            except BlockingIOError:
                pass
            except OSError:  # it has gone; the reader will say so
                if fds:  # or more descriptors are on their way than the system allows: it would wait for the rest
                    self._loop.call_soon(self.close)
                return
            if sent == len(data):
                return
            self._loop.add_writer(self._sock.fileno(), self._writable)
        if fds and not sent:
            self._unsent_fds.append((len(self._unsent), [os.dup(fd) for fd in fds]))
        self._unsent += data[sent:]
        if len(self._unsent) > _UNSENT_BYTES_MAX:
            log.error("a consumer was cut off: it reads nothing and is owed %d bytes", len(self._unsent))
            self._loop.call_soon(self.close)

    def close(self) -> None:
        """End the conversation, and all that the consumer had."""
        if self._closed:
            return
        self._closed = True
        self._deadline.cancel()
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        self._sock.close()
        for fd in [*self._fds, *(fd for _, fds in self._unsent_fds for fd in fds)]:
            os.close(fd)
        if self._consumer is not None:
            self._core.disconnect(self._consumer)
        if self._operator is not None:
            self._core.operators.disconnect(self._operator)
        self._gone(self)

    def _readable(self) -> None:
        try:
            data, fds, flags, _ = socket.recv_fds(self._sock, 1 << 18, 1, socket.MSG_CMSG_CLOEXEC)
            self._fds += fds
        except BlockingIOError:
            return
        except OSError:  # reset
            data, flags = b"", 0
        if not data:
            self.close()
            return
        try:
            if flags & socket.MSG_CTRUNC or len(self._fds) > 1:  # the kernel has closed those that were cut off
                raise ServiceError("it sent more descriptors than one, or this process has no room for one (ulimit -n)")
            for payload in self._frames.feed(data):
                if not self._closed:
                    self._take(payload)
        except FastloadError as error:
            why = " ".join(str(error).split())[:_WHY_MAX]  # which may hold what it said, whatever that was
            log.error("a consumer was cut off: %s", why)
            self._refuse(why)
        except Exception as error:  # a defect; a consumer that waits for an answer gets the error
            log.exception("a consumer was cut off")
            self._refuse(repr(error))

    def _refuse(self, why: str) -> None:
        """Say so before the end: without a word it would look as if the service had died."""
        message = f"the running cache service (process {os.getpid()}) ended the conversation: {why}"
        self.send(protocol.Refused("ServiceError", message))
        self.close()

    def _take(self, payload: bytes) -> None:
        if self._consumer is not None:
            message = protocol.from_consumer(payload)
            if isinstance(message, protocol.Ping):
                self.send(protocol.Pong())
            elif isinstance(message, protocol.Save):
                self._core.savings.save(self._consumer, message, self._fds.pop() if self._fds else -1)
                self._core.loads.give_way()
            elif isinstance(message, protocol.Load):
                self._core.loads.load(self._consumer, message, self._send_with)
            elif isinstance(message, protocol.LoadRange):
                self._core.loads.read(self._consumer, message)
            else:
                self._core.receive(self._consumer, message)
            return
        if self._operator is not None:
            self._core.operators.receive(self._operator, protocol.from_operator(payload))
            return
        name, version = protocol.first_words(payload) or ("", protocol.VERSION)
        if version != protocol.VERSION:  # then its other fields may be any
            raise ServiceError(
                f"it speaks protocol {protocol.VERSION}, this fastload {version}: let its jobs end, or use another "
                "cache directory"
            )
        if name == "observe":
            self._observe(protocol.from_operator(payload))
            return
        message = protocol.from_consumer(payload)
        if not isinstance(message, protocol.Hello):
            raise ServiceError(f"it began with {type(message).__name__}")
        self._welcome(message)

    def _observe(self, message: protocol.FromOperator) -> None:
        self._operator = self._core.operators.connect(message, self.send)
        self._operator.send_with = self._send_with
        self._deadline.cancel()
        operators = self._core.operators
        self.send(protocol.Observed(protocol.VERSION, self._core.service_id, os.getpid(), operators.jobs is not None))

    def _welcome(self, hello: protocol.Hello) -> None:
        core = self._core
        self._consumer = core.connect(hello, self.send)
        self._deadline.cancel()
        self._welcomed()
        welcome = protocol.Welcome(
            version=protocol.VERSION,
            service_id=core.service_id,
            pid=os.getpid(),
            chunk_bytes=core.chunk_bytes,
            buffer_count=core.arena.buffer_count,
            troubles=core.warnings,
        )
        self._send(protocol.frame(welcome), [core.arena.fd])

    def _writable(self) -> None:
        try:
            while self._unsent:
                self._send_more()
            self._loop.remove_writer(self._sock.fileno())
        except BlockingIOError:
            pass
        except OSError:  # gone, or more descriptors are on their way than the system allows
            self._unsent.clear()
            self._loop.remove_writer(self._sock.fileno())
            self._loop.call_soon(self.close)

    def _send_more(self) -> None:
        """Some of what is left, up to the next descriptors."""
        at, fds = self._unsent_fds[0] if self._unsent_fds else (len(self._unsent), [])
        if at:
            sent = self._sock.send(memoryview(self._unsent)[: min(at, 1 << 20)])
        else:
            sent = socket.send_fds(self._sock, [memoryview(self._unsent)[:1]], fds)
            self._unsent_fds.popleft()
            for fd in fds:
                os.close(fd)
        del self._unsent[:sent]
        self._unsent_fds = deque((at - sent, fds) for at, fds in self._unsent_fds)


class Server:
    """A cache directory's service, once its lock is held.

    All methods but `stop_from_thread` and `abandon` are for the loop's thread.
    """

    def __init__(self, directory: ServiceLocation, idle_s: float | None) -> None:
        """`idle_s` None: do not end by itself. To be made in the loop that it will run in. `core` is there from
        `ready` on.
        """
        self._loop = asyncio.get_running_loop()
        self._directory, self._idle_s = directory, idle_s
        self._peers: set[Peer] = set()
        self._idle_timer: asyncio.TimerHandle | None = None
        self._accept_timer: asyncio.TimerHandle | None = None
        self._is_ending = False
        self._listener: socket.socket | None = None
        self._look_timer: asyncio.TimerHandle | None = None
        self._was_lost = False
        self._stop_by_s: float | None = None
        self._stopped = asyncio.Event()

    async def run(self, ready: Callable[[], bool]) -> bool:
        """Serve until stopped, or idle; `ready()` is called once consumers can connect, and says whether the process
        that started this is still about to.

        Returns whether all threads have ended. CacheError where the cache cannot be opened.
        """
        self.core = Core(self._directory, self._loop)
        self.core.operators.hand_over = self.stop
        try:
            self._listener = self._directory.listen()
            self._look_pool = self.core.pool("directory")
            self._look()
            self._loop.add_reader(self._listener.fileno(), self._accept)
            first_s = max(self._idle_s or 0.0, _FIRST_CONSUMER_S if ready() else 0.0)
            self._wait_for_consumers(None if self._idle_s is None else first_s)
            await self._stopped.wait()
        finally:
            ended = self._end()
        return ended

    def stop(self) -> None:
        """End, as soon as what runs allows; what would be lost of checkpoints is saved first. A second call ends at
        once.
        """
        if self._stop_by_s is None:
            self._stop_by_s = self._loop.time() + _SAFE_S
            if self.core.savings.has_images:  # of trainers that may just have died: their sockets say so first
                self._loop.call_later(_SAFE_AGAIN_S, self._stop_when_safe)
            else:
                self._stopped.set()
        else:
            self._stopped.set()

    def _stop_when_safe(self) -> None:
        if self.core.savings.is_only_copy and self._stop_by_s is not None and self._loop.time() < self._stop_by_s:
            self._loop.call_later(_SAFE_AGAIN_S, self._stop_when_safe)
        else:
            self._stopped.set()

    def stop_from_thread(self) -> None:
        """`stop`, from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended by itself
            self._loop.call_soon_threadsafe(self.stop)

    def abandon(self) -> None:
        """In a forked child: close the descriptors of sockets that are the parent's."""
        for sock in [self._listener, *(peer._sock for peer in self._peers)]:
            if sock is not None and sock.fileno() >= 0:
                os.close(sock.detach())

    # The directory may go

    def _look(self) -> None:
        """In a thread, since the disk may hang."""
        self._look_pool.submit(lambda: self._directory.is_lost, done=self._looked)

    def _looked(self, is_lost: bool | None, error: BaseException | None) -> None:
        if is_lost and self._was_lost:
            log.warning(
                "%s was removed or emptied; the next job that needs it creates it again and starts a new service",
                self._directory.path,
            )
            self.stop()
        self._was_lost = bool(is_lost)
        self._look_timer = self._loop.call_later(_LOOK_S, self._look)

    def _is_lost(self) -> bool:
        """Now, where the disk is known to answer; else as it was when it last did."""
        return self._was_lost if self.core.disk_hangs else self._directory.is_lost

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:  # the peer has gone again
            return
        except OSError as error:
            log.warning("accepting a consumer failed: %s", error)
            if error.errno in _SHORTAGES:
                self._accept_later()
            return
        uid = peer_uid(sock)
        if uid != os.geteuid():
            log.error("a connection of user %d was refused", uid)
            sock.close()
            return
        try:
            self._peers.add(Peer(sock, self.core, self._loop, self._wait_for_consumers, self._left))
        except OSError as error:  # the system watches no more descriptors for us
            log.warning("accepting a consumer failed: %s", error)
            sock.close()

    def _accept_later(self) -> None:
        """Trying at once would find the same, as fast as the processor can."""
        assert self._listener is not None
        fd = self._listener.fileno()
        self._loop.remove_reader(fd)
        self._accept_timer = self._loop.call_later(_ACCEPT_AGAIN_S, self._loop.add_reader, fd, self._accept)

    def _left(self, peer: Peer) -> None:
        self._peers.discard(peer)
        if self._is_ending and not self._has_company:
            self.stop()
        elif peer.is_consumer and not self.core.consumers:
            self._wait_for_consumers(0.0 if self._is_lost() else self._idle_s)

    def _wait_for_consumers(self, seconds: float | None = None) -> None:
        """End in so many seconds if none has come by then; None: one is here, or need not come."""
        self._is_ending = False
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        if seconds is not None:
            self._idle_timer = self._loop.call_later(seconds, self._end_of_idleness)

    @property
    def _has_company(self) -> bool:
        """Whether any connection may keep it alive."""
        return not all(peer.is_operator for peer in self._peers)

    def _end_of_idleness(self) -> None:
        """Who has just connected and is about to say hello may hold up the end, and what is to be saved yet."""
        if self.core.savings.is_busy:
            self._idle_timer = self._loop.call_later(_SAVED_AGAIN_S, self._end_of_idleness)
            return
        self._is_ending = True
        if not self._has_company:
            self.stop()
            return
        self._idle_timer = self._loop.call_later(_HELLO_S, self.stop)

    def _end(self) -> bool:
        for timer in (self._idle_timer, self._accept_timer, self._look_timer):
            if timer is not None:
                timer.cancel()
        self._idle_s = None
        if self._listener is not None:
            self._loop.remove_reader(self._listener.fileno())
            # Not on a disk that hangs: the next service removes it. And not another service's.
            if not self.core.disk_hangs and not self._is_lost():
                self._directory.remove_socket()
            self._listener.close()
        for peer in list(self._peers):
            peer.close()
        return self.core.close(_END_S)
