"""Cache services that are forked from a process that has imported all that they need.

A test that uses a cache starts a service or several, and nearly all of a start, a quarter of a second of CPU, goes into
imports. So where a process of the tests is to start a service, a process beside it forks one instead. From then on that
is like one that was started: in a session of its own, with the command line, environment, descriptors and directory
that it would have; only `/proc/PID/environ` is another's. Interpreters that tests start anew, and all that these start,
start services as users' jobs do. So do the others where the environment sets up Python or fastload otherwise than that
of the tests, and where it does not name the process that is forked (`real_start` in `conftest`).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from fastload.service.host import launch

VARIABLE = "TESTS_ZYGOTE"
"""The address of the process that is forked: an abstract Unix socket, in hex."""

_ROOM = 4096  # for a command line
_ALIKE = ("PYTHON", "FASTLOAD_", "LD_", "MALLOC_", "COVERAGE_")
_started = launch._popen


def install() -> None:
    """From now on, services that this process and its forks start are forked, where the environment says from what."""
    launch._popen = _popen  # type: ignore[assignment]


@contextlib.contextmanager
def running() -> Iterator[str]:
    """The process that is forked; gives its address. It ends with this process at the latest."""
    life, ours = os.pipe()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind("")  # the kernel chooses an abstract name
        listener.listen(64)
        command = [sys.executable, "-m", "tests.zygote", str(listener.fileno()), str(life), "-" * _ROOM]
        environ = launch.child_environment(os.environ)
        process = subprocess.Popen(command, pass_fds=(listener.fileno(), life), env=environ)
        os.close(life)
        try:
            yield listener.getsockname().hex()
        finally:
            os.close(ours)
            process.wait()


def _popen(command: list[str], **settings: Any) -> Any:
    """In place of `subprocess.Popen`, for a service that detaches itself."""
    at = os.environ.get(VARIABLE)
    if at is None:
        return _started(command, **settings)
    (ready,) = settings["pass_fds"]
    asked = json.dumps({"command": command, "env": settings["env"], "cwd": settings["cwd"], "ready": ready})
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(bytes.fromhex(at))
        socket.send_fds(connection, [asked.encode()], [settings["stdout"].fileno(), ready])
        is_forked = connection.recv(1) == b"y"
    return _Detached() if is_forked else _started(command, **settings)


class _Detached:
    """What is started for a service, forks it and ends."""

    def wait(self, timeout_s: float) -> None:
        """It has ended."""


def _fork_on_request(listener: socket.socket, life: int) -> tuple[dict[str, Any], list[int]]:
    """What was asked for and the descriptors, in the process that was forked for it."""
    own = _settings(os.environ)
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    poll.register(life, select.POLLIN)
    while True:
        if any(fd == life for fd, _ in poll.poll()):
            os._exit(0)
        connection, _ = listener.accept()
        with connection:
            data, fds, _, _ = socket.recv_fds(connection, 1 << 20, 2)
            asked = json.loads(data)
            is_alike = _settings(asked["env"]) == own
            if is_alike and os.fork() == 0:
                return asked, fds
            with contextlib.suppress(BrokenPipeError):  # the process that asked was killed
                connection.send(b"y" if is_alike else b"n")
            for fd in fds:
                os.close(fd)


def _settings(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name.startswith(_ALIKE)}


def _become(asked: dict[str, Any], log: int, ready: int) -> None:
    os.setsid()
    apart = 1000  # above what is open anywhere in the tests
    os.dup2(ready, apart)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.closerange(3, apart)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(apart, asked["ready"])
    os.close(apart)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    sys.argv = asked["command"][2:]
    _show(asked["command"])


def _show(command: list[str]) -> None:
    """Write it where the kernel finds this process's command line."""
    with open("/proc/self/stat") as stat:
        start, end = map(int, stat.read().rpartition(")")[2].split()[45:47])
    line = "\0".join(command).encode() + b"\0"
    assert len(line) <= end - start, (len(line), end - start)
    ctypes.memmove(start, line.ljust(end - start, b"\0"), end - start)


if __name__ == "__main__":
    from fastload.service.host.process import main

    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # those that end are not waited for
    asked, fds = _fork_on_request(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))
    _become(asked, *fds)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    sys.exit(main(sys.argv[1:]))
