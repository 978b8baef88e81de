"""The service's log: bounded in lines a minute and in bytes, whatever causes them.

A peer, a store or a disk may give reason for a line as often as it likes, and the log lies beside the cache, on its
disk. So each place in the code that logs has ten lines at once and ten a minute; what is beyond is counted, and the
next line from there says how many were left out. When the file has its size, it becomes `service.log.1` in place of the
one before, and a new one begins, while the service runs.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from fastload.redaction import redact

FILE_BYTES_MAX = 4 << 20
LINES_AT_ONCE = 10
_LINES_PER_S = LINES_AT_ONCE / 60
_LINE_BYTES_MAX = 16 << 10
_STDOUT, _STDERR = 1, 2


@dataclass(slots=True)
class _CallSite:
    """A place in the code, and how many lines it may log now."""

    left: float
    at_s: float
    left_out: int = 0


class LineLimit(logging.Filter):
    """Lets so many records of each place pass. Safe to use from several threads."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        """`now`: a clock in seconds."""
        super().__init__()
        self._now = now
        self._lock = threading.Lock()
        self._places: dict[tuple[str, int], _CallSite] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether it may be logged; its message then says how many of its kind were not."""
        with self._lock:
            left_out = self._take((record.pathname, record.lineno))
        if left_out:
            record.msg = f"{record.getMessage()} [{left_out} more like this were left out]"
            record.args = None
        return left_out is not None

    def _take(self, key: tuple[str, int]) -> int | None:
        """How many were left out before this one; None where this one is."""
        now = self._now()
        place = self._places.setdefault(key, _CallSite(LINES_AT_ONCE, now))
        place.left = min(LINES_AT_ONCE, place.left + (now - place.at_s) * _LINES_PER_S)
        place.at_s = now
        if place.left < 1:
            place.left_out += 1
            return None
        place.left -= 1
        left_out, place.left_out = place.left_out, 0
        return left_out


@contextlib.contextmanager
def limited(name: str) -> Iterator[None]:
    """Within the block, the logger of this name is limited, wherever its records go."""
    limit, logger = LineLimit(), logging.getLogger(name)
    logger.addFilter(limit)
    try:
        yield
    finally:
        logger.removeFilter(limit)


class JsonLines(logging.Formatter):
    """A record as one line of JSON: `at`, `level`, `pid`, `message`, and `job` where it is of one."""

    def __init__(self, job: str = "") -> None:
        super().__init__()
        self._job = job

    def format(self, record: logging.LogRecord) -> str:
        """See the class's text; a traceback is part of the message."""
        # Before it is quoted: what hides secrets knows them as they were written.
        message = redact(super().format(record))[: _LINE_BYTES_MAX // 8]
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        values = {"at": at, "level": record.levelname.lower(), "pid": record.process, "message": message}
        return json.dumps(values | ({"job": self._job} if self._job else {}))


def log_to_stderr(job: str = "") -> ServiceLog:
    """The log of a daemon, or of the child that runs `job` for it: lines for people on a terminal, else JSON."""
    handler = ServiceLog()
    if os.isatty(_STDERR):
        mark = job.replace("%", "%%") + ": " if job else ""
        handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {mark}%(message)s", "%H:%M:%S"))
    else:
        handler.setFormatter(JsonLines(job))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.captureWarnings(capture=True)
    return handler


class ServiceLog(logging.Handler):
    """Writes to standard error, which is the log of a service process, and keeps that file small."""

    def __init__(self, bytes_max: int = FILE_BYTES_MAX) -> None:
        super().__init__()
        self._bytes_max = bytes_max
        self._path: Callable[[], Path | None] = lambda: None
        self._is_log = False
        self.addFilter(LineLimit())

    def keep_small(self, path: Callable[[], Path | None]) -> None:
        """`path()` is where the log lies, None while nothing may be written there. Where standard error is another
        file, as for a service that was started by hand, that is left alone.
        """
        self._path = path
        with contextlib.suppress(OSError):  # there is none
            at = path()
            self._is_log = at is not None and os.path.samestat(os.fstat(_STDERR), os.stat(at))

    def emit(self, record: logging.LogRecord) -> None:
        """Write it. Where that fails, because the disk is full or broken, there is nowhere to report it."""
        line = redact(self.format(record)).encode(errors="backslashreplace")[:_LINE_BYTES_MAX]
        with contextlib.suppress(OSError):
            os.write(_STDERR, line + b"\n")
            if self._is_log and os.fstat(_STDERR).st_size >= self._bytes_max:
                self._begin_anew()

    def _begin_anew(self) -> None:
        path = self._path()
        if path is None:  # the file's name is gone, and so will be the file
            os.ftruncate(_STDERR, 0)
            return
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(_STDERR), os.stat(path)):  # no other process has begun a new one
                os.replace(path, path.with_name(path.name + ".1"))
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            for standard in (_STDOUT, _STDERR):
                os.dup2(fd, standard)
        finally:
            os.close(fd)
