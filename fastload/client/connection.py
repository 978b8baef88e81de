"""The consumer's end of the socket: one thread that reads, and that connects again when the service has gone.

`Channel` knows frames and reconnecting, and nothing of what is said. Its owner passes functions that are called by the
channel's thread, one at a time:

- `connect(stop)` gives a `Welcomed`, starting a service where there is none; gives up when `stop` is set;
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

from fastload import protocol
from fastload.client.handshake import Welcomed
from fastload.errors import FastloadError, ServiceError

# A service from which nothing is heard for so long is asked; one that takes nothing and says nothing for so long is as
# good as gone: its loop never blocks on anything. On a machine that is loaded heavily it may take some seconds.
QUIET_S, SILENCE_S = 5.0, 20.0
log = logging.getLogger("fastload")


class Channel:
    """See the module's text."""

    def __init__(
        self,
        connect: Callable[[threading.Event], Welcomed],
        connected: Callable[[Channel, Welcomed], None],
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

    def adopt(self, connection: Welcomed) -> None:
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
