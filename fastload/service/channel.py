"""The consumer's end of the socket: one thread that reads, and that connects again when the service has gone.

`Channel` knows frames and reconnecting, and nothing of what is said. Its owner passes functions that are called by the
channel's thread, one at a time:

- `connect(stop)` gives a `Connection`, starting a service where there is none; gives up when `stop` is set;
- `connected(channel, connection)` has to `adopt` it, and to send whatever the service must know;
- `lost()`: the connection broke; whatever it raises ends the channel;
- `message(message)`; whatever it raises ends the channel;
- `ended(error)`: there will be no other connection.

`send` may be called by any thread, one at a time (the owner's lock sees to that). It never fails: what cannot be sent
now is part of what `connected` tells the next service.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from fastload.cache import ArenaView
from fastload.errors import FastloadError, ServiceError
from fastload.service import protocol

# A service that takes no bytes for so long is as good as gone: its loop never blocks on anything.
_SEND_DEADLINE_S = 20
# A service that runs answers a hello at once; on a machine that is loaded heavily, after some seconds.
HELLO_DEADLINE_S = 15.0
# How often whoever waits for it looks whether it should still.
_LOOK_UP_S = 0.2

_PEER_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


@dataclass(slots=True)
class Connection:
    """A socket on which a service has said welcome, and its arena."""

    sock: socket.socket
    welcome: protocol.Welcome
    view: ArenaView
    frames: protocol.FrameReader  # what came after the welcome

    def close(self) -> None:
        """Nobody wants it after all."""
        self.sock.close()
        self.view.close()


class Channel:
    """See the module's text."""

    def __init__(
        self,
        connect: Callable[[threading.Event], Connection],
        connected: Callable[[Channel, Connection], None],
        lost: Callable[[], None],
        message: Callable[[protocol.FromService], None],
        ended: Callable[[FastloadError], None],
        name: str,
    ) -> None:
        self._connect, self._connected, self._lost = connect, connected, lost
        self._message, self._ended = message, ended
        self._stop = threading.Event()
        self._sock: socket.socket | None = None
        self._frames = protocol.FrameReader()
        self._thread = threading.Thread(target=self._run, name=f"fastload-consumer-{name}", daemon=True)

    def start(self) -> None:
        """Connect, in the caller's thread and with its errors; then begin to read."""
        self._connected(self, self._connect(self._stop))
        self._thread.start()

    def adopt(self, connection: Connection) -> None:
        """From now on, this is the connection."""
        seconds = struct.pack("ll", _SEND_DEADLINE_S, 0)
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, seconds)
        self._sock, self._frames = connection.sock, connection.frames

    def send(self, message: protocol.Message) -> None:
        """Send, or leave it: see the module's text."""
        if self._sock is None:
            return
        try:
            self._sock.sendall(protocol.frame(message))
        except OSError:  # the service died or hangs; the reading thread finds the same and connects again
            _shut_down(self._sock)

    def close(self) -> None:
        """End the connection and the thread."""
        self._stop.set()
        if self._sock is not None:
            _shut_down(self._sock)
        if self._thread is not threading.current_thread():
            self._thread.join()

    def abandon(self) -> None:
        """In a forked child: let go of the parent's socket without a word to the service."""
        sock, self._sock = self._sock, None
        if sock is not None:
            os.close(sock.detach())

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._read_to_end()
                if not self._stop.is_set():
                    self._lost()
                    self._connected(self, self._connect(self._stop))
        except FastloadError as error:
            if not self._stop.is_set():
                self._ended(error)
        except Exception as error:  # a defect, of whatever kind: whoever waits is told all the same
            self._ended(ServiceError(f"the connection to the cache service ended with {error!r}; make a new Cache"))
            raise
        finally:
            if self._sock is not None:
                self._sock.close()

    def _read_to_end(self) -> None:
        """Hand on messages until the service has gone."""
        assert self._sock is not None
        data = b""
        while True:
            for payload in self._frames.feed(data):
                self._message(protocol.from_service(payload))
            data = _receive(self._sock)
            if not data:
                break
        self._sock.close()


def _receive(sock: socket.socket) -> bytes:
    try:
        return sock.recv(1 << 18)
    except OSError:  # reset: the service died with bytes of ours unread
        return b""


def _shut_down(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it is closed already
        sock.shutdown(socket.SHUT_RDWR)


def greet(
    sock: socket.socket,
    hello: protocol.Hello,
    where: str,
    stop: threading.Event | None = None,
    deadline_s: float = HELLO_DEADLINE_S,
) -> Connection | None:
    """Say hello on a fresh socket, which is closed unless this succeeds. None: the service was just ending, or `stop`
    was set.

    ServiceError where the service refuses, is another version, another user's, or does not answer within `deadline_s`.
    """
    fds: list[int] = []
    try:
        _check_peer(sock, where)
        frames = protocol.FrameReader()
        payload = _first_frame(sock, hello, frames, fds, where, stop or threading.Event(), deadline_s)
        if payload is None:
            sock.close()
            return None
        return _welcomed(sock, payload, frames, fds, where)
    except BaseException:
        sock.close()
        raise
    finally:
        for fd in fds:
            os.close(fd)


def _check_peer(sock: socket.socket, where: str) -> None:
    """Before anything is said: the hello holds credentials."""
    uid = peer_uid(sock)
    if uid != os.geteuid():
        raise ServiceError(
            f"the process that listens at {where} belongs to user {uid}, and this process runs as user "
            f"{os.geteuid()}: it was told nothing; name a directory of your own (Cache(directory), or FASTLOAD_CACHE)"
        )


def peer_uid(sock: socket.socket) -> int:
    """The user at the other end of a connected Unix socket."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    uid: int = _PEER_CREDENTIALS.unpack(credentials)[1]
    return uid


def _first_frame(
    sock: socket.socket,
    hello: protocol.Hello,
    frames: protocol.FrameReader,
    fds: list[int],
    where: str,
    stop: threading.Event,
    deadline_s: float,
) -> bytes | None:
    deadline = time.monotonic() + deadline_s
    try:
        sock.settimeout(deadline_s)
        sock.sendall(protocol.frame(hello))
        sock.settimeout(min(deadline_s, _LOOK_UP_S))
        while not stop.is_set() and time.monotonic() < deadline:
            try:
                data, received, flags, _ = socket.recv_fds(sock, 1 << 16, 1, socket.MSG_CMSG_CLOEXEC)
            except TimeoutError:
                continue
            fds += received
            if not data:
                return None
            if len(fds) > 1 or flags & socket.MSG_CTRUNC:  # the kernel has closed those that were cut off
                raise ServiceError(f"the cache service at {where} sent more descriptors than one")
            for payload in frames.feed(data):
                sock.settimeout(None)
                return payload
    except ConnectionError:  # it went away between accepting and answering
        return None
    except TimeoutError:  # it takes no bytes
        pass
    if stop.is_set():
        return None
    raise ServiceError(f"the cache service at {where} has not answered for {deadline_s:g} s")


def _welcomed(
    sock: socket.socket, payload: bytes, frames: protocol.FrameReader, fds: list[int], where: str
) -> Connection:
    message = protocol.from_service(payload)
    if isinstance(message, protocol.Refused):
        raise ServiceError(f"{message.message} (cache {where})")
    if isinstance(message, protocol.Welcome) and message.version != protocol.VERSION:
        raise ServiceError(
            f"the cache service at {where} (process {message.pid}) speaks protocol {message.version}, this fastload "
            f"{protocol.VERSION}: let its jobs end, or use another cache directory"
        )
    if not isinstance(message, protocol.Welcome) or len(fds) != 1:
        raise ServiceError(f"the cache service at {where} answered with {type(message).__name__}, without its arena")
    view = ArenaView(fds[0], message.buffer_count * message.chunk_bytes)
    return Connection(sock, message, view, frames)
