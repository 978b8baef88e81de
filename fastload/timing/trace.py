"""`FASTLOAD_TRACE=file.json`: what each thread did, and when, for ui.perfetto.dev (Chrome's trace events).

The file is an array of JSON, one event a line, so it can be read as far as it goes where the process was killed: a
reader adds the bracket that is missing. It is written by the threads whose events it holds, a few hundred at a time;
fewer are written after a second by a thread that sleeps while there is nothing to write, so that the file has what an
idle or killed process did. It has an end: after `BYTES_MAX` one event says so and nothing more is written.

Each process writes a file of its own. The first has the name that was given; another one that runs at the same time, as
the service and other ranks do, has its process id before the ending. All times are of the system's monotonic clock, so
files of one machine can be joined. Where the variable is not set, nothing of this is called.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import logging
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from fastload.lifecycle import Ending, end_at_exit, on_fork

VARIABLE = "FASTLOAD_TRACE"
BYTES_MAX = 256 << 20
# Events that are written together, and how long fewer of them wait for more.
_EVENTS, _WRITE_AFTER_S = 256, 1.0

log = logging.getLogger("fastload")


class Trace:
    """One process's file. Thread-safe."""

    def __init__(self, path: Path, program: str, bytes_max: int = BYTES_MAX) -> None:
        """Begin it; OSError where it cannot be written."""
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._closing = threading.Event()
        self._lines: list[str] = []
        self._named: set[int] = set()
        self._request_count = 0
        self._fd = _opened(path)
        self._left = bytes_max
        os.write(self._fd, b"[\n")
        self._add({"ph": "M", "name": "process_name", "tid": 0, "args": {"name": program}})
        self._flush()
        self._writer = threading.Thread(target=self._write_by_time, name="fastload-trace", daemon=True)
        with contextlib.suppress(RuntimeError):  # no thread can be had: then by number, and at the end
            self._writer.start()

    def span(self, name: str, began_s: float, ended_s: float, **more: Any) -> None:
        """The calling thread did this in this time."""
        thread = threading.get_native_id()
        if thread not in self._named:
            self._named.add(thread)
            name_of_thread = {"name": threading.current_thread().name}
            self._add({"ph": "M", "name": "thread_name", "tid": thread, "args": name_of_thread})
        self.row_span(thread, name, began_s, ended_s, **more)

    def row_span(self, row: int, name: str, began_s: float, ended_s: float, **more: Any) -> None:
        """The same in a row that is no thread's."""
        event: dict[str, Any] = {"ph": "X", "name": name, "tid": row, "ts": _micros(began_s)}
        self._add({**event, "dur": max(0.0, _micros(ended_s - began_s)), **({"args": more} if more else {})})

    def request(self, name: str, began_s: float, ended_s: float, **more: Any) -> None:
        """What is no thread's, and may overlap with others of its kind."""
        self._request_count += 1
        event = {"cat": "request", "id": self._request_count, "name": name, "tid": 0}
        self._add({**event, "ph": "b", "ts": _micros(began_s), "args": more})
        self._add({**event, "ph": "e", "ts": _micros(ended_s)})

    def count(self, name: str, at_s: float, **values: float) -> None:
        """A figure at a moment, which is drawn as a curve."""
        self._add({"ph": "C", "name": name, "tid": 0, "ts": _micros(at_s), "args": values})

    def close(self) -> None:
        """Write what is left, and the end."""
        self._closing.set()
        with self._lock:
            self._flush()
            if self._left >= 0 and self._fd >= 0:
                os.write(self._fd, b'{"ph":"M","name":"trace_ends","pid":%d,"tid":0,"args":{}}\n]\n' % self._pid)
            self._let_go()
            self._changed.notify()
        if self._writer.ident is not None:
            self._writer.join()

    def abandon(self) -> None:
        """In a forked child: the file is the parent's, and the lock may be held."""
        self._lines.clear()
        self._let_go()

    def _let_go(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _add(self, event: dict[str, Any]) -> None:
        line = json.dumps({**event, "pid": self._pid}, separators=(",", ":"))
        with self._lock:
            self._lines.append(line)
            if len(self._lines) >= _EVENTS:
                self._flush()
            elif len(self._lines) == 1:
                self._changed.notify()

    def _write_by_time(self) -> None:
        while not self._closing.wait(_WRITE_AFTER_S):
            with self._lock:
                self._flush()
                self._changed.wait_for(lambda: bool(self._lines) or self._closing.is_set())

    def _flush(self) -> None:
        lines, self._lines = self._lines, []
        if not lines or self._left < 0 or self._fd < 0:
            return
        data = (",\n".join(lines) + ",\n").encode()
        self._left -= len(data)
        if self._left < 0:
            full = {"ph": "i", "name": "the trace is full", "s": "g", "tid": 0, "pid": self._pid}
            data = (json.dumps({**full, "ts": _micros(time.monotonic())}) + "\n]\n").encode()
        try:
            os.write(self._fd, data)
        except OSError as error:  # the disk is full, for example: a trace stops no training
            self._left = -1
            log.warning("the trace ends here: %s", error)


def _micros(seconds: float) -> float:
    return round(seconds * 1e6, 3)


def _opened(path: Path) -> int:
    """The file of that name; where another process writes to it, one with our process id."""
    own = path.with_name(f"{path.stem}.{os.getpid()}{path.suffix}")
    for each in (path, own):
        fd = os.open(each, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_APPEND, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            continue
        os.ftruncate(fd, 0)
        return fd
    raise OSError(f"{own} is being written by another process")


def _program(argument: str) -> str:
    """What is running, as a user would call it."""
    path = Path(argument)
    return ".".join(path.parts[-3:-1]) if path.name == "__main__.py" else path.name or "python"


class _Process:
    """What a trace ends with."""


_process = _Process()
_endings: list[Ending] = []


@functools.cache
def _trace() -> Trace | None:
    name = os.environ.get(VARIABLE)
    if not name:
        return None
    try:
        trace = Trace(Path(name).absolute(), _program(sys.argv[0]))
    except OSError as error:
        log.warning("%s=%s: there will be no trace: %s", VARIABLE, name, error)
        return None
    end_at_exit()
    _endings.append(Ending(_process, trace.close, waits=False, at_exit=True))
    return trace


def trace() -> Trace | None:
    """This process's trace, if one is asked for."""
    return _trace()


@on_fork
def _begin_as_child() -> None:
    """A child begins with none: where it makes batches, its trainer's trace says when."""
    if _trace.cache_info().currsize:
        found = _trace()
        if found is not None:
            found.abandon()
    _trace.cache_clear()
