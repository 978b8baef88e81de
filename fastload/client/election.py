"""How a consumer finds its directory's service, or starts one.

The process that holds the directory's lock is the service. A consumer first tries the socket. If there is no answer it
starts a service, which tries for the lock: of several started at once one gets it and the others end. A consumer whose
service lost tries the socket again; so does one whose service accepts and then closes, since it was just ending.

Between tries only time can be waited for: the file system gives no notice when a lock or a socket becomes free.
"""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Callable

from fastload import protocol
from fastload.client.handshake import Welcomed, greet
from fastload.errors import CacheError, FastloadError, ServiceError
from fastload.rendezvous import ServiceLocation
from fastload.service.host.launch import StartError, log_tail

DEADLINE_S = 60.0
_TRY_AGAIN_S, _TRY_AGAIN_MAX_S = 0.02, 0.5
# A service that ends before it serves and says nothing was probably killed, which the next one may survive. After so
# many the next try would end alike.
_FAILED_STARTS_MAX = 3


def connect(
    directory: ServiceLocation,
    hello: protocol.Hello,
    start: Callable[[threading.Event], None],
    stop: threading.Event,
    deadline_s: float = DEADLINE_S,
) -> Welcomed:
    """A connection to the directory's service.

    `start(stop)` starts one; it need not succeed where another was quicker.

    Raises what `start` raises, ServiceError at the deadline or when `stop` is set, and CacheError where the system
    refuses what either needs; no other OSError, so that a reconnecting thread can pass it on to those that wait.
    """
    try:
        return _connect(directory, hello, start, stop, deadline_s)
    except FastloadError:
        raise
    except OSError as error:
        raise CacheError(_refused(directory, error)) from error


def _refused(directory: ServiceLocation, error: OSError) -> str:
    return (
        f"no cache service for {directory.path} can be started or reached: {error}; "
        "look at the rights in the directory, and at the limits of this process (ulimit -a)"
    )


def _connect(
    directory: ServiceLocation,
    hello: protocol.Hello,
    start: Callable[[threading.Event], None],
    stop: threading.Event,
    deadline_s: float,
) -> Welcomed:
    deadline = time.monotonic() + deadline_s
    failed_starts, wait_s = 0, _TRY_AGAIN_S
    while not stop.is_set():
        connection = _try(directory, hello, stop)
        if connection is not None:
            return connection
        if time.monotonic() > deadline:
            raise ServiceError(
                f"no cache service for {directory.path} could be reached within {deadline_s:g} s; its log "
                f"({directory.log_path}) ends with:\n{log_tail(directory.log_path)}"
            )
        try:
            start(stop)
        except StartError:
            failed_starts += 1
            if failed_starts == _FAILED_STARTS_MAX:
                raise
        except FileNotFoundError:  # the directory was removed just now; the next try makes it again
            pass
        # It serves now, or another is about to: try the socket before starting yet another one.
        connection = _try(directory, hello, stop)
        if connection is not None:
            return connection
        stop.wait(wait_s * (1 + random.random()))
        wait_s = min(2 * wait_s, _TRY_AGAIN_MAX_S)
    raise ServiceError(f"connecting to the cache service for {directory.path} was given up: the consumer is closed")


def _try(directory: ServiceLocation, hello: protocol.Hello, stop: threading.Event) -> Welcomed | None:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)  # a Unix socket connects at once, or not
        with directory.socket_address() as address:
            sock.connect(address)
    except (FileNotFoundError, ConnectionError, BlockingIOError):  # no service, or its backlog is full
        sock.close()
        return None
    except BaseException:
        sock.close()
        raise
    return greet(sock, hello, str(directory.path), stop)
