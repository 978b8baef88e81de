"""Temp files that say whose they are.

A file is written under a temp name beside its place and renamed when it is whole. The name carries the
writer's process id and the time when that process started (in the kernel's ticks since boot), so that a process that
finds the file later can tell a write in progress from what a killed process left: ids are used again, the
pair is not. A writer that this machine does not show, in another pid namespace for example, looks dead; if
its file is swept, its rename fails and it has lost one write. So does a zombie, which has a number and an entry in
/proc until its parent looks, but writes nothing any more.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator

from fastload.cache import syscalls

_TEMP = re.compile(r"\.tmp-(\d+)-(\d+)-[0-9a-f]{8}-\d+")
_UNKNOWN = "0"  # no process but the first starts with the machine
_DEAD = (b"Z", b"X", b"x")  # states in /proc: a zombie, or on its way out


def temp_names() -> Iterator[str]:
    """An endless supply of temp names of this process; no two of them, from any call, are the same."""
    process = f"{os.getpid()}-{_start_time(os.getpid())}-{os.urandom(4).hex()}"
    # A map over a count, unlike a generator, may be drawn from by several threads at once.
    return map(f".tmp-{process}-{{}}".format, itertools.count())


def is_stale(name: str) -> bool:
    """Whether `name` is a temp name whose writer is gone."""
    match = _TEMP.fullmatch(name)
    if match is None:
        return False
    now = _start_time(int(match[1]))
    return now != match[2] and _UNKNOWN not in (now, match[2])


def is_running(pid: int) -> bool:
    """Whether there is such a process, as far as we can tell."""
    return _start_time(pid) != ""


def _start_time(pid: int) -> str:
    """When process `pid` started, in ticks since boot; "" where it is gone, `_UNKNOWN` where we cannot tell."""
    try:
        status = syscalls.read_file(f"/proc/{pid}/stat")
    except (FileNotFoundError, ProcessLookupError):
        return _UNKNOWN if pid == os.getpid() else ""
    except OSError:
        return _UNKNOWN
    # The second field is the program's name in brackets, and may hold anything; the 3rd is the state, the 22nd the
    # start time.
    fields = status.rpartition(b")")[2].split()
    return "" if fields[0] in _DEAD else fields[19].decode()
