"""Cache services that are forked from a process that has imported all that they need.

A test that uses a cache starts a service or several, and nearly all of a start, a third of a second of CPU, is imports.
So where a process of the tests is to start a service, a process beside it forks one instead. From then on that is like
one that was started: in a session of its own, with the command line, environment, descriptors and directory that it
would have; only `/proc/PID/environ` is another's. All other processes start services as users' jobs do; and so does
this one where the environment sets up Python or fastload otherwise than that of the tests, and where a test asks for it
(`real_start`).
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
from collections.abc import Mapping
from typing import Any

_ROOM = 4096  # for a command line
_ALIKE = ("PYTHON", "FASTLOAD_", "LD_", "MALLOC_", "COVERAGE_")


class Zygote:
    """The process that is forked, as those that ask it see it: this process and what it forks."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._settings = _settings(environ)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind("")  # the kernel chooses an abstract name
        self._listener.listen(64)
        life, self._life = os.pipe()
        command = [sys.executable, "-m", "tests.zygote", str(self._listener.fileno()), str(life), "-" * _ROOM]
        fds = (self._listener.fileno(), life)
        self.process = subprocess.Popen(command, pass_fds=fds, env={**environ, "OPENBLAS_NUM_THREADS": "1"})
        os.close(life)

    def close(self) -> None:
        os.close(self._life)
        self._listener.close()
        self.process.wait()

    def popen(self, command: list[str], **settings: Any) -> Any:
        """In place of `subprocess.Popen` for a service that detaches itself; None where it has to be started."""
        if _settings(settings["env"]) != self._settings:
            return None
        (ready,) = settings["pass_fds"]
        asked = json.dumps({"command": command, "env": settings["env"], "cwd": settings["cwd"], "ready": ready})
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.connect(self._listener.getsockname())
            socket.send_fds(connection, [asked.encode()], [settings["stdout"].fileno(), ready])
            connection.recv(1)  # it has the descriptors
        return _Detached()


class _Detached:
    """The process that was started for the service, which forks it and ends."""

    def wait(self, timeout_s: float) -> None:
        """It has ended."""

    def kill(self) -> None:
        raise AssertionError


def _settings(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name.startswith(_ALIKE)}


def _fork_on_request(listener: socket.socket, life: int) -> dict[str, Any]:
    """What was asked, in the process that was forked for it."""
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    poll.register(life, select.POLLIN)
    while True:
        if any(fd == life for fd, _ in poll.poll()):
            os._exit(0)
        connection, _ = listener.accept()
        data, fds, _, _ = socket.recv_fds(connection, 1 << 20, 2)
        with contextlib.closing(connection):
            if os.fork() == 0:
                return {**json.loads(data), "fds": fds}
            for fd in fds:
                os.close(fd)


def _become(asked: dict[str, Any]) -> None:
    os.setsid()
    log, ready = asked["fds"]
    kept = 1000  # above what the starter may have used
    os.dup2(ready, kept)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.closerange(3, kept)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(kept, asked["ready"])
    os.closerange(kept, kept + 1)
    if asked["ready"] != 3:
        os.close(3)
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
    _become(_fork_on_request(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])))
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    sys.exit(main(sys.argv[1:]))
