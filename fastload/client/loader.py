"""A process's connection for one load: the service reads objects for it, into memory that the node's processes share.

It ends with the first thing that goes wrong, since whoever loads can read by itself: a service that has ended, or says
nothing, costs the time until that is noticed, and no more.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import mmap
import os
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

from fastload import protocol
from fastload.cache import syscalls
from fastload.client.connector import Connector
from fastload.client.handshake import Welcomed
from fastload.errors import CacheError, FastloadError, ServiceError, from_wire
from fastload.lifecycle import reset_on_fork
from fastload.redaction import redact
from fastload.store import StoreOptions

# A service that has said nothing for so long is pinged, and one that says nothing to that either is hung.
_QUIET_S, _SILENCE_S = 2.0, 10.0
# A service that answers pings, and for so long nothing else.
_STUCK_S = 120.0
_FDS_AT_ONCE = 8


class Loader:
    """See the module's text. Thread-safe."""

    def __init__(self, connector: Connector, storage_options: Mapping[str, Any] | None, name: str) -> None:
        """Connect, starting the service where none runs; CacheError, ConfigError or ServiceError where that fails, and
        where only another service than the directory's own could be had.
        """
        wire = StoreOptions.from_environment(storage_options).to_wire()
        program = os.path.basename(sys.argv[0])[:255] if getattr(sys, "argv", None) else ""
        hello = protocol.Hello(protocol.VERSION, os.getpid(), redact(name), wire, group=os.getpgrp(), program=program)
        self._welcomed: Welcomed | None = connector.connect_to_own(hello, threading.Event())
        self._welcomed.view.close()
        self._welcomed.sock.settimeout(_QUIET_S)
        self._lock = threading.Lock()
        self._requests = itertools.count()
        self._waiting: dict[int, tuple[int, Future[Any]]] = {}  # the size of the memory that is asked for, or 0
        self._fds: list[int] = []
        self._ended: FastloadError | None = None
        reset_on_fork(self, Loader._forget_after_fork)
        threading.Thread(target=self._run, name="fastload-loader", daemon=True).start()

    def load(self, url: str, size: int, version: tuple[str | None, int] | None) -> tuple[int, Future[mmap.mmap]]:
        """Ask for the memory of an object, which is mapped privately, and for a number that stands for the object."""
        return self._ask(lambda request: protocol.Load(request, url, size, version), size)

    def read(self, load: int, start: int, end: int) -> None:
        """Wait until these bytes of an object are in its memory; the error of what fails."""
        _, future = self._ask(lambda request: protocol.LoadRange(request, load, start, end - start))
        future.result()

    def close(self) -> None:
        """May be called twice. Who waits gets a ServiceError."""
        self._end(ServiceError("this load has ended"))

    def _ask(self, make: Callable[[int], protocol.Message], size: int = 0) -> tuple[int, Future[Any]]:
        future = Future[Any]()
        with self._lock:
            number = next(self._requests)
            if self._ended is not None or self._welcomed is None:
                future.set_exception(self._ended or ServiceError("this load was begun in another process"))
                return number, future
            self._waiting[number] = size, future
            try:
                self._welcomed.sock.sendall(protocol.frame(make(number)))
            except OSError:  # it has ended, or takes nothing: half a message may have been sent
                _shut_down(self._welcomed.sock)
        return number, future

    def _end(self, error: FastloadError) -> None:
        with self._lock:
            if self._ended is None:
                self._ended = error
            waiting, self._waiting = self._waiting, {}
            if self._welcomed is not None:
                _shut_down(self._welcomed.sock)
        for _, future in waiting.values():
            future.set_exception(self._ended)

    def _run(self) -> None:
        welcomed = self._welcomed
        assert welcomed is not None
        try:
            self._receive(welcomed)
        except FastloadError as error:
            self._end(error)
        except Exception as error:  # a defect: who waits must get an error all the same
            self._end(ServiceError(f"the connection to the cache service ended with {error!r}"))
            raise
        finally:
            welcomed.sock.close()
            for fd in self._fds:
                os.close(fd)

    def _receive(self, welcomed: Welcomed) -> None:
        """Until the connection has ended, which is an error."""
        data = b""
        silent_s = stuck_s = 0.0
        while True:
            for payload in welcomed.frames.feed(data):
                if self._take(protocol.from_service(payload)):
                    stuck_s = 0.0
            try:
                data, fds, flags, _ = socket.recv_fds(welcomed.sock, 1 << 16, _FDS_AT_ONCE, socket.MSG_CMSG_CLOEXEC)
            except TimeoutError:
                data = b""
                is_waiting = bool(self._waiting)
                silent_s, stuck_s = (silent_s + _QUIET_S, stuck_s + _QUIET_S) if is_waiting else (0.0, 0.0)
                if silent_s >= _SILENCE_S or stuck_s >= _STUCK_S:
                    raise ServiceError(f"the cache service has not answered for {max(silent_s, stuck_s):g} s") from None
                if is_waiting:
                    self._ping(welcomed.sock)
                continue
            except OSError:  # reset
                data, fds, flags = b"", [], 0
            self._fds += fds
            silent_s = 0.0
            if not data:
                raise ServiceError(f"the cache service (process {welcomed.welcome.pid}) has ended")
            if flags & socket.MSG_CTRUNC:
                raise ServiceError("this process has no room for another descriptor (ulimit -n)")

    def _ping(self, sock: socket.socket) -> None:
        with self._lock, contextlib.suppress(OSError):  # the next look finds out
            sock.sendall(protocol.frame(protocol.Ping()))

    def _take(self, message: protocol.FromService) -> bool:
        """Whether it answers something."""
        match message:
            case protocol.LoadMemory():
                size, future = self._answered(message.request)
                if not self._fds:
                    raise ServiceError("the cache service sent memory without its descriptor")
                fd = self._fds.pop(0)
                try:
                    future.set_result(_mapped(fd, size))
                except CacheError as error:
                    future.set_exception(error)
                finally:
                    os.close(fd)
            case protocol.Loaded():
                self._answered(message.request)[1].set_result(None)
            case protocol.RequestFailed():
                self._answered(message.request)[1].set_exception(from_wire(message.name, message.message))
            case protocol.Refused():
                raise ServiceError(message.message)
            case _:  # a pong, or what concerns other consumers
                return False
        return True

    def _answered(self, request: int) -> tuple[int, Future[Any]]:
        with self._lock:
            return self._waiting.pop(request, None) or (0, Future())  # where it was closed meanwhile

    def _forget_after_fork(self) -> None:
        """In a forked child: the socket and the thread are the parent's."""
        welcomed, self._welcomed = self._welcomed, None
        self._lock = threading.Lock()
        if welcomed is not None and welcomed.sock.fileno() >= 0:
            os.close(welcomed.sock.detach())


def _mapped(fd: int, size: int) -> mmap.mmap:
    """An object's memory; CacheError where it is not sealed memory of that size."""
    try:
        status = syscalls.fstat(fd)
        # Memory that could be cut off would end this process when it is read.
        is_sealed = syscalls.get_seals(fd) & fcntl.F_SEAL_SHRINK
        if status.st_uid != syscalls.geteuid() or status.st_size != size or not is_sealed:
            raise CacheError(f"the memory received is no sealed memory of {size} bytes")
        return syscalls.mmap_private(fd, size)
    except (OSError, ValueError) as error:
        if isinstance(error, FastloadError):
            raise
        raise CacheError(f"{size} bytes of memory cannot be mapped: {error}") from error


def _shut_down(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it is closed already
        sock.shutdown(socket.SHUT_RDWR)
