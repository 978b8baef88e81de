"""The consumer's end of the socket: one thread that reads, and that connects again when the service has gone.

`Channel` knows frames and reconnecting, and nothing of what is said. Its owner passes functions that are called by the
channel's thread, one at a time:

- `connect(stop)` gives a `Connection`, starting a service where there is none; gives up when `stop` is set;
- `connected(channel, connection)` has to `adopt` it, and to send whatever the service must know;
- `lost(silent, cut_off)`: the connection broke; or, where `silent` is its socket, the service has not said anything for
  long. Its leases hold until that socket is closed, which is up to the owner now. `cut_off`: the service may live on
  without us, since one of us broke off in the middle. Whatever it raises ends the channel;
- `quiet()`: nothing has been heard for some seconds; sends a ping;
- `message(message)`; whatever it raises ends the channel, save for a `ConversationError`, which ends the connection;
- `ended(error)`: there will be no other connection.

`send` may be called by any thread, one at a time (the owner's lock sees to that). It never fails: what cannot be sent
now is part of what `connected` tells the next service.

A service that is stopped, or whose loop is blocked, answers no ping. What counts is the time in which this thread saw
nothing come, not what the clock says: where the whole job was stopped and goes on, so may its service.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from fastload import protocol
from fastload.cache import ArenaView
from fastload.errors import FastloadError, ServiceError

# A service from which nothing is heard for so long is asked; one that takes nothing and says nothing for so long is as
# good as gone: its loop never blocks on anything. On a machine that is loaded heavily it may take some seconds.
QUIET_S, SILENCE_S = 5.0, 20.0
# A service that runs answers a hello at once; on a machine that is loaded heavily, after some seconds.
HELLO_DEADLINE_S = 15.0
# How often whoever waits for it looks whether it should still.
_LOOK_UP_S = 0.2

_PEER_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid

log = logging.getLogger("fastload")


@dataclass(slots=True)
class Connection:
    """A socket on which a service has said welcome, and its arena."""

    sock: socket.socket
    welcome: protocol.Welcome
    view: ArenaView
    frames: protocol.FrameReader  # what came after the welcome
    troubles: list[str] = field(default_factory=list)  # which its user should be warned of
    beside: str = ""  # why it is not the directory's own service

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
        lost: Callable[[socket.socket | None, bool], None],
        quiet: Callable[[], None],
        message: Callable[[protocol.FromService], None],
        ended: Callable[[FastloadError], None],
        name: str,
    ) -> None:
        self._connect, self._connected, self._lost, self._quiet = connect, connected, lost, quiet
        self._message, self._ended = message, ended
        self._stop = threading.Event()
        self._sock: socket.socket | None = None
        self._takes_nothing = self._cut_off = False
        self._frames = protocol.FrameReader()
        self._thread = threading.Thread(target=self._run, name=f"fastload-consumer-{name}", daemon=True)

    def start(self) -> None:
        """Connect, in the caller's thread and with its errors; then begin to read."""
        self._connected(self, self._connect(self._stop))
        self._thread.start()

    def adopt(self, connection: Connection) -> None:
        """From now on, this is the connection."""
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(SILENCE_S))
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(QUIET_S))
        self._takes_nothing = False
        self._sock, self._frames = connection.sock, connection.frames

    def send(self, message: protocol.Message) -> None:
        """Send, or leave it: see the module's text."""
        sock = self._sock
        if sock is None or self._takes_nothing:
            return
        try:
            sock.sendall(protocol.frame(message))
        except BlockingIOError:  # at the deadline. Half a message may have been sent: nothing can follow it
            self._takes_nothing = True
        except OSError:  # the service died; the reading thread finds the same and connects again
            _shut_down(sock)

    def part(self, silent: socket.socket, message: protocol.Message) -> None:
        """Tell a silent service one thing more, if that can be done now."""
        if not self._takes_nothing:
            with contextlib.suppress(OSError):  # it is full
                silent.send(protocol.frame(message), socket.MSG_DONTWAIT)

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
                is_silent = self._read_to_end()
                sock, self._sock = self._sock, None
                assert sock is not None
                if self._stop.is_set() or not is_silent:
                    sock.close()
                if not self._stop.is_set():
                    self._lost(sock if is_silent else None, self._cut_off)
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

    def _read_to_end(self) -> bool:
        """Hand on messages until the service has gone, or has been silent for too long, which is True."""
        assert self._sock is not None
        data: bytes | None = b""
        silent_s, seen_s = 0.0, time.monotonic()
        while data is not None:
            try:
                for payload in self._frames.feed(data):
                    silent_s = 0.0
                    self._message(protocol.from_service(payload))
            except protocol.ConversationError as error:
                log.warning("the connection to the cache service is made anew: %s", error)
                self._cut_off = True
                return False
            data = _receive(self._sock)
            now_s = time.monotonic()
            silent_s, seen_s = silent_s + min(now_s - seen_s, QUIET_S), now_s
            if silent_s >= SILENCE_S or self._takes_nothing:
                return True
            if data == b"":
                self._quiet()
        self._cut_off = not self._frames.is_between
        return False


def _timeval(seconds: float) -> bytes:
    return struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))


def _receive(sock: socket.socket) -> bytes | None:
    """What has come; nothing where nothing does for `QUIET_S`, None at the end."""
    try:
        return sock.recv(1 << 18) or None
    except BlockingIOError:
        return b""
    except OSError:  # reset: the service died with bytes of ours unread
        return None


def _shut_down(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it is closed already
        sock.shutdown(socket.SHUT_RDWR)


def greet(
    sock: socket.socket,
    hello: protocol.Hello,
    where: str,
    stop: threading.Event | None = None,
    deadline_s: float | None = None,
) -> Connection | None:
    """Say hello on a fresh socket, which is closed unless this succeeds. None: the service was just ending, or `stop`
    was set.

    ServiceError where the service refuses, is another version, another user's, or does not answer within `deadline_s`
    (default: 15 s).
    """
    fds: list[int] = []
    try:
        _check_peer(sock, where)
        frames = protocol.FrameReader()
        payload = _first_frame(
            sock, hello, frames, fds, where, stop or threading.Event(), deadline_s or HELLO_DEADLINE_S
        )
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
            f"{os.geteuid()}: no data or credentials were sent to it; name a directory of your own "
            "(Cache(directory), or FASTLOAD_CACHE)"
        )


def peer_uid(sock: socket.socket) -> int:
    """The user at the other end of a connected Unix socket."""
    return _peer(sock)[1]


def peer_pid(sock: socket.socket) -> int:
    """The process that listened at the other end of a connected Unix socket; 0 where it is not to be seen from here."""
    return _peer(sock)[0]


def _peer(sock: socket.socket) -> tuple[int, int, int]:
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    pid, uid, gid = _PEER_CREDENTIALS.unpack(credentials)
    return pid, uid, gid


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
