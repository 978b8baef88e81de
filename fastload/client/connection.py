"""The consumer's end of the socket: one thread that reads, and that connects again when the service has gone.

`Connection` knows frames and reconnecting, and nothing of what messages mean; its owner gives it `ConnectionEvents`.

`send` may be called by any thread that holds the owner's lock. It never fails: what cannot be sent now is part of what
the owner sends to the next service.

A service that is stopped, or whose loop is blocked, answers no ping. What counts is the time in which this thread saw
nothing arrive, not what the clock says: where the whole job was stopped and goes on, so may its service.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from fastload import protocol
from fastload.cache.tempfiles import is_running
from fastload.client.handshake import Welcomed
from fastload.errors import FastloadError, ServiceError
from fastload.rendezvous import peer_pid

# A service that has been quiet for so long is pinged; one that reads nothing and sends nothing for so long is taken for
# dead: its loop never blocks on anything. On a machine that is loaded heavily a reply may take some seconds.
QUIET_S, SILENCE_S = 5.0, 20.0
# A service that is started again and again without ever granting a chunk, or lasting for a while, is not going to. One
# that lives and ends the conversation each time will do so again, whatever it grants before; only lasting counts then.
RESTARTS_MAX = 5
_LASTED_S = 60.0

log = logging.getLogger("fastload")


@dataclass(frozen=True, slots=True)
class ConnectionEvents:
    """What a connection calls, in its own thread, one at a time, and without holding the owner's lock.

    - `connect(stop, avoid)` gives a service's socket, starting a service if there is none; gives up when `stop` is set.
      `avoid` says why the directory's own service should not be used, "" where it should. `start` calls it in the
      caller's thread.
    - `connected(connection, welcomed)` has to `adopt` it and to send whatever the service must know. `was_refused` says
      what became of the service before.
    - `lost(silent)`: the connection broke; or, where `silent` is its socket, the service has been silent for too long.
      Its leases hold until that socket is closed, which is up to the owner now.
    - `message(message)`: a `ConversationError` raised by it ends this connection, any other error all of them.
    - `ended(error)`: there will be no other connection.
    """

    connect: Callable[[threading.Event, str], Welcomed]
    connected: Callable[[Connection, Welcomed], None]
    lost: Callable[[socket.socket | None], None]
    message: Callable[[protocol.FromService], None]
    ended: Callable[[FastloadError], None]


class _End(Enum):
    """How the conversation with one service ended."""

    CLOSED = auto()  # between two messages, as when a service dies
    CUT_OFF = auto()  # in the middle: one of both broke off, and the service may live on without us
    SILENT = auto()


class Connection:
    """See the module's text."""

    def __init__(self, events: ConnectionEvents, lock: threading.Condition, name: str) -> None:
        """`lock`: the owner's, under which everything is sent."""
        self._events, self._lock = events, lock
        self._stop = threading.Event()
        self._sock: socket.socket | None = None
        self._is_not_read = False
        self._frames = protocol.FrameReader()
        self._service_id, self._service_pid = b"", 0
        self._end: _End | None = None  # of the service before
        self._restarts, self._connected_s = 0, 0.0
        # The service before this one is this one, or lives: it has ended our leases, and not itself.
        self.was_refused = False
        self._thread = threading.Thread(target=self._run, name=f"fastload-consumer-{name}", daemon=True)

    def start(self) -> None:
        """Connect, in the caller's thread and with its errors; then begin to read."""
        self._connect()
        self._thread.start()

    def adopt(self, welcomed: Welcomed) -> None:
        """Use this socket from now on."""
        welcomed.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(SILENCE_S))
        welcomed.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(QUIET_S))
        self._is_not_read = False
        self._sock, self._frames = welcomed.sock, welcomed.frames

    def send(self, message: protocol.Message, fds: Sequence[int] = ()) -> None:
        """Send, or leave it: see the module's text. Descriptors ride on the first byte."""
        sock = self._sock
        if sock is None or self._is_not_read:
            return
        try:
            data = protocol.frame(message)
            sent = socket.send_fds(sock, [data], fds) if fds else 0
            sock.sendall(memoryview(data)[sent:])
        except BlockingIOError:  # at the deadline. Half a message may have been sent: nothing can follow it
            self._is_not_read = True
        except OSError:  # the service died; the reading thread finds the same and connects again
            _shut_down(sock)

    @property
    def has_room(self) -> bool:
        """Whether a short message can be sent without waiting."""
        sock = self._sock
        if sock is None or self._is_not_read:
            return False
        poll = select.poll()
        poll.register(sock, select.POLLOUT)
        return bool(poll.poll(0))

    def send_last(self, silent: socket.socket, message: protocol.Message) -> None:
        """Send one more message to a silent service, if that can be done without waiting."""
        if not self._is_not_read:
            with contextlib.suppress(OSError):  # its buffer is full
                silent.send(protocol.frame(message), socket.MSG_DONTWAIT)

    def was_served(self) -> None:
        """The service has granted something: it is worth connecting to again."""
        if not self.was_refused:
            self._restarts = 0

    def close(self) -> None:
        """End the connection and the thread."""
        self._stop.set()
        sock = self._sock
        if sock is not None:
            _shut_down(sock)
        if self._thread.is_alive() and self._thread is not threading.current_thread():  # else it ends as it begins
            self._thread.join()

    def abandon(self) -> None:
        """In a forked child: let go of the parent's socket without a word to the service."""
        sock, self._sock = self._sock, None
        if sock is not None:
            os.close(sock.detach())

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._end = self._read_to_end()
                sock, self._sock = self._sock, None
                assert sock is not None
                is_silent = self._end is _End.SILENT
                if self._stop.is_set() or not is_silent:
                    sock.close()
                if not self._stop.is_set():
                    self._events.lost(sock if is_silent else None)
                    self._count_restart()
                    self._connect()
        except FastloadError as error:
            if not self._stop.is_set():
                self._events.ended(error)
        except Exception as error:  # a defect, of whatever kind: threads that wait must get an error all the same
            self._events.ended(
                ServiceError(f"the connection to the cache service ended with {error!r}; make a new Cache")
            )
            raise
        finally:
            if self._sock is not None:
                self._sock.close()

    def _count_restart(self) -> None:
        if time.monotonic() - self._connected_s > _LASTED_S:
            self._restarts = 0
        self._restarts += 1
        if self._restarts > 2 * RESTARTS_MAX:
            raise ServiceError(
                f"cache services ended {self._restarts} times in a row without serving anything; see their log"
            )

    def _connect(self) -> None:
        avoid = f"it ended {self._restarts} times in a row without serving anything; see its log"
        welcomed = self._events.connect(self._stop, avoid if self._restarts > RESTARTS_MAX else "")
        service_id, pid = welcomed.welcome.service_id, peer_pid(welcomed.sock)
        self.was_refused = self._end not in (None, _End.SILENT) and (
            service_id == self._service_id or (self._end is _End.CUT_OFF and self._lives())
        )
        self._service_id, self._service_pid = service_id, pid
        self._connected_s = time.monotonic()
        self._events.connected(self, welcomed)

    def _lives(self) -> bool:
        """Whether the service before may still run."""
        return self._service_pid == 0 or is_running(self._service_pid)

    def _read_to_end(self) -> _End:
        """Pass on messages until the conversation has ended."""
        assert self._sock is not None
        data: bytes | None = b""
        silent_s, seen_s = 0.0, time.monotonic()
        while data is not None:
            try:
                for payload in self._frames.feed(data):
                    silent_s = 0.0
                    self._events.message(protocol.from_service(payload))
            except protocol.ConversationError as error:
                log.warning("the connection to the cache service is made anew: %s", error)
                return _End.CUT_OFF
            data = _receive(self._sock)
            now_s = time.monotonic()
            silent_s, seen_s = silent_s + min(now_s - seen_s, QUIET_S), now_s
            if silent_s >= SILENCE_S or self._is_not_read:
                return _End.SILENT
            if data == b"":
                with self._lock:
                    self.send(protocol.Ping())
        return _End.CLOSED if self._frames.is_between else _End.CUT_OFF


def _timeval(seconds: float) -> bytes:
    return struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))


def _receive(sock: socket.socket) -> bytes | None:
    """What has arrived; nothing where nothing does for `QUIET_S`, None at the end."""
    try:
        return sock.recv(1 << 18) or None
    except BlockingIOError:
        return b""
    except OSError:  # reset: the service died with bytes unread
        return None


def _shut_down(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it is closed already
        sock.shutdown(socket.SHUT_RDWR)
