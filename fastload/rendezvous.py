"""Where consumers and a service meet, and who is at the other end of a socket.

Mostly that is a cache directory. A `StandIn` serves in place of a directory whose own service hangs or speaks another
protocol version, or that cannot be used.

A stand-in has no directory and no disk tier. Its address and its lock are names in the kernel (abstract Unix sockets),
which end with their holders and leave nothing behind, so a machine on which nothing can be written will do. All
processes that have the same directory and the same size of chunks meet at one name. Such names belong to a network
namespace, which containers may share while the same path leads each to a directory of its own, so the mount namespace
is part of the name. Any user may take a name, or connect to it: both sides check the peer's user before they send
anything.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

from fastload import protocol
from fastload.cache import CacheDirectory
from fastload.cache.directory import BACKLOG
from fastload.config import CacheLimits
from fastload.lifecycle import reset_on_fork


class StandIn:
    """A service's home without a directory, with the same methods as a `CacheDirectory`."""

    warnings: tuple[str, ...] = ()
    root = Path("/dev")
    log_path = Path(os.devnull)  # there may be nowhere to write one
    is_lost = False

    def __init__(self, path: Path, limits: CacheLimits, *, alone: bool = False) -> None:
        """In place of the directory at `path`, with these limits, of which those of the disk are 0. `alone`: under a
        name that no other process has, for the service in this process.
        """
        self.path, self.limits, self.is_alone = path, limits, alone
        words = [os.fsencode(path), str(limits.chunk_bytes).encode(), _mounts(), os.urandom(16) if alone else b""]
        name = blake2b(b"\0".join(words), digest_size=16).hexdigest()
        self._address = f"\0fastload-{protocol.VERSION}-{os.geteuid()}-{name}"
        self._lock: socket.socket | None = None

    def renewed(self) -> StandIn:
        """Itself: there is nothing that could have been removed."""
        return self

    @contextlib.contextmanager
    def opened(self) -> Iterator[Path]:
        """Where its log is."""
        yield self.root

    @contextlib.contextmanager
    def socket_address(self) -> Iterator[str]:
        """Where the service listens."""
        yield self._address

    def try_lock(self) -> bool:
        """Become the service, if there is none; whether this object holds the lock. Never blocks."""
        if self._lock is None:
            lock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                lock.bind(f"{self._address}-lock")
            except OSError:  # another process has it
                lock.close()
                return False
            self._lock = lock
            reset_on_fork(self, StandIn.unlock)
        return True

    def unlock(self) -> None:
        """Give the lock back. May be called twice, and without it."""
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.close()

    def listen(self) -> socket.socket:
        """The socket at which consumers find the service, which holds the lock. OSError as the system gives it."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.bind(self._address)
            sock.listen(BACKLOG)
            sock.setblocking(False)
        except BaseException:
            sock.close()
            raise
        return sock

    def remove_socket(self) -> None:
        """It ends with the service."""


def _mounts() -> bytes:
    """What paths mean here: the mount namespace, and the root directory, which chroot changes within one."""
    root = os.stat("/")
    try:
        namespace = os.stat("/proc/self/ns/mnt").st_ino
    except OSError:  # no /proc
        namespace = 0
    return f"{namespace}-{root.st_dev}-{root.st_ino}".encode()


ServiceLocation = CacheDirectory | StandIn
_PEER_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


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
