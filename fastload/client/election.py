"""How a consumer finds its directory's service, or becomes the reason that there is one.

Whoever holds the directory's lock is the service. A consumer first tries the socket. Where nobody answers it starts a
service, which tries for the lock: of several started at once one gets it and the others end. A consumer whose service
lost looks at the socket again. The same goes for a service that is just ending, which may accept and then say nothing.

Between tries there is nothing to wait on but time: the file system tells nobody when a lock or a socket becomes free.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import site
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastload import errors, protocol
from fastload.channel import Connection, greet
from fastload.errors import CacheError, FastloadError, ServiceError
from fastload.service.environment import of_service
from fastload.service.logs import FILE_BYTES_MAX
from fastload.service.standin import ServiceLocation, StandIn

DEADLINE_S = 60.0
_TRY_AGAIN_S, _TRY_AGAIN_MAX_S = 0.02, 0.5
_END_S = 5.0
# A service that ends before it serves, without a word: killed, most likely, which happens to be survived. One that does
# so again and again will not serve at the next try either.
_FAILED_STARTS_MAX = 3
_LOG_TAIL_BYTES = 2000


class StartError(ServiceError):
    """No service process can be started, or it ends while it is starting and says nothing."""


def connect(
    directory: ServiceLocation,
    hello: protocol.Hello,
    start: Callable[[threading.Event], None],
    stop: threading.Event,
    deadline_s: float = DEADLINE_S,
) -> Connection:
    """A connection to the directory's service.

    `start(stop)` is to start one, and need not succeed where another was quicker.

    Raises what `start` raises, ServiceError at the deadline or when `stop` is set, and CacheError where the system
    refuses what either needs: no other OSError, so that whoever connects again can tell those who wait.
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
) -> Connection:
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


def _try(directory: ServiceLocation, hello: protocol.Hello, stop: threading.Event) -> Connection | None:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)  # a Unix socket connects at once, or not
        with directory.socket_address() as address:
            sock.connect(address)
    except (FileNotFoundError, ConnectionError, BlockingIOError):  # nobody there, or more before us than it takes
        sock.close()
        return None
    except BaseException:
        sock.close()
        raise
    return greet(sock, hello, str(directory.path), stop)


def start_process(
    directory: ServiceLocation, idle_s: float, stop: threading.Event, deadline_s: float = DEADLINE_S
) -> None:
    """Start a service process; returns when it serves, when it found another one in its place, or at the deadline.

    Raises what kept it from serving, in its own words.
    """
    word = _run(directory.renewed(), idle_s, stop, deadline_s)
    if word is None:
        raise StartError(
            f"the cache service for {directory.path} ended while starting; its log ({directory.log_path}) ends "
            f"with:\n{log_tail(directory.log_path)}"
        )
    if word.get("status") == "error":
        name, message = word["error"]
        raise errors.from_wire(str(name), str(message))


def _run(directory: ServiceLocation, idle_s: float, stop: threading.Event, deadline_s: float) -> dict[str, Any] | None:
    reading, writing = os.pipe()
    try:
        try:
            with directory.opened() as root, _open_log(root / directory.log_path.name) as log:
                command = [sys.executable, "-m", "fastload.service", "--detach", f"--ready-fd={writing}"]
                command += [f"--directory={directory.path}", f"--idle-s={idle_s}"]
                command += [f"--limits={json.dumps(asdict(directory.limits))}"]
                command += ["--stand-in"] * isinstance(directory, StandIn)
                process = _popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(writing,),
                    env=_environment(os.environ),
                    cwd="/",
                )
        finally:
            os.close(writing)
        try:
            return _read_word(reading, stop, deadline_s)
        finally:
            _reap(process)
    finally:
        os.close(reading)


def _popen(command: list[str], **settings: Any) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(command, **settings)
    except OSError as error:  # no memory, no process or no program to be had
        raise StartError(
            f"no process can be started for a cache service: {error}; look at the limits of this process (ulimit -a) "
            "and at its memory"
        ) from error


def _reap(process: subprocess.Popen[bytes]) -> None:
    """It forks and ends; the service is not our child. One that was stopped in between never does."""
    for kills in (True, False):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_S)
            return
        if kills:
            process.kill()


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    """That of the service, which has this very package in reach, made of ours."""
    environment = of_service(environ)
    package = str(Path(__file__).resolve().parents[2])
    path = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = package if not path else f"{package}{os.pathsep}{path}"
    if site.ENABLE_USER_SITE and site.USER_BASE:  # packages of the user's are found by the home directory
        environment.setdefault("PYTHONUSERBASE", site.USER_BASE)
    environment["OPENBLAS_NUM_THREADS"] = "1"  # numpy only sorts here
    return environment


def _open_log(path: Path) -> Any:
    if path.exists() and path.stat().st_size > FILE_BYTES_MAX:
        os.replace(path, path.with_name(path.name + ".1"))
    return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab")


def _read_word(fd: int, stop: threading.Event, deadline_s: float) -> dict[str, Any] | None:
    """What the service says, None where it ended without a word."""
    data = b""
    poll = select.poll()  # unlike select(), for any descriptor
    poll.register(fd, select.POLLIN)
    deadline = time.monotonic() + deadline_s
    while not data.endswith(b"\n"):
        if stop.is_set() or time.monotonic() > deadline:
            return {"status": "taken"}  # the caller looks at `stop` and at its own deadline
        if poll.poll(100):
            piece = os.read(fd, 4096)
            if not piece:
                return None
            data += piece
    word = json.loads(data)
    assert isinstance(word, dict)
    return word


def log_tail(path: Path) -> str:
    """The end of a service's log, for an error."""
    try:
        return path.read_text(errors="replace")[-_LOG_TAIL_BYTES:] or "(nothing)"
    except OSError as error:  # none was written
        return f"({error})"
