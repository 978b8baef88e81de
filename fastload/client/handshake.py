"""The first exchange with a service: hello and welcome, with the arena as a descriptor.

The peer's user is checked before anything is sent, since the hello holds credentials.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from dataclasses import dataclass, field

from fastload import protocol
from fastload.cache import ArenaView
from fastload.errors import ServiceError
from fastload.rendezvous import peer_uid

# A service that runs answers a hello at once; on a machine that is loaded heavily, after some seconds.
HELLO_DEADLINE_S = 15.0
# How often a wait for the answer checks whether it should go on.
_LOOK_UP_S = 0.2


@dataclass(slots=True)
class Welcomed:
    """A socket on which a service has said welcome, and its arena."""

    sock: socket.socket
    welcome: protocol.Welcome
    view: ArenaView
    frames: protocol.FrameReader  # what came after the welcome
    troubles: list[str] = field(default_factory=list)  # warnings for the user
    beside: str = ""  # why it is not the directory's own service; "" where it is

    def close(self) -> None:
        self.sock.close()
        self.view.close()


def greet(
    sock: socket.socket,
    hello: protocol.Hello,
    where: str,
    stop: threading.Event | None = None,
    deadline_s: float | None = None,
) -> Welcomed | None:
    """Say hello on a fresh socket, which is closed unless this succeeds. None: the service was just ending, or `stop`
    was set.

    ServiceError where the service refuses, is another version, another user's, or does not answer within `deadline_s`
    (default: 15 s).
    """
    fds: list[int] = []
    try:
        check_peer(sock, where)
        frames = protocol.FrameReader()
        payload = first_frame(
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


def check_peer(sock: socket.socket, where: str) -> None:
    """ServiceError unless the process that listens is this user's."""
    uid = peer_uid(sock)
    if uid != os.geteuid():
        raise ServiceError(
            f"the process that listens at {where} belongs to user {uid}, and this process runs as user "
            f"{os.geteuid()}: no data or credentials were sent to it; name a directory of your own "
            "(Cache(directory), or FASTLOAD_CACHE)"
        )


def first_frame(
    sock: socket.socket,
    hello: protocol.Hello | protocol.Observe,
    frames: protocol.FrameReader,
    fds: list[int],
    where: str,
    stop: threading.Event,
    deadline_s: float,
) -> bytes | None:
    """Send the first message; the answer to it, None where the service was just ending. Its descriptors join `fds`."""
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
) -> Welcomed:
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
    return Welcomed(sock, message, view, frames)
